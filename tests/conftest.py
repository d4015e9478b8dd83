"""Eight emulated devices and the compilers for absent ones, settled before jax starts."""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# No machine's pace decides, and the examples are the same everywhere; `--hypothesis-profile=search` draws others.
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fixed", settings.get_profile("search"), derandomize=True, database=None)
settings.load_profile("fixed")

from tests.grid import EMITTERS, QUICK

# All tests share the kernels of XLA:GPU that one of them had written, and each compiles for itself.
SHARED = Path(tempfile.gettempdir()) / f"jaxllm-tests-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
os.environ["JAXLLM_CACHE"] = str(SHARED)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()
# A third less of XLA:TPU's time, which goes into a faster program of the same lines; XLA:CPU and XLA:GPU make the same program.
LEVEL = "jax_optimization_level"
os.environ[LEVEL.upper()] = "O0"

from jaxllm.targets import start

for target in ("cpu", "gpu", "tpu"):
    start.prepare(target, 8)

recall = importlib.import_module("jaxllm.check").recalled
importlib.import_module("jaxllm.check").recalled = lambda lowered, measured: (
    (measured(), False) if os.environ.get("JAXLLM_CACHE") == str(SHARED) else recall(lowered, measured)
)


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(SHARED, ignore_errors=True)


MAPS = Path("/proc/self/maps")
MANY_MAPS = 20_000  # of the 65,530 that Linux lets a process have by default

# What jax traces makes many objects that stay. To look at all of them as often as Python does takes 7 % of the tests' time.
gc.freeze()
gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def forgotten_programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a module has compiled goes with it, from its own caches as well, but not from those that it shares."""
    yield
    for each in vars(request.module).values():
        if hasattr(each, "cache_clear") and each.__module__ == request.module.__name__:
            each.cache_clear()
    _forget()


@pytest.fixture(autouse=True)
def room_for_programs() -> None:
    """A program that is loaded on XLA:CPU holds hundreds of mappings of memory: 1,200 with a run and its reference. Past the
    last one that Linux gives a process, the next compilation aborts it."""
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        _forget()


def _forget() -> None:
    import jax

    jax.clear_caches()
    gc.collect()


@pytest.fixture
def compilers_of_users(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With a user's emitters and level of optimization a compiler fuses and combines not quite as with those of this process: for
    tests of what is fused, and of pages that show it."""
    import jax

    compile = jax.stages.Lowered.compile
    theirs = {name: not value for name, value in EMITTERS.items()}

    def as_users_do(lowered: Any, compiler_options: dict[str, Any] | None = None) -> Any:
        return compile(lowered, theirs | (compiler_options or {}))

    monkeypatch.setattr(jax.stages.Lowered, "compile", as_users_do)
    mine = getattr(jax.config, LEVEL)
    jax.config.update(LEVEL, "UNKNOWN")  # the compiler's own
    yield
    jax.config.update(LEVEL, mine)
