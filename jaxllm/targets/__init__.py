"""compile: one module a target. Each says which devices a mesh has there, and which options its compiler needs.

A target module offers
    environment(devices) -> {}  environment variables, set before jax is imported
    devices(mesh) -> list       the mesh's devices, or descriptions of those that are not there; raises TargetError
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from jaxllm.spec.errors import SpecError, TargetError
from jaxllm.targets.cpu import MOST_DEVICES


def names() -> tuple[str, ...]:
    """All targets, by discovery."""
    return tuple(sorted(info.name for info in pkgutil.iter_modules(__path__) if info.name not in ("compiler", "start")))


def module(target: str) -> ModuleType:
    """The module of a target. Raises SpecError for an unknown name."""
    if target not in names():
        raise SpecError(f"unknown target {target!r}; choose {', '.join(names())}.")
    return importlib.import_module(f"jaxllm.targets.{target}")


def validate(target: str, mesh: Any) -> None:
    """Checks that the target can be that mesh's, before jax starts.

    Raises SpecError for another kind of machine, or more than can be emulated; TargetError with the reason for a
    machine that is only predicted.
    """
    module(target)
    own = mesh.machine.target
    if target in ("gpu", "tpu") and target != own:
        raise SpecError(
            f"--target {target} cannot compile for {mesh}, whose compiler is {own}; "
            f"leave --target out, or emulate it with --target cpu."
        )
    if target == own and (reason := mesh.machine.predict_only):
        raise TargetError(
            f"{mesh} can only be predicted: {reason.strip('. ')}; emulate it with --target cpu, or ask jaxllm.predict, "
            "which needs no compiler."
        )
    if target == "cpu" and mesh.devices > MOST_DEVICES:
        raise SpecError(
            f"--target cpu emulates up to {MOST_DEVICES:,} devices and {mesh} has {mesh.devices:,}; "
            + (f"use --target {own}, or a smaller mesh." if own != "cpu" else "use a smaller mesh.")
        )
