"""build: a training step for a model, a layout and a workload, over a mesh of devices."""

from jaxllm.program.build import Built, build

__all__ = ["Built", "build"]
