"""Trip counts, from the compiler's own figure or from the loop's condition."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxllm.hlo.loops import executions, trip_count
from jaxllm.hlo.read import read_bytes
from tests.hlo.compilers import array, compile, mesh_of


def trips(module):
    """Trip counts of the loops of a module that run something."""
    runs = executions(module)
    return sorted(
        (trip_count(module, computation, instruction) or 0)
        for computation, instruction in module.instructions()
        if instruction.opcode == "while" and runs.of(computation)
    )


@pytest.mark.parametrize("target", ["cpu", "gpu", "tpu"])
def test_counts_from_both_modules(target):
    mesh = mesh_of(target)

    def step(x):
        x, _ = lax.scan(lambda x, _: (jnp.sin(x @ x), None), x, None, length=7)
        x, _ = lax.scan(lambda x, i: (jnp.cos(x @ x) * i, None), x, jnp.arange(5.0), reverse=True)
        return lax.fori_loop(2, 13, lambda i, x: jnp.tanh(x @ x) + i, x)

    compiled = compile(step, array(mesh, (64, 64)), mesh=mesh, target=target)
    assert trips(compiled.partitioned) == [5, 7, 11]
    assert trips(compiled.optimized) == [5, 7, 11]


@pytest.mark.parametrize(
    ("start", "go_on", "advance", "count"),
    [
        (0, lambda i: i < 10, lambda i: i + 3, 4),
        (1, lambda i: i <= 10, lambda i: i + 3, 4),
        (10, lambda i: i > 0, lambda i: i - 3, 4),
        (9, lambda i: i >= 0, lambda i: i - 3, 4),
        (0, lambda i: 10 > i, lambda i: 2 + i, 5),
    ],
)
def test_a_while_that_counts(start, go_on, advance, count):
    def step(x):
        return lax.while_loop(lambda c: go_on(c[0]), lambda c: (advance(c[0]), jnp.sin(c[1] @ c[1])), (start, x))

    assert trips(compile(step, array(mesh_of("cpu"), (8, 8))).partitioned) == [count]


# A loop of three turns whose result no one reads: with one device no partitioner has dropped it yet.
UNREAD = """HloModule unread
body {
  p = (s32[], f32[8,8]) parameter(0)
  i = s32[] get-tuple-element(p), index=0
  one = s32[] constant(1)
  more = s32[] add(i, one)
  x = f32[8,8] get-tuple-element(p), index=1
  y = f32[8,8] dot(x, x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT t = (s32[], f32[8,8]) tuple(more, y)
}
until {
  p = (s32[], f32[8,8]) parameter(0)
  i = s32[] get-tuple-element(p), index=0
  three = s32[] constant(3)
  ROOT less = pred[] compare(i, three), direction=LT
}
ENTRY main {
  x = f32[8,8] parameter(0)
  zero = s32[] constant(0)
  start = (s32[], f32[8,8]) tuple(zero, x)
  loop = (s32[], f32[8,8]) while(start), condition=until, body=body
  y = f32[8,8] get-tuple-element(loop), index=1
  ROOT out = f32[8,8] add(x, x)
}
"""


@pytest.mark.parametrize(
    ("change", "count"),
    [
        (("", ""), []),
        (("add(x, x)", "add(x, y)"), [3]),
        # What others see of it happens, whoever reads the result.
        (("f32[8,8] dot(x, x), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
          'f32[8,8] custom-call(x), custom_call_target="print"'), [3]),
    ],
)  # fmt: skip
def test_a_loop_that_nobody_reads_does_not_run(change, count):
    module = read_bytes(UNREAD.replace(*change).encode() if change[0] else UNREAD.encode(), "unread.hlo").module
    runs = executions(module)
    body = next(part for part in module.computations.values() if part.name == "body")
    assert [context.count for context in runs.of(body)] == count


def test_an_unknown_count_is_counted_once_and_reported():
    mesh = mesh_of("cpu")

    def forward(x):
        with jax.named_scope("forward"):
            return lax.while_loop(lambda x: jnp.sum(x) < 1, lambda x: x @ x, x)

    compiled = compile(forward, array(mesh, (8, 8)), mesh=mesh)
    assert compiled.ledger.line("matmul").value == 2 * 8**3
    assert any(text.startswith("trip count of") for text in compiled.ledger.unexplained)


def test_a_function_called_from_two_loops_counts_for_both():
    mesh = mesh_of("cpu")

    @jax.jit
    def shared(x):
        return jnp.tanh(x @ x)

    def step(x):
        with jax.named_scope("forward"):
            x, _ = lax.scan(lambda x, _: (shared(x), None), x, None, length=3)
        with jax.named_scope("backward"):
            x, _ = lax.scan(lambda x, _: (shared(x), None), x, None, length=4)
        return x

    compiled = compile(step, array(mesh, (8, 8)), mesh=mesh)
    one = 2 * 8**3
    flops = {line.phase: line.value for line in compiled.ledger.section("flops")}
    assert flops == {"forward": 3 * one, "backward": 4 * one}
