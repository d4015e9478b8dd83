"""Eight emulated devices and the compilers for absent ones, settled before jax starts."""

from __future__ import annotations

import os

os.environ["JAXLLM_CACHE"] = ""  # every test compiles for itself

from jaxllm.targets import start

for target in ("cpu", "gpu", "tpu"):
    start.prepare(target, 8)
