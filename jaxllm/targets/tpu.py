"""XLA:TPU for pods that are not there: libtpu compiles for a named topology without a chip."""

from __future__ import annotations

import importlib.util
import platform
from typing import Any

from jaxllm.spec.errors import TargetError

INSTALL = "pip install 'jax[tpu]' installs it"
WHEELS = (("Linux", "x86_64"),)


def environment(devices: int) -> dict[str, str]:
    return {
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_LOG_DIR": "disabled",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        # libtpu takes a lock on this machine's chips; there are none, and several checks may run at once.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "CUDA_VISIBLE_DEVICES": "-1",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    }


def devices(mesh: Any) -> list[Any]:
    """Descriptions of the devices of a slice, in libtpu's order. Raises TargetError when libtpu is missing or refuses."""
    if (here := (platform.system(), platform.machine())) not in WHEELS:
        raise TargetError(f"libtpu has no wheel for {' '.join(here)}, only for Linux x86_64; --target cpu emulates the mesh.")
    if importlib.util.find_spec("libtpu") is None:
        raise TargetError(f"the tpu compiler, libtpu, is not installed: {INSTALL}.")
    from jax.experimental import topologies

    # libtpu assumes hosts of 2x2x1 chips, and so refuses a slice smaller than one unless told.
    extra = {"chips_per_host_bounds": mesh.host_bounds} if mesh.host_bounds else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=mesh.topology, **extra).devices)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise TargetError(
            f"libtpu cannot describe {mesh.text}: {reason}; correct [compiler] in its machine file, or emulate it with "
            "--target cpu."
        ) from error
