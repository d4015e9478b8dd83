"""Matmul FLOPs: exact on small programs, on all three targets."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from tests.hlo.compilers import array, compile, mesh_of

TARGETS = ("cpu", "gpu", "tpu")


def matmul(compiled):
    return {line.phase: line.value for line in compiled.ledger.section("flops")}


@pytest.mark.parametrize("target", TARGETS)
def test_a_sharded_dot(target):
    mesh = mesh_of(target)

    def forward(x, w):
        with jax.named_scope("forward"):
            return jnp.dot(x, w, out_sharding=P("data", "tensor"))

    x, w = array(mesh, (32, 64), P("data", None)), array(mesh, (64, 128), P(None, "tensor"))
    compiled = compile(forward, x, w, mesh=mesh, target=target)
    assert matmul(compiled) == {"forward": 2 * 16 * 64 * 64}
    assert compiled.ledger.unexplained == tuple(u for u in compiled.ledger.unexplained if u.startswith("argument"))
    (term,) = compiled.ledger.line("matmul").terms
    assert term.value == 2 * 16 * 64 * 64 and term.source.startswith("test_flops.py:")
    assert "f32[16,64] . f32[64,64] -> f32[16,64]" in term.detail


@pytest.mark.parametrize("target", TARGETS)
def test_nested_scans_multiply(target):
    mesh = mesh_of(target)

    def nested(x, ws):
        def outer(x, _):
            with jax.named_scope("forward"):
                x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)
            return x, None

        x, _ = lax.scan(outer, x, None, length=3)
        with jax.named_scope("update"):
            return x @ ws[0]

    x, ws = array(mesh, (16, 32)), array(mesh, (5, 32, 32))
    compiled = compile(nested, x, ws, mesh=mesh, target=target)
    one = 2 * 16 * 32 * 32
    assert matmul(compiled) == {"forward": 15 * one, "update": one}
    term = compiled.ledger.line("matmul", phase="forward").terms[0]
    assert "x 15 (3 x 5)" in term.detail


def test_batched_dot_and_convolution():
    mesh = mesh_of("cpu")

    def forward(a, b, image, kernel):
        with jax.named_scope("forward"):
            batched = jnp.einsum("bhqd,bhkd->bhqk", a, b)
            image = lax.conv_general_dilated(image, kernel, (1, 1), "VALID", feature_group_count=2)
        return batched, image

    a, b = array(mesh, (2, 3, 8, 4)), array(mesh, (2, 3, 6, 4))
    image, kernel = array(mesh, (2, 4, 9, 9)), array(mesh, (6, 2, 3, 3))
    compiled = compile(forward, a, b, image, kernel, mesh=mesh)
    convolution = 2 * (2 * 6 * 7 * 7) * (3 * 3 * 2)
    assert matmul(compiled) == {"forward": 2 * (2 * 3 * 8 * 6) * 4 + convolution}


def test_plain_autodiff_with_checkpoint_has_three_phases():
    mesh = mesh_of("cpu")

    @jax.checkpoint
    def block(x, w):
        return jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]) @ w[2]

    def loss(ws, x):
        x, _ = lax.scan(lambda x, w: (block(x, w), None), x, ws)
        return jnp.sum(x**2)

    def step(ws, x):
        with jax.named_scope("autodiff"):
            return jax.grad(loss)(ws, x)

    compiled = compile(step, array(mesh, (4, 3, 16, 16)), array(mesh, (8, 16)), mesh=mesh)
    one = 4 * 2 * 8 * 16 * 16
    # the last matmul of a block is not needed to compute its gradient
    assert matmul(compiled) == {"forward": 3 * one, "recompute": 2 * one, "backward": 6 * one}


def test_a_dot_of_no_phase_is_unexplained():
    mesh = mesh_of("cpu")

    def plain(x):
        return x @ x

    compiled = compile(plain, array(mesh, (8, 8)), mesh=mesh)
    assert matmul(compiled) == {"": 2 * 8**3}
    assert any(text.startswith("phase of") and "test_flops.py" in text for text in compiled.ledger.unexplained)


def test_a_branch_is_reported():
    mesh = mesh_of("cpu")

    def forward(x):
        with jax.named_scope("forward"):
            return lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x, x)

    compiled = compile(forward, array(mesh, (8, 8)), mesh=mesh)
    assert matmul(compiled) == {"forward": 2 * 8**3}
    assert any(text.startswith("branches of") for text in compiled.ledger.unexplained)


@pytest.mark.parametrize(("target", "widened"), [("cpu", True), ("gpu", False), ("tpu", False)])
def test_matmuls_of_two_operands_in_8_bits_are_a_line_of_their_own(target, widened):
    mesh = mesh_of(target)

    def forward(x, w):
        with jax.named_scope("forward"):
            narrow = jnp.dot(x.astype(jnp.float8_e5m2), w.astype(jnp.float8_e4m3fn), preferred_element_type=jnp.float32)
            mixed = jnp.dot(x.astype(jnp.float8_e5m2), w, preferred_element_type=jnp.float32)
            return narrow, mixed

    compiled = compile(forward, array(mesh, (64, 128)), array(mesh, (128, 32)), mesh=mesh, target=target)
    lines = {(line.dtype, line.phase): line.value for line in compiled.ledger.section("flops")}
    assert lines == {(dtype, "forward"): 2 * 64 * 128 * 32 for dtype in ("fp8", "")}
    notes = [note for note in compiled.ledger.notes if "8 bits" in note]
    assert [note.startswith("emitted: matmuls of 0 FLOPs multiply in 8 bits") for note in notes] == [True] * widened


def test_what_is_taken_back_from_8_bits_is_not_multiplied_in_them():
    """XLA:GPU for a card that is not there sees no product of 8 bits in two operands that were rounded and taken back."""
    mesh = mesh_of("gpu")
    rounded = lambda y: y.astype(jnp.float8_e4m3fn).astype(jnp.bfloat16)  # noqa: E731

    def forward(x, w):
        with jax.named_scope("forward"):
            return rounded(x) @ rounded(w)

    x, w = (array(mesh, (512, 512), dtype=jnp.bfloat16) for _ in "xw")
    compiled = compile(forward, x, w, mesh=mesh, target="gpu")
    assert [line.dtype for line in compiled.ledger.section("flops")] == [""]
    assert not any(
        operand.shape.dtype.startswith("f8")
        for computation, instruction in compiled.optimized.by_opcode["dot"]
        for operand in computation.operands(instruction)
    )
