"""Closed forms of sharded training, and what XLA really compiles, as one ledger, line by line.

Four nouns: ModelConfig, Layout, Machine, Workload. Five verbs: predict, build, compile, measure, compare.
Names are loaded when they are first used, so that `import jaxllm` imports neither NumPy nor JAX.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "ModelConfig": "jaxllm.spec.model",
    "Layout": "jaxllm.spec.layout",
    "Machine": "jaxllm.spec.machine",
    "Workload": "jaxllm.spec.workload",
    "Ledger": "jaxllm.spec.ledger",
    "SpecError": "jaxllm.spec.errors",
    "TargetError": "jaxllm.spec.errors",
    "predict": "jaxllm.theory",
    "build": "jaxllm.check",
    "compile": "jaxllm.targets.compiler",
    "measure": "jaxllm.check",
    "compare": "jaxllm.report.compare",
    "step_time": "jaxllm.theory.time",
    "played_time": "jaxllm.played",
    "inspect": "jaxllm.inspection",
    "inspect_file": "jaxllm.inspection",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxllm' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
