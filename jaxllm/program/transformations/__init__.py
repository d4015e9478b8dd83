"""What each optimizer does with a gradient, by optax. Each module of this folder holds some: a new module is found without
being listed. What they keep is told apart from here, in jaxllm/spec/optimizers.py.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import optax

from jaxllm.program.sharding import Placement

Tree = Any


@dataclass(frozen=True)
class Transformation:
    """An optimizer by its name in jaxllm/spec/optimizers.py.

    make    (learning rate, places of the parameters) -> optax.GradientTransformation
    source  of the hyperparameters
    placed  (name of a slot, place of a parameter) -> place of the slot
    """

    name: str
    make: Callable[[Any, Tree], optax.GradientTransformation]
    source: str
    placed: Callable[[str, Placement], Placement] = lambda slot, place: place


@cache
def registry() -> dict[str, Transformation]:
    """All of them by name."""
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    found = [value for module in modules for value in vars(module).values() if isinstance(value, Transformation)]
    return {one.name: one for one in sorted(found, key=lambda one: one.name)}
