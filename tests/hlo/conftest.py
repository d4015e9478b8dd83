"""What the compilers make of programs is read here as users get it: XLA:CPU fuses for its emitters of today."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from tests.grid import OLDER_EMITTERS, QUICK


@pytest.fixture(autouse=True)
def emitters_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    if OLDER_EMITTERS not in QUICK:
        return
    compile = jax.stages.Lowered.compile

    def as_users_do(lowered: jax.stages.Lowered, compiler_options: dict[str, Any] | None = None) -> Any:
        return compile(lowered, {"xla_cpu_use_fusion_emitters": True} | (compiler_options or {}))

    monkeypatch.setattr(jax.stages.Lowered, "compile", as_users_do)
