"""FLOPs: equal to XLA's own count without loops, to the unrolled program with them, and inside of library calls."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType

import jaxllm
from jaxllm.hlo.inspect import inspect_program
from jaxllm.hlo.read import read_bytes
from tests.hlo.compilers import array, mesh_of

TARGETS = ("cpu", "gpu", "tpu")


def inspected(function, *arguments, target="cpu"):
    mesh = mesh_of(target, {"data": 8}, AxisType.Auto)
    with jax.set_mesh(mesh):
        return jaxllm.inspect(jax.jit(function), *(array(mesh, *given) for given in arguments))


def by_xla(function, *arguments):
    shapes = [jax.ShapeDtypeStruct(given[0], "float32") for given in arguments]
    return jax.jit(function).lower(*shapes).cost_analysis().get("flops", 0)  # nothing is left out where it is 0


@pytest.mark.parametrize("equation", ["ij,jk->ik", "bij,bjk->bik", "ij,kj->ik", "abij,abkj->abik", "ij,j->i"])
def test_dots_are_counted_as_xla_counts_them(equation):
    sizes = dict(zip("abijk", (2, 3, 5, 7, 11), strict=True))
    shapes = [tuple(sizes[letter] for letter in part) for part in equation.split("->")[0].split(",")]
    function = partial(jnp.einsum, equation)
    arguments = [(shape,) for shape in shapes]
    assert inspected(function, *arguments).matmul_flops == by_xla(function, *arguments)


CONVOLUTIONS = [
    {"window_strides": strides, "padding": padding, "lhs_dilation": lhs, "rhs_dilation": rhs, "feature_group_count": groups}
    for strides, padding, lhs, rhs, groups in itertools.product(
        ((1, 1), (2, 3)), (((0, 0), (0, 0)), ((1, 2), (3, 0))), ((1, 1), (2, 3)), ((1, 1), (2, 1)), (1, 2)
    )
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolutions_are_counted_as_xla_counts_them(options):
    groups = options["feature_group_count"]
    function = partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)
    arguments = ((4, 9, 11, 4),), ((3, 2, 4 // groups, 6),)
    assert inspected(function, *arguments).matmul_flops == by_xla(function, *arguments)


def test_convolutions_with_groups_of_the_batch():
    function = partial(
        lax.conv_general_dilated, window_strides=(1,), padding=((1, 1),), batch_group_count=2,
        dimension_numbers=("NHC", "HIO", "NHC"),
    )  # fmt: skip
    arguments = ((4, 9, 3),), ((3, 3, 6),)
    assert inspected(function, *arguments).matmul_flops == by_xla(function, *arguments)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_counts_as_its_unrolled_program(target, remat):
    def step(unroll, w, x):
        def inner(x, w):
            return jnp.sin(x @ w), None

        def outer(x, w):
            return lax.scan(inner, x, w, unroll=unroll)[0], None

        body = jax.checkpoint(outer) if remat else outer
        return jax.grad(lambda w, x: lax.scan(body, x, w, unroll=unroll)[0].sum(), argnums=(0, 1))(w, x)

    arguments = ((3, 4, 128, 128),), ((16, 128),)
    looped = inspected(partial(step, 1), *arguments, target=target)
    unrolled = inspected(partial(step, True), *arguments, target=target)
    assert max(len(product.place.trips) for product in looped.products) == 2
    forward, backward = 12 * 2 * 16 * 128 * 128, 24 * 2 * 16 * 128 * 128
    if not remat:
        assert looped.matmul_flops == unrolled.matmul_flops == forward + backward
    else:  # unrolled, XLA sees that what a checkpoint repeats was there before
        assert looped.matmul_flops == 2 * forward + backward >= unrolled.matmul_flops


@pytest.mark.parametrize("target", TARGETS)
def test_a_conditional_leaves_a_range(target):
    def step(x, w, which):
        branches = (lambda x: x, lambda x: x @ w, lambda x: jnp.sin(x @ w) @ w)
        return lax.switch(which[0].astype("int32"), branches, x) @ w

    found = inspected(step, ((64, 128),), ((128, 128),), ((1,),), target=target)
    one = 2 * 64 * 128 * 128
    assert found.matmul_flops_range == (one, 3 * one)
    assert sum(product.place.conditional for product in found.products) == 3
    assert len(found.assumed) == 1 and "branches" in found.assumed[0] and not found.not_understood


@pytest.mark.parametrize("target", TARGETS)
def test_a_loop_that_nobody_can_count_is_told(target):
    def step(x, w):
        return lax.while_loop(lambda x: x.sum() < 1e6, lambda x: x @ w, x)

    found = inspected(step, ((64, 128),), ((128, 128),), target=target)
    assert found.matmul_flops == 2 * 64 * 128 * 128
    assert len(found.not_understood) == 1 and "trip count" in found.not_understood[0]
    assert "test_work.py" in found.not_understood[0]


def test_kernels_of_linear_algebra_are_told_and_not_counted():
    found = inspected(lambda x: jnp.linalg.cholesky(x @ x.T), ((32, 32),))
    assert found.matmul_flops == 2 * 32**3
    assert any("FLOPs not counted" in text and "test_work.py" in text for text in found.not_understood)


def of_text(lines, computations=""):
    """The report of an entry computation of a GPU."""
    text = f"HloModule jit_f, is_scheduled=true, num_partitions=1\n{computations}\nENTRY %main (p: f32[]) -> f32[] {{\n"
    return inspect_program(read_bytes((text + "\n".join(lines) + "\n}\n").encode(), "text", scheduled=True))


def call(operands, result, target, rest):
    names = [f"%p.{number}" for number in range(len(operands))]
    lines = [f"  {name} = {shape} parameter({number})" for number, (name, shape) in enumerate(zip(names, operands, strict=True))]
    return of_text([*lines, f'  ROOT %c = {result} custom-call({", ".join(names)}), custom_call_target="{target}"{rest}'])


CALLS = {
    # with the dims that are contracted: [b, k, m] x [b, k, n]
    "__cublas$lt$matmul": (
        ["bf16[4,32,16]{2,1,0}", "bf16[4,32,64]{2,1,0}"], "(bf16[4,16,64]{2,1,0}, s8[1024]{0})",
        ', backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
        '"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}',
        2 * 4 * 16 * 32 * 64,
    ),
    # without them, from the sizes: rows of all batches against one matrix
    "__onednn$matmul": (["f32[4,16,32]{2,1,0}", "f32[32,64]{1,0}"], "f32[4,16,64]{2,1,0}", "", 2 * 4 * 16 * 32 * 64),
    "__cublas$gemm": (["f32[4,16,32]{2,1,0}", "f32[4,32,64]{2,1,0}"], "f32[4,16,64]{2,1,0}", "", 2 * 4 * 16 * 32 * 64),
    "__cudnn$convForward": (
        ["f32[2,8,8,3]{3,2,1,0}", "f32[5,3,3,3]{3,2,1,0}"], "(f32[2,8,8,5]{3,2,1,0}, u8[0]{0})",
        ", window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f", 2 * 2 * 22 * 22 * 3 * 5,
    ),
    # the gradients of that convolution, with respect to its image and to its kernel
    "__cudnn$convBackwardInput": (
        ["f32[2,8,8,5]{3,2,1,0}", "f32[5,3,3,3]{3,2,1,0}"], "(f32[2,8,8,3]{3,2,1,0}, u8[0]{0})",
        ", window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f", 2 * 2 * 22 * 22 * 3 * 5,
    ),
    "__cudnn$convBackwardFilter": (
        ["f32[2,8,8,3]{3,2,1,0}", "f32[2,8,8,5]{3,2,1,0}"], "(f32[5,3,3,3]{3,2,1,0}, u8[0]{0})",
        ", window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f", 2 * 2 * 22 * 22 * 3 * 5,
    ),
    "__cudnn$fmhaSoftmax": (
        ["bf16[2,128,4,64]{3,2,1,0}"] * 3, "(bf16[2,4,128,64]{3,2,1,0}, u8[0]{0})",
        ', backend_config={"cudnn_fmha_backend_config":{"intermediate_tensor_shape":{"dimensions":["2","4","128","128"]}}}',
        2 * 2 * 2 * 4 * 128 * 128 * 64,
    ),
    "__cudnn$fmhaSoftmaxBackward": (
        ["bf16[2,128,4,64]{3,2,1,0}"] * 4, "(bf16[2,4,128,64]{3,2,1,0}, bf16[2,4,128,64]{3,2,1,0}, bf16[2,4,128,64]{3,2,1,0})",
        ', backend_config={"cudnn_fmha_backend_config":{"intermediate_tensor_shape":{"dimensions":["2","4","128","128"]}}}',
        5 * 2 * 2 * 4 * 128 * 128 * 64,
    ),
}  # fmt: skip


@pytest.mark.parametrize("target", CALLS)
def test_library_calls(target):
    operands, result, rest, flops = CALLS[target]
    found = call(operands, result, target, rest)
    assert found.matmul_flops == flops and not found.not_understood
    (product,) = found.products
    assert product.kind == target and product.dtype == operands[0].partition("[")[0]


def test_a_call_that_moves_data_is_silent_and_an_unknown_one_is_not():
    assert not call(["f32[8]{0}"], "f32[8]{0}", "MoveToHost", "").not_understood
    (text,) = call(["f32[8]{0}"], "f32[8]{0}", "my_kernel", "").not_understood
    assert "my_kernel" in text and "not counted, 1 time" in text


def test_a_declared_cost_is_kept_apart():
    config = ', backend_config={"custom_call_config":{"cost_estimate":{"flops":"1234"}}}'
    found = call(["f32[8]{0}"], "f32[8]{0}", "tpu_custom_call", config)
    assert (found.declared_flops, found.matmul_flops, found.not_understood) == (1234, 0, ())


def test_ragged_dots_by_text():
    lines = [
        "  %x = f32[64,32]{1,0} parameter(0)", "  %w = f32[4,32,16]{2,1,0} parameter(1)", "  %s = s32[4]{0} parameter(2)",
        "  ROOT %r = f32[64,16]{1,0} ragged-dot(%x, %w, %s), lhs_contracting_dims={1}, rhs_contracting_dims={1}, "
        "lhs_ragged_dims={0}, rhs_group_dims={0}",
    ]  # fmt: skip
    assert of_text(lines).matmul_flops == 2 * 64 * 32 * 16


def test_an_opcode_of_the_future_is_told():
    found = of_text(["  %x = f32[8]{0} parameter(0)", "  ROOT %y = f32[8]{0} frobnicate(%x)"])
    assert found.not_understood == ("opcode frobnicate: not known, 1 instruction",)
