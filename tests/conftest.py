"""Eight emulated devices and the compilers for absent ones, settled before jax starts."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# No machine's pace decides, and the examples are the same everywhere; `--hypothesis-profile=search` draws others.
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fixed", settings.get_profile("search"), derandomize=True, database=None)
settings.load_profile("fixed")

from tests.grid import OLDER_EMITTERS, QUICK

os.environ["JAXLLM_CACHE"] = ""  # every test compiles for itself
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()

from jaxllm.targets import start

for target in ("cpu", "gpu", "tpu"):
    start.prepare(target, 8)


@pytest.fixture
def emitters_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA:CPU fuses for them in a user's process, and not quite alike for the older ones of this process: for tests of what
    is fused, and of pages that show it."""
    if OLDER_EMITTERS not in QUICK:
        return
    import jax

    compile = jax.stages.Lowered.compile

    def as_users_do(lowered: Any, compiler_options: dict[str, Any] | None = None) -> Any:
        return compile(lowered, {"xla_cpu_use_fusion_emitters": True} | (compiler_options or {}))

    monkeypatch.setattr(jax.stages.Lowered, "compile", as_users_do)
