"""Eight emulated devices and the compilers for absent ones, settled before jax starts."""

from __future__ import annotations

import os

from hypothesis import settings

# The same examples everywhere: a test that passes here passes on any machine. `--hypothesis-profile=search` draws others.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.register_profile("search", deadline=None)
settings.load_profile("fixed")

os.environ["JAXLLM_CACHE"] = ""  # every test compiles for itself
# Machine code of small programs need not be fast: what is measured is settled before it is generated.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

from jaxllm.targets import start

for target in ("cpu", "gpu", "tpu"):
    start.prepare(target, 8)
