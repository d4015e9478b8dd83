"""`python -m jaxllm`, the same as `jaxllm`."""

from jaxllm.cli import run

run()
