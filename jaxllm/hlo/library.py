"""Custom calls: the library routines and kernels in which a compiler hides matrix work, and the FLOPs of each.

A call that is known to move data only has none. One that says nothing of itself has a reason instead of a number.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from math import isqrt, prod
from typing import Any

from jaxllm.hlo.convolution import convolution_flops
from jaxllm.hlo.graph import Computation, Instruction, Shape

# Calls of the compilers' own that hold no product of matrices: placement, sorting, packing, synchronisation.
_MOVES = re.compile(
    r"AsyncCollective(Start|Done)|Sharding|SPMD\w+|AllocateBuffer|MoveTo(Host|Device)|annotate_device_placement|Pin|Unpin|CreateBuffer|LayoutConstraint"
    r"|TopK|ApproxTopK|PartialReduce|__gpu\$TopK|__cub\$\w+|xla\.gpu\.(topk|ext\.\w+)|PadToStatic|SliceToDynamic"
    r"|GatherScatterIndices\w*|AssumeGatherIndicesInBound|ConcatBitcast|X64\w+|EncodePartialReplica|xla\.sdy\.\w+"
    r"|__onednn\$(layernorm|softmax)|rng_bit_generator|cu_threefry2x32\w*|xla_ffi_python_\w+_callback|xla_python_\w+"
    r"|NopReturnToken|SetPipeline|tpu_barrier|GlobalBarrier|BarrierCustomCall|mosaic_gpu_barrier"
)
_MARKS = re.compile(
    r"AsyncCollective(Start|Done)|Sharding|SPMD\w+|AllocateBuffer|annotate_device_placement|Pin|Unpin|CreateBuffer"
    r"|LayoutConstraint|AssumeGatherIndicesInBound|ConcatBitcast|xla\.sdy\.\w+|NopReturnToken|SetPipeline"
)
_MATMULS = ("__cublas$", "__onednn$matmul", "__triton_gemm")
_CONVOLUTION = re.compile(r"__cudnn\$conv(Forward|BackwardInput|BackwardFilter|BiasActivationForward|ForwardGraph)")


@dataclass(frozen=True)
class Known:
    """What is known of a custom call."""

    kind: str  # its target
    flops: int
    declared: bool = False  # by the kernel itself
    reason: str = ""  # why the FLOPs are not known


def marks(target: str) -> bool:
    """Whether a call only marks, names or allocates something, so that nothing runs."""
    return bool(_MARKS.fullmatch(target))


def is_end(instruction: Instruction) -> bool:
    """Whether an instruction is the call with which XLA:TPU begins or ends a collective that goes on beside fusions."""
    return instruction.opcode == "custom-call" and instruction.proto.custom_call_target.startswith("AsyncCollective")


def multiplies(target: str) -> bool:
    """Whether a call is known to be a product of matrices, the last two dims of whose result are rows and columns."""
    return target.startswith(_MATMULS)


def flops_of(computation: Computation, call: Instruction) -> Known | None:
    """FLOPs of one execution of a custom call, or None when it multiplies nothing."""
    target = call.proto.custom_call_target
    operands = [operand.shape for operand in computation.operands(call)]
    if _MOVES.fullmatch(target):
        return None
    if multiplies(target) and len(operands) >= 2:
        return _matmul(target, call, operands)
    if found := _CONVOLUTION.match(target):
        return _convolution(found[1], target, call, operands)
    if target.startswith("__onednn$convolution") and len(operands) >= 2 and call.proto.window.dimensions:
        return _convolution("Forward", target, call, operands)
    if target.startswith("__cudnn$fmha"):
        return _attention(target, call, operands)
    if "ragged_dot_tiling" in {pair.key for pair in call.proto.frontend_attributes.map} and len(operands) >= 2:
        # XLA:TPU's own kernel for a ragged dot: the two arrays come last
        rows, matrices = operands[-2], operands[-1]
        if len(rows.dims) == 2 and len(matrices.dims) == 3 and matrices.dims[0]:
            return Known(target, 2 * rows.size * (matrices.size // matrices.dims[0]) // max(1, rows.dims[1]))
    declared = _declared(call)
    if declared is not None:
        return Known(target, declared, declared=True)
    if target == "tpu_custom_call" and call.name.startswith("ragged-dot-metadata"):
        return None  # which rows belong to which group, for the kernel that follows
    return Known(target, 0, reason=f"custom call {target}: nothing tells what it computes")


def _config(call: Instruction) -> dict[str, Any]:
    try:
        config = json.loads(call.proto.backend_config)
    except ValueError:  # some kernels keep another language there
        return {}
    return config if isinstance(config, dict) else {}


def _result(call: Instruction) -> Shape:
    return call.shape.leaves[0] if call.shape.leaves else call.shape


def _matmul(target: str, call: Instruction, operands: list[Shape]) -> Known:
    """2 x elements of the result x contracted size. Where the call does not name the contracted dims, their size k
    follows from the sizes: with b matrices, |lhs| x |rhs| = (b m k)(b k n) = k^2 x b x |result|."""
    left, right, result = operands[0], operands[1], _result(call)
    numbers = _config(call).get("gemm_backend_config", {}).get("dot_dimension_numbers", {})
    dims = [int(dim) for dim in numbers.get("lhs_contracting_dimensions", ())]
    if dims and max(dims) < len(left.dims):
        return Known(target, 2 * result.size * prod(left.dims[dim] for dim in dims))
    batches = prod(result.dims[:-2]) if len(right.dims) == len(result.dims) else 1
    square, rest = divmod(left.size * right.size, max(1, result.size * batches))
    size = isqrt(square)
    if rest or size * size != square:
        return Known(target, 0, reason=f"custom call {target}: its shapes are not those of a matrix product")
    return Known(target, 2 * result.size * size)


def _convolution(direction: str, target: str, call: Instruction, operands: list[Shape]) -> Known:
    """A gradient of a convolution multiplies as much as the convolution: its labels are those of the forward one."""
    if len(operands) < 2:
        return Known(target, 0, reason=f"custom call {target}: it lacks its operands")
    first, second, result = operands[0].dims, operands[1].dims, _result(call).dims
    image, kernel, out = {
        "BackwardInput": (result, second, first),
        "BackwardFilter": (first, result, second),
    }.get(direction, (first, second, result))
    return Known(target, convolution_flops(call, image, kernel, out))


def _attention(target: str, call: Instruction, operands: list[Shape]) -> Known:
    """cuDNN's attention: two products of batch x heads x T x S x H forward; five backward, where the scores are made
    again beside the four gradients. A causal mask is not taken off, as no kernel says how much of it it skips."""
    config = _config(call).get("cudnn_fmha_backend_config", {})
    scores = [int(size) for size in config.get("intermediate_tensor_shape", {}).get("dimensions", ())]
    if not scores or not operands or not operands[0].dims:
        return Known(target, 0, reason=f"custom call {target}: its configuration names no scores")
    products = 5 if "Backward" in target else 2
    return Known(target, products * 2 * prod(scores) * operands[0].dims[-1])


def _declared(call: Instruction) -> int | None:
    """What a Pallas kernel was given as its cost_estimate."""
    estimate = _config(call).get("custom_call_config", {}).get("cost_estimate", {})
    try:
        return int(estimate["flops"])
    except (KeyError, TypeError, ValueError):
        return None
