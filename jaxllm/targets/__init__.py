"""compile: one module a target. Each says which devices a mesh has there, and which options its compiler needs.

A target module offers
    environment(devices) -> {}  environment variables, set before jax is imported
    devices(mesh) -> list       the mesh's devices, or descriptions of those that are not there; raises TargetError
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from jaxllm.spec.errors import SpecError, nearest


def names() -> tuple[str, ...]:
    """All targets, by discovery."""
    return tuple(sorted(info.name for info in pkgutil.iter_modules(__path__) if info.name not in ("compiler", "start")))


def module(target: str) -> ModuleType:
    """The module of a target. Raises SpecError for an unknown name."""
    if target not in names():
        raise SpecError(f"unknown target {target!r}; {nearest(target, names())}")
    return importlib.import_module(f"jaxllm.targets.{target}")
