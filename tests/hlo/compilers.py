"""Small programs through the three compilers, none of which needs a device of its own kind here."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxllm.hlo import Dump, measure
from jaxllm.hlo.graph import Module, read_module
from jaxllm.hlo.loops import executions
from jaxllm.hlo.protos import read
from jaxllm.spec.ledger import Ledger

AXES = {"replica": 2, "data": 2, "tensor": 2}

PASSES = {"cpu": ".*spmd-partitioning.*", "gpu": "^$", "tpu": ".*tpu-spmd-partitioning.*"}


@cache
def devices(target: str) -> list[Any]:
    """Eight devices of a target, or descriptions of them."""
    if target == "cpu":
        return jax.devices("cpu")[:8]
    if target == "tpu":
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        return list(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices)
    from jaxllm.targets import gpu

    os.environ.update(gpu.environment(8))
    card = {
        "compute_capability": (9, 0), "shared_memory_per_core": 233472, "threads_per_core_limit": 2048,
        "core_count": 132, "fpus_per_core": 128, "memory_bandwidth": 3352320000000, "l2_cache_size": 52428800,
        "clock_rate_ghz": 1.98, "device_memory_size": 84929347584, "shared_memory_per_block_optin": 232448,
        "description": "NVIDIA H100 80GB HBM3",
    }  # fmt: skip
    config = gpu.target_config(type("Card", (), {"compiler": card}))
    topology = topologies.get_topology_desc(platform="cuda", topology_name="", target_config=config, topology="1x1x8")
    return list(topology.devices)


def mesh_of(target: str, axes: dict[str, int] | None = None, kind: AxisType = AxisType.Explicit) -> Mesh:
    axes = AXES if axes is None else axes
    return Mesh(np.array(devices(target)).reshape(tuple(axes.values())), tuple(axes), axis_types=(kind,) * len(axes))


class Compiled:
    """One compiled program: its ledger, its modules and the executable."""

    def __init__(self, folder: Path, target: str, axes: dict[str, int], executable: Any, logical: dict[str, int]):
        self.dump = Dump.find(folder, target)
        self.executable = executable
        self.ledger: Ledger = measure(self.dump, axes, logical_bytes=logical)
        self.partitioned: Module = read_module(read(self.dump.partitioned).hlo_module)
        self.optimized_proto = read(self.dump.optimized)
        self.optimized: Module = read_module(self.optimized_proto.hlo_module)
        self.runs = executions(self.partitioned)


@contextlib.contextmanager
def dumped(function: Callable, mesh: Mesh, target: str, *arguments: Any, **jit_options: Any) -> Iterator[tuple]:
    """The folder of a compilation's dump and the executable."""
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        lowered = jax.jit(function, keep_unused=True, **jit_options).lower(*arguments)
        options = {
            "xla_dump_to": folder,
            "xla_dump_hlo_as_proto": True,
            "xla_dump_hlo_module_re": f".*{function.__name__}.*",
            "xla_dump_hlo_pass_re": PASSES[target],
        }
        yield Path(folder), lowered.compile(compiler_options=options)


def compile(
    function: Callable, *arguments: Any, mesh: Mesh | None = None, target: str = "cpu",
    logical: dict[str, int] | None = None, **jit_options: Any,
) -> Compiled:  # fmt: skip
    """Compiles `function(*arguments)` and measures it. Arguments are abstract arrays, see `array`."""
    mesh = mesh_of(target) if mesh is None else mesh
    with dumped(function, mesh, target, *arguments, **jit_options) as (folder, executable):
        return Compiled(folder, target, dict(mesh.shape), executable, logical or {})


def array(mesh: Mesh, shape: tuple[int, ...], spec: PartitionSpec | None = None, dtype: Any = "float32") -> Any:
    """An abstract array of a global shape."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec or PartitionSpec()))
