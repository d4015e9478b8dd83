"""XLA:CPU over forced host devices: compiles for an emulated mesh, and runs on it."""

from __future__ import annotations

from typing import Any

from jaxllm.spec.errors import SpecError, TargetError

# Measured: 2,048 forced devices work in one process, 4,096 do not ("multiprocess computations aren't implemented").
MOST_DEVICES = 2048


def environment(devices: int) -> dict[str, str]:
    if devices > MOST_DEVICES:
        raise SpecError(
            f"{devices} virtual devices are more than XLA:CPU can hold ({MOST_DEVICES}); "
            "use a smaller mesh, or a gpu or tpu machine with its own target."
        )
    return {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "-1",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    }


def devices(mesh: Any) -> list[Any]:
    """The first forced host devices. Raises TargetError when jax runs with fewer."""
    import jax

    here = jax.devices("cpu")
    if len(here) < mesh.devices:
        raise TargetError(
            f"jax runs with {len(here)} CPU devices and {mesh.devices} are needed: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={mesh.devices} before jax is imported."
        )
    return here[: mesh.devices]
