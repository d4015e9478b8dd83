"""Eight emulated devices and the compilers for absent ones, settled before jax starts."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# No machine's pace decides, and the examples are the same everywhere; `--hypothesis-profile=search` draws others.
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fixed", settings.get_profile("search"), derandomize=True, database=None)
settings.load_profile("fixed")

os.environ["JAXLLM_CACHE"] = ""  # every test compiles for itself
from tests.grid import QUICK

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()

from jaxllm.targets import start

for target in ("cpu", "gpu", "tpu"):
    start.prepare(target, 8)
