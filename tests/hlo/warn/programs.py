"""Programs that a warning is about, and the same ones put right.

Each function takes the name of a target and whether the program is put right, and gives a Case. A comment `# here`
marks the line that the warning has to name.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jaxllm.hlo.dump import Dump
from jaxllm.hlo.inspect import inspect_program
from jaxllm.hlo.policies import unmatched_names
from jaxllm.hlo.read import read_bytes, read_file
from jaxllm.report.inspection import Finding
from tests.hlo.compilers import array, devices, mesh_of

TARGETS = ("cpu", "gpu", "tpu")
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """A function with abstract arguments for a mesh, options of jax.jit and of the compiler."""

    function: Callable
    arguments: tuple[Any, ...]
    mesh: Mesh
    jit: dict[str, Any] = field(default_factory=dict)
    compiler: dict[str, Any] = field(default_factory=dict)


@cache
def compiled(program: Callable, target: str, fixed: bool, messages: str = "") -> tuple[tuple[Finding, ...], str]:
    """The findings of a program and its text. `messages` are taken for what the compiler said."""
    jax.clear_caches()  # what is traced once, as the slices of a scan, keeps the lines of the first program
    case = program(target, fixed)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(case.mesh):
        jitted = jax.jit(case.function, **case.jit)
        dump = {
            "xla_dump_to": folder,
            "xla_dump_hlo_as_proto": True,
            "xla_dump_hlo_module_re": f".*{case.function.__name__}.*",
        }
        executable = jitted.lower(*case.arguments).compile(compiler_options=dump | case.compiler)
        path = Dump.find(folder, target).optimized
        assert path is not None
        unmatched = unmatched_names(jitted, case.arguments)
        report = inspect_program(read_file(path), mesh=dict(case.mesh.shape), messages=messages, unmatched=unmatched)
        return report.warnings, executable.as_text()


def findings(program: Callable, target: str, fixed: bool, kind: str, messages: str = "") -> list[Finding]:
    """The findings of one kind."""
    return [finding for finding in compiled(program, target, fixed, messages)[0] if finding.kind == kind]


def from_text(program: Callable, target: str, kind: str) -> list[Finding]:
    """The findings of one kind in the text of a program."""
    report = inspect_program(read_bytes(compiled(program, target, False)[1].encode("latin-1"), "program.txt"))
    return [finding for finding in report.warnings if finding.kind == kind]


def is_marked(finding: Finding) -> bool:
    """Whether a finding names a line of this file that is marked, or one of those that go on from there."""
    file, _, line = finding.source.partition(" < ")[0].partition(":")
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return file == Path(__file__).name and "# here" in lines[int(line) - 1]


def _auto(target: str, **axes: int) -> Mesh:
    return mesh_of(target, axes or {"data": 8}, AxisType.Auto)


def _ring() -> list[tuple[int, int]]:
    return [(i, (i + 1) % 8) for i in range(8)]


# ---- placement ----


def reshard(target: str, fixed: bool) -> Case:
    """From columns over one axis to rows over another: no way known, or in two steps."""
    mesh = _auto(target, a=2, b=4)

    def step(x):
        y = lax.with_sharding_constraint(jnp.sin(x), P(None, "a"))  # here, since jax 0.12
        if fixed:
            y = lax.with_sharding_constraint(y, P("b", "a"))
        y = y * 2  # here
        return jnp.cos(lax.with_sharding_constraint(y, P("b", None)))

    return Case(step, (array(mesh, (8192, 4096), P(None, "a")),), mesh)


def whole_argument(target: str, fixed: bool) -> Case:
    """A weight of 64 MiB on every device."""
    mesh = _auto(target)

    def step(w, x):
        return (x @ w).sum()  # here

    return Case(
        step, (array(mesh, (4096, 4096), P("data") if fixed else P()), array(mesh, (8192, 4096), P("data"))), mesh
    )


def half_sharded(target: str, fixed: bool) -> Case:
    """A weight that is sharded over two devices of eight."""
    mesh = _auto(target, data=4, tensor=2)

    def step(w, x):
        return (x @ w).sum()  # here

    spec = P("data", "tensor") if fixed else P(None, "tensor")
    return Case(step, (array(mesh, (4096, 8192), spec), array(mesh, (4096, 4096), P("data"))), mesh)


def whole_batch(target: str, fixed: bool) -> Case:
    """A batch that nothing shards: every device multiplies all of it."""
    mesh = _auto(target)

    def step(w, x):
        return (jnp.tanh(x @ w) ** 2).sum()  # here

    spec = P("data") if fixed else P()
    return Case(step, (array(mesh, (256, 256)), array(mesh, (65536, 256), spec)), mesh)


# ---- traffic ----


def sliced_sum(target: str, fixed: bool) -> Case:
    """A sum over devices of which each keeps a slice."""
    mesh = _auto(target)

    def step(x, w):
        def one(x, w):
            if fixed:
                return lax.psum_scatter(x @ w, "data", scatter_dimension=0, tiled=True)
            y = lax.psum(x @ w, "data")  # here
            return lax.dynamic_slice_in_dim(y, lax.axis_index("data") * 512, 512, 0)

        specs = P(None, "data"), P("data")
        return jax.shard_map(one, in_specs=specs, out_specs=P("data"), check_vma=False)(x, w)

    return Case(step, (array(mesh, (4096, 4096), P(None, "data")), array(mesh, (4096, 2048), P("data"))), mesh)


def sliced_by_jit(target: str, fixed: bool) -> Case:
    """The same under jit alone: the partitioner writes an all-reduce and a slice. `fixed` changes nothing."""
    mesh = _auto(target)

    def step(x, w):
        return jnp.sin(lax.with_sharding_constraint(x @ w, P("data", None)))  # here

    return Case(step, (array(mesh, (4096, 4096), P(None, "data")), array(mesh, (4096, 2048), P("data"))), mesh)


def _accumulated(layers: int, fixed: bool, spec: P) -> Callable:
    """Gradients added up over microbatches, reduced in each of them, or once at the end."""

    def loss(w, x):
        if not layers:
            return (jnp.tanh(x @ w) ** 2).sum()  # here
        return (lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0] ** 2).sum()  # here

    def gradients(w, xs):
        def micro(acc, x):
            return lax.with_sharding_constraint(acc + jax.grad(loss)(w, x), spec) if spec else acc + jax.grad(loss)(
                w, x
            ), None

        return lax.scan(micro, jnp.zeros_like(w), xs)[0]

    def step(w, xs):
        if not fixed:
            return gradients(w, xs)

        def one(w, xs):
            return lax.psum(gradients(lax.pcast(w, "data", to="varying"), xs), "data")

        return jax.shard_map(one, in_specs=(P(), P(None, "data")), out_specs=P())(w, xs)

    return step


def _microbatches(mesh: Mesh, *layers: int) -> tuple[Any, Any]:
    return array(mesh, (*layers, 1024, 1024)), array(mesh, (4, 2048, 1024), P(None, "data"))


def summed_layers(target: str, fixed: bool) -> Case:
    """The gradients of three layers, reduced layer by layer in each of four microbatches."""
    mesh = _auto(target)
    return Case(_accumulated(3, fixed, P()), _microbatches(mesh, 3), mesh)


def summed_flat(target: str, fixed: bool) -> Case:
    """The gradient of one matrix, reduced in each microbatch."""
    mesh = _auto(target)
    return Case(_accumulated(0, fixed, P()), _microbatches(mesh), mesh)


def summed_pieces(target: str, fixed: bool) -> Case:
    """As ZeRO-2 has it: each device adds up its piece of the gradients, which are scattered in each microbatch."""
    mesh = _auto(target)
    return Case(_accumulated(3, fixed, P() if fixed else P(None, "data")), _microbatches(mesh, 3), mesh)


def residual_stream(target: str, fixed: bool) -> Case:
    """A sum that the loop carries and reads: the stream of a tensor parallel model. Nothing to put off."""
    mesh = _auto(target, tensor=8)

    def step(x, up, down):
        def one(x, up, down):
            def layer(x, w):
                return x + lax.psum(jnp.tanh(x @ w[0]) @ w[1], "tensor"), None

            return lax.scan(layer, x, (up, down))[0]

        specs = P(), P(None, None, "tensor"), P(None, "tensor")
        return jax.shard_map(one, in_specs=specs, out_specs=P(), check_vma=False)(x, up, down)

    weights = array(mesh, (4, 1024, 4096), P(None, None, "tensor")), array(mesh, (4, 4096, 1024), P(None, "tensor"))
    return Case(step, (array(mesh, (2048, 1024)), *weights), mesh)


def largest_summed(target: str, fixed: bool) -> Case:
    """The largest of all devices in each turn, added up: a maximum of sums is another number."""
    mesh = _auto(target)

    def step(xs):
        def one(xs):
            def turn(acc, x):
                return acc + lax.pmax(jnp.sin(x), "data"), None

            return lax.scan(turn, jnp.zeros((1024, 1024)), xs)[0]

        return jax.shard_map(one, in_specs=P(None, "data"), out_specs=P(), check_vma=False)(xs)

    return Case(step, (array(mesh, (4, 8 * 1024, 1024), P(None, "data")),), mesh)


def gathered_columns(target: str, fixed: bool) -> Case:
    """Columns of a weight gathered for rows that are the same on the devices that gather."""
    mesh = _auto(target, data=2, tensor=4)

    def step(x, w):
        w = lax.with_sharding_constraint(jnp.sin(w), P(None, "tensor"))  # here, since jax 0.12
        w = w if fixed else lax.with_sharding_constraint(w, P())  # here
        return lax.with_sharding_constraint(x @ w, P("data", "tensor") if fixed else P("data", None)).sum()

    return Case(step, (array(mesh, (4096, 4096), P("data")), array(mesh, (4096, 8192), P(None, "tensor"))), mesh)


def gathered_in_scan(target: str, fixed: bool) -> Case:
    """The same for each of four layers, whose input is what the layer before made."""
    mesh = _auto(target, data=2, tensor=4)

    def step(x, w):
        def layer(x, w):
            w = w if fixed else lax.with_sharding_constraint(w, P())
            y = lax.with_sharding_constraint(jnp.tanh(x @ w), P("data", "tensor") if fixed else P("data", None))
            return lax.with_sharding_constraint(y, P("data", None)), None

        return lax.scan(layer, x, w)[0].sum()  # here

    weights = array(mesh, (4, 2048, 2048), P(None, None, "tensor"))
    return Case(step, (array(mesh, (4096, 2048), P("data")), weights), mesh)


def fsdp(target: str, fixed: bool) -> Case:
    """Weights gathered for rows of each device's own, again in the backward pass: all as it should be."""
    mesh = _auto(target)

    def step(x, w):
        def loss(w):
            def layer(x, w):
                w = lax.with_sharding_constraint(w, P())
                return lax.with_sharding_constraint(jnp.tanh(x @ w), P("data")), None

            return (lax.scan(jax.checkpoint(layer), x, w)[0] ** 2).sum()

        return jax.grad(loss)(w)

    return Case(step, (array(mesh, (4096, 2048), P("data")), array(mesh, (4, 2048, 2048), P(None, None, "data"))), mesh)


def _half(target: str, fixed: bool, collective: Callable, out: P) -> Case:
    mesh = _auto(target)

    def step(x):
        def one(x):
            y = x if fixed else x.astype("float32")
            return collective(y).astype("float32")  # here

        return jax.shard_map(one, in_specs=P("data"), out_specs=out, check_vma=False)(x)

    return Case(step, (array(mesh, (8 * 2048, 4096), P("data"), "bfloat16"),), mesh)


def scattered_in_f32(target: str, fixed: bool) -> Case:
    """bf16 cast to f32 before a reduce-scatter."""
    return _half(target, fixed, lambda y: lax.psum_scatter(y, "data", tiled=True), P("data"))  # here


def summed_in_f32(target: str, fixed: bool) -> Case:
    """bf16 cast to f32 before an all-reduce."""
    return _half(target, fixed, lambda y: lax.psum(y, "data"), P())  # here


def moved_in_f32(target: str, fixed: bool) -> Case:
    """bf16 cast to f32 before a permute."""
    return _half(target, fixed, lambda y: lax.ppermute(y, "data", _ring()), P("data"))  # here


def gathered_in_f32(target: str, fixed: bool) -> Case:
    """A weight in f32 gathered, and then cast to bf16."""
    mesh = _auto(target)

    def step(x, w):
        def one(x, w):
            if fixed:
                return x @ lax.all_gather(w.astype("bfloat16"), "data", tiled=True)
            return x @ lax.all_gather(w, "data", tiled=True).astype("bfloat16")  # here

        return jax.shard_map(one, in_specs=(P("data"), P("data")), out_specs=P("data"), check_vma=False)(x, w)

    return Case(step, (array(mesh, (4096, 4096), P("data"), "bfloat16"), array(mesh, (4096, 2048), P("data"))), mesh)


# ---- memory ----


def short_of_memory(target: str, fixed: bool) -> Case:
    """A backward pass for which memory is too small, unless the program recomputes by itself."""
    mesh, options = _auto(target), {}
    if target == "gpu":
        mesh = Mesh(np.array(_small_cards()), ("data",), axis_types=(AxisType.Auto,))
    if target == "tpu":
        options = {"xla_tpu_max_hbm_size_mib": 90}
    rows, width = (8192, 8192) if target == "gpu" else (4096, 1024)

    def step(x, w):
        def loss(w):
            def layer(y, w):
                return jnp.tanh(jnp.tanh(y @ w) @ w)  # here

            y = x
            for each in w:
                y = (jax.checkpoint(layer) if fixed else layer)(y, each)
            return (y**2).sum()

        return jax.grad(loss)(w)

    return Case(
        step, (array(mesh, (8 * rows, width), P("data")), [array(mesh, (width, width))] * 3), mesh, compiler=options
    )


@cache
def _small_cards() -> list[Any]:
    """Eight H100 of 5 GB."""
    from jax.experimental import topologies

    from jaxllm.spec.machine import Machine
    from jaxllm.targets import gpu

    devices("gpu")
    card = Machine.load("h100:8").machine.compiler | {"device_memory_size": 5 * 10**9 // gpu.UNBOUNDED}
    config = gpu.target_config(type("Card", (), {"compiler": card}))
    topology = topologies.get_topology_desc(platform="cuda", topology_name="", target_config=config, topology="1x1x8")
    return list(topology.devices)


def update(target: str, fixed: bool) -> Case:
    """An optimizer step that gives parameters and momentum anew."""
    mesh = _auto(target)

    def step(p, m, g):
        m = 0.9 * m + g  # here
        return p - m, m  # here

    jit = {"donate_argnames": ("p", "m")} if fixed else {}
    return Case(step, (array(mesh, (8192, 4096), P("data")),) * 3, mesh, jit=jit)


def kept_weights(target: str, fixed: bool) -> Case:
    """Gathered weights of four layers, kept for the backward pass or gathered again."""
    mesh = _auto(target)

    def step(x, w):
        def loss(w):
            def layer(x, w):
                w = checkpoint_name(lax.with_sharding_constraint(w, P()), "w")
                return lax.with_sharding_constraint(jnp.tanh(x @ w), P("data")), None

            policy = jax.checkpoint_policies.save_any_names_but_these("w")
            layer = jax.checkpoint(layer, policy=policy) if fixed else layer
            return (lax.scan(layer, x, w)[0] ** 2).sum()  # here

        return jax.grad(loss)(w)

    return Case(step, (array(mesh, (512, 2048), P("data")), array(mesh, (4, 2048, 2048), P(None, None, "data"))), mesh)


def kept_weights_one_by_one(target: str, fixed: bool) -> Case:
    """The same without a loop over the layers."""
    mesh = _auto(target)

    def step(x, w):
        def loss(w):
            def layer(x, w):
                w = lax.with_sharding_constraint(w, P())  # here
                return lax.with_sharding_constraint(jnp.tanh(x @ w), P("data"))  # here, since jax 0.12

            y = x
            for each in w:
                y = (jax.checkpoint(layer) if fixed else layer)(y, each)
            return (y**2).sum()

        return jax.grad(loss)(w)

    return Case(step, (array(mesh, (512, 4096), P("data")), [array(mesh, (4096, 4096), P(None, "data"))] * 3), mesh)


def kept_softmax(target: str, fixed: bool) -> Case:
    """Attention in bf16 with its softmax in f32, over four layers."""
    mesh = _auto(target)

    def step(x, w):
        def loss(w):
            def layer(x, w):
                q = jnp.einsum("btd,dhk->bhtk", x, w)
                scores = jnp.einsum("bhtk,bhsk->bhts", q, q).astype("float32")
                mixed = jnp.einsum("bhts,bhsk->bthk", jax.nn.softmax(scores).astype("bfloat16"), q)  # here
                return x + jnp.einsum("bthk,dhk->btd", mixed, w), None

            y = lax.scan(jax.checkpoint(layer) if fixed else layer, x, w)[0]
            return (y.astype("float32") ** 2).sum()

        return jax.grad(loss)(w)

    arguments = array(mesh, (16, 256, 512), P("data"), "bfloat16"), array(mesh, (4, 512, 8, 64), dtype="bfloat16")
    return Case(step, arguments, mesh)


def _cached(target: str, body: Callable) -> Case:
    mesh = _auto(target)

    def step(cache, rows, flags):
        return lax.scan(lambda cache, given: body(cache, *given), cache, (rows, jnp.arange(64), flags))

    arguments = (
        array(mesh, (8192, 8192), P(None, "data")),
        array(mesh, (64, 8192), P(None, "data")),
        array(mesh, (64,), dtype="bool"),
    )
    return Case(step, arguments, mesh, jit={"donate_argnums": (0,)})


def _written(cache, row, i):
    return lax.dynamic_update_slice_in_dim(cache, row[None], i, 0)


def cache_in_branch(target: str, fixed: bool) -> Case:
    """A cache of 32 MiB that a branch updates and that is read beside it; or only the row chosen."""

    def body(cache, row, i, flag):
        old = lax.dynamic_index_in_dim(cache, i, 0, False)
        if fixed:
            made = _written(cache, jnp.where(flag, row, old), i)
        else:
            made = lax.cond(flag, lambda c: _written(c, row, i), lambda c: c, cache)  # here
        return made, lax.dynamic_index_in_dim(made, i, 0, False) * old

    return _cached(target, body)


def cache_in_branch_alone(target: str, fixed: bool) -> Case:
    """The same, and nobody reads the old cache beside the conditional."""

    def body(cache, row, i, flag):
        return lax.cond(flag, lambda c: _written(c, row, i), lambda c: c, cache), None  # here

    return _cached(target, body)


def odd_dims(target: str, fixed: bool) -> Case:
    """Three dims, none of which fills tiles."""
    mesh = _auto(target)

    def step(x):
        return jnp.sin(x) + 1  # here

    shape = (8 * 384, 1032, 256) if fixed else (8 * 300, 1030, 260)
    return Case(step, (array(mesh, shape, P("data")),), mesh)
