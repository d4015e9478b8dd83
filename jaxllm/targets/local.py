"""The devices that are here: the same program, compiled by their own compiler, and run."""

from __future__ import annotations

from typing import Any

from jaxllm.spec.errors import TargetError



def environment(devices: int) -> dict[str, str]:
    return {"TF_CPP_MIN_LOG_LEVEL": "3"}


def devices(mesh: Any) -> list[Any]:
    """The first devices that jax finds. Raises TargetError when there are fewer than the mesh has."""
    import jax

    here = jax.devices()
    if len(here) < mesh.devices:
        raise TargetError(
            f"{len(here)} {here[0].platform} device{'s are' if len(here) > 1 else ' is'} here and the mesh "
            f"{mesh.text} has {mesh.devices}: use a mesh of {len(here)}, or --target cpu to emulate it; check compiles for "
            "devices that are not here when --target is left out."
        )
    return here[: mesh.devices]
