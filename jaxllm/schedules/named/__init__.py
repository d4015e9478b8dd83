"""The schedules that have a name. Each module of this folder holds some: a new module is found without being listed."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from jaxllm.schedules.table import Schedule


@dataclass(frozen=True)
class Named:
    """A family of schedules.

    build   (stages, microbatches, chunks) -> Schedule
    source  where it is published
    chunks  the least and the most that a stage can have; None: as many as wanted
    fills   whether it needs as many microbatches as stages
    """

    name: str
    build: Callable[[int, int, int], Schedule]
    source: str
    chunks: tuple[int, int | None] = (1, 1)
    fills: bool = False


@cache
def registry() -> dict[str, Named]:
    """All of them by name."""
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    named = [value for module in modules for value in vars(module).values() if isinstance(value, Named)]
    return {one.name: one for one in sorted(named, key=lambda one: one.name)}
