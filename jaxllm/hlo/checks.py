"""What an instruction of each opcode must have for what measures it: operands, a shape, computations, numbers in range.

A check gives what is wrong, to be said after the instruction's name, or "". (The rules: openxla/xla,
xla/service/hlo_verifier.cc, of which these are the ones that something here depends on.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from jaxllm.hlo.graph import PASSES, Computation, Instruction, Module, Shape
from jaxllm.hlo.groups import pairs_of

MOST_TRIPS = 2**62
_DEEPEST = 200  # brackets of a configuration in each other
_WINDOW = 2**26  # places of a kernel times its dilation
_MANY = 2**40  # operands: as many as one likes


@dataclass
class Context:
    """The module at hand. `devices`: how many there are at most; `groups`: those that have been looked at."""

    module: Module
    devices: int
    parameters: dict[int, dict[int, Instruction]] = field(default_factory=dict)  # of computations, by number
    groups: set[tuple[bytes, ...]] = field(default_factory=set)


Check = Callable[[Context, Instruction, list[Instruction]], str]


def alike(one: Shape, other: Shape) -> bool:
    """Whether two shapes are nested in the same way, whatever their arrays are."""
    if one is other or one.dtype != "tuple":
        return other.dtype != "tuple" or one is other
    if other.dtype != "tuple" or len(one.elements) != len(other.elements):
        return False
    return all(map(alike, one.elements, other.elements))


def _hands_on(context: Context, instruction: Instruction, operands: list[Instruction]) -> str:
    return "" if alike(instruction.shape, operands[0].shape) else "does not have the shape of its operand"


def _tuple(context: Context, instruction: Instruction, operands: list[Instruction]) -> str:
    shape = instruction.shape
    if shape.dtype != "tuple" or len(shape.elements) != len(operands):
        return "is a tuple of other elements than its shape has"
    if all(alike(element, operand.shape) for element, operand in zip(shape.elements, operands, strict=True)):
        return ""
    return "is a tuple of other elements than its shape has"


def _element(context: Context, instruction: Instruction, operands: list[Instruction]) -> str:
    whole, index = operands[0].shape, instruction.proto.tuple_index
    if operands[0].opcode == "copy-start":
        return "takes an element of a copy that has not been done"
    if not 0 <= index < len(whole.elements):
        return f"takes element {index} of a tuple of {len(whole.elements)}"
    return "" if alike(instruction.shape, whole.elements[index]) else "has another shape than the element that it takes"


def _arguments(context: Context, called: Computation, shapes: Sequence[Shape], result: Shape | None) -> str:
    """Whether a computation can be given arrays of these shapes, and gives back that one."""
    parameters = context.parameters[called.id]
    if len(parameters) != len(shapes):
        return f"has {len(shapes)} operands for the {len(parameters)} parameters of {called.name}"
    if not all(alike(parameters[number].shape, shape) for number, shape in enumerate(shapes)):
        return f"has operands that are not shaped like the parameters of {called.name}"
    if result is not None and not alike(called.root.shape, result):
        return f"does not have the shape of what {called.name} gives"
    return ""


def _call(context: Context, instruction: Instruction, operands: list[Instruction]) -> str:
    if len(instruction.called_ids) != 1:
        return f"calls {len(instruction.called_ids)} computations, and {instruction.opcode} calls 1"
    called = context.module.called(instruction)[0]
    return _arguments(context, called, [operand.shape for operand in operands], instruction.shape)


def _while(context: Context, instruction: Instruction, operands: list[Instruction]) -> str:
    if len(instruction.called_ids) != 2:
        return f"calls {len(instruction.called_ids)} computations, and a loop has a body and a condition"
    body, condition = context.module.called(instruction)
    given = [operands[0].shape]
    if reason := _arguments(context, body, given, instruction.shape) or _arguments(context, condition, given, None):
        return reason
    if condition.root.shape.dtype == "tuple":
        return "has a condition that is no truth value"
    return _trips(instruction.proto.backend_config)


def _trips(config: bytes) -> str:
    if b"known_trip_count" not in config:
        return ""
    try:
        trips = -1 if _deep(config) else int(json.loads(config)["known_trip_count"]["n"])
    except (ValueError, TypeError, KeyError):
        return "has a configuration whose known_trip_count is no number"
    return "" if 0 <= trips <= MOST_TRIPS else f"has a known_trip_count of {trips}"


def _conditional(context: Context, instruction: Instruction, operands: list[Instruction]) -> str:
    branches = context.module.called(instruction)
    if not branches or len(operands) != len(branches) + 1:
        return f"has {len(operands)} operands for {len(branches)} branches; it takes one for each and the choice"
    for branch, operand in zip(branches, operands[1:], strict=True):
        if reason := _arguments(context, branch, [operand.shape], instruction.shape):
            return reason
    return ""


def _async_start(context: Context, instruction: Instruction, operands: list[Instruction]) -> str:
    if len(instruction.called_ids) != 1:
        return f"calls {len(instruction.called_ids)} computations, and what starts calls 1"
    parts = instruction.shape.elements
    if len(parts) < 2 or len(parts[0].elements) != len(operands):
        return "does not have its operands and its result in its shape"
    shapes = [operand.shape for operand in operands]
    if not all(map(alike, parts[0].elements, shapes)):
        return "does not have its operands and its result in its shape"
    return _arguments(context, context.module.called(instruction)[0], shapes, parts[1])


def _async_next(context: Context, instruction: Instruction, operands: list[Instruction]) -> str:
    before = operands[0]
    if before.opcode not in ("async-start", "async-update"):
        return "does not follow what has been started"
    if instruction.opcode == "async-update":
        return _hands_on(context, instruction, operands)
    return "" if alike(instruction.shape, before.shape.elements[1]) else "has another shape than what it ends"


def _copy_start(context: Context, instruction: Instruction, operands: list[Instruction]) -> str:
    parts = instruction.shape.elements
    if len(parts) < 2 or not all(alike(part, operands[0].shape) for part in parts[:2]):
        return "does not have its operand twice in its shape"
    return ""


def _copy_done(context: Context, instruction: Instruction, operands: list[Instruction]) -> str:
    if operands[0].opcode != "copy-start":
        return "does not follow a copy that has been started"
    return "" if alike(instruction.shape, operands[0].shape.elements[0]) else "has another shape than what it ends"


def _dot(context: Context, instruction: Instruction, operands: list[Instruction]) -> str:
    left, right = operands[0].shape.dims, operands[1].shape.dims
    ragged = instruction.opcode.startswith("ragged")
    proto = instruction.proto
    numbers = proto.ragged_dot_dimension_numbers.dot_dimension_numbers if ragged else proto.dot_dimension_numbers
    one, other = numbers.lhs_contracting_dimensions, numbers.rhs_contracting_dimensions
    named = [*one, *numbers.lhs_batch_dimensions]
    if not _distinct(named, len(left)) or not _distinct(other, len(right)) or len(one) != len(other):
        return f"contracts dims {list(one)} and {list(other)} of operands of {len(left)} and {len(right)} dims"
    if ragged:
        grouped = proto.ragged_dot_dimension_numbers.rhs_group_dimensions
        return "" if _distinct(grouped, len(right)) else f"has groups in dims {list(grouped)}"
    if any(left[i] != right[j] for i, j in zip(one, other, strict=True)):
        return "contracts dims of different sizes"
    return ""


def _distinct(dims: Iterable[int], rank: int) -> bool:
    """Whether these are dims of an array of that rank, each once."""
    dims = list(dims)
    return len(set(dims)) == len(dims) and all(0 <= dim < rank for dim in dims)


def _convolution(context: Context, instruction: Instruction, operands: list[Instruction]) -> str:
    return _window(instruction, operands[0].shape.dims, operands[1].shape.dims, instruction.shape.dims)


def _window(instruction: Instruction, image: Sequence[int], kernel: Sequence[int], result: Sequence[int]) -> str:
    """Whether the labels of a convolution name each dim of its arrays once, and its window is that of its kernel."""
    numbers, window = instruction.proto.convolution_dimension_numbers, instruction.proto.window.dimensions
    labels = (
        (numbers.input_batch_dimension, numbers.input_feature_dimension, *numbers.input_spatial_dimensions),
        (
            numbers.kernel_input_feature_dimension,
            numbers.kernel_output_feature_dimension,
            *numbers.kernel_spatial_dimensions,
        ),
        (numbers.output_batch_dimension, numbers.output_feature_dimension, *numbers.output_spatial_dimensions),
    )
    for dims, named in zip((image, kernel, result), labels, strict=True):
        if len(named) != len(window) + 2 or len(dims) != len(named) or not _distinct(named, len(dims)):
            return f"has labels that are not those of an array of {len(dims)} dims and a window of {len(window)}"
    for place, dim in zip(window, numbers.kernel_spatial_dimensions, strict=True):
        if min(place.stride, place.window_dilation, place.base_dilation) < 0 or place.size != kernel[dim]:
            return "has a window that is not that of its kernel"
        if kernel[dim] * max(1, place.base_dilation) > _WINDOW:
            return f"has a window of {kernel[dim]:,} places, {place.base_dilation:,} apart"
    return ""


_CUDNN = re.compile(r"__cudnn\$conv(Forward|BackwardInput|BackwardFilter|BiasActivationForward|ForwardGraph)")


def _custom_call(context: Context, instruction: Instruction, operands: list[Instruction]) -> str:
    proto = instruction.proto
    if reason := _config(proto.backend_config):
        return reason
    if not proto.window.dimensions or len(operands) < 2:
        return ""
    first, second = operands[0].shape.dims, operands[1].shape.dims
    result = instruction.shape.leaves[0].dims if instruction.shape.leaves else ()
    found = _CUDNN.match(proto.custom_call_target)
    image, kernel, out = {"BackwardInput": (result, second, first), "BackwardFilter": (first, result, second)}.get(
        found[1] if found else "", (first, second, result)
    )
    return _window(instruction, image, kernel, out)


# The parts of a configuration that tell what a library call computes, and the lists of sizes or dims in them.
_CONFIGS = (
    ("gemm_backend_config", "dot_dimension_numbers", "lhs_contracting_dimensions"),
    ("cudnn_fmha_backend_config", "intermediate_tensor_shape", "dimensions"),
    ("custom_call_config", "cost_estimate", ""),
)


def _config(config: bytes) -> str:
    """What is wrong with a configuration in JSON, or "". Some kernels keep another language there."""
    if not config.startswith(b"{"):
        return ""
    if _deep(config):
        return f"has a configuration nested more than {_DEEPEST} deep"
    try:
        parsed = json.loads(config)
    except ValueError:
        return ""
    for *path, last in _CONFIGS:
        part = parsed
        for key in path:
            part = part.get(key, {})
            if not isinstance(part, dict):
                return f"has a configuration whose {key} is not one"
        numbers = part.get(last, [])
        if not isinstance(numbers, list) or not all(re.fullmatch(r"\d{1,18}", str(number)) for number in numbers):
            return f"has a configuration whose {last} are no numbers"
    return ""


def _deep(config: bytes) -> bool:
    """Whether brackets lie deeper in each other than a parser of JSON goes."""
    if config.count(b"[") + config.count(b"{") <= _DEEPEST:
        return False
    depth = 0
    for bracket in re.finditer(rb"[\[\]{}]", config):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > _DEEPEST:
            return True
    return False


def _collective(context: Context, instruction: Instruction, operands: list[Instruction]) -> str:
    if not all(operand.shape.leaves for operand in operands):
        return "has an operand without an array"
    proto = instruction.proto
    if _deep(proto.backend_config):
        return f"has a configuration nested more than {_DEEPEST} deep"
    key = (
        proto.mesh_axes_replica_group_list.SerializeToString(),
        proto.iota_collective_device_list.SerializeToString(),
        proto.collective_device_list.SerializeToString(),
        b"".join(group.SerializeToString() for group in proto.replica_groups),
    )
    if key not in context.groups:
        if reason := _groups(proto, context.devices):
            return reason
        context.groups.add(key)
    return ""


def _groups(proto: Any, devices: int) -> str:
    if proto.HasField("mesh_axes_replica_group_list"):
        return _mesh(proto.mesh_axes_replica_group_list, devices)
    for iota in (proto.iota_collective_device_list, proto.collective_device_list.iota_replica_group_list):
        if iota.num_replica_groups or iota.num_devices_per_group or iota.iota_reshape_dims:
            return _iota(iota, devices)
    literal = proto.collective_device_list.replica_groups or proto.replica_groups
    named = [device for group in literal for device in group.replica_ids]
    if not _distinct(named, devices):
        return f"has groups whose devices are not once each of 0 .. {devices - 1:,}"
    if any(not group.replica_ids for group in literal) and len(literal) > 1:
        return "has an empty group beside others"
    return ""


def _iota(iota: Any, devices: int) -> str:
    dims = list(iota.iota_reshape_dims)
    count = iota.num_replica_groups * iota.num_devices_per_group
    if not dims or min(*dims, iota.num_replica_groups, iota.num_devices_per_group) < 1 or prod(dims) != count:
        return f"has groups in rows, {iota.num_replica_groups} by {iota.num_devices_per_group}, that {dims} do not fill"
    if count > devices:
        return f"has groups of {count:,} devices, and there are {devices:,}"
    return _permutation(iota.iota_transpose_perm, len(dims))


def _permutation(order: Sequence[int], rank: int) -> str:
    if len(order) and sorted(order) != list(range(rank)):
        return f"has a transpose of {rank} dims in its groups, {list(order)}, that is none"
    return ""


def _mesh(groups: Any, devices: int) -> str:
    mesh = groups.mesh
    sizes = [axis.size for axis in mesh.axes]
    if not sizes or min(sizes) < 1 or prod(sizes) > devices:
        told = " x ".join(map(str, sizes)) or "no axes"
        return f"has groups over a mesh of {told}, and there are {devices:,} devices"
    if mesh.device_ids and (len(mesh.device_ids) != prod(sizes) or not _distinct(mesh.device_ids, devices)):
        return "has groups over a mesh whose devices are not once each of those that there are"
    dims = list(mesh.iota_transform.reshape_dims)
    if dims and (min(dims) < 1 or prod(dims) != prod(sizes)):
        return f"has groups over a mesh of {prod(sizes):,} devices, in the order of {dims}"
    if reason := _permutation(mesh.iota_transform.transpose_perm, len(dims)):
        return reason
    parts: dict[int, list[tuple[int, int]]] = {}
    for axis in groups.axes:
        if not 0 <= axis.mesh_axis_index < len(sizes):
            return f"has groups over axis {axis.mesh_axis_index} of a mesh of {len(sizes)}"
        size = sizes[axis.mesh_axis_index]
        sub = axis.sub_axis_info
        part = (sub.pre_size, sub.size) if axis.HasField("sub_axis_info") else (1, size)
        if min(part) < 1 or size % (part[0] * part[1]):
            return f"has groups over a part ({part[0]}){part[1]} of an axis of {size}"
        parts.setdefault(axis.mesh_axis_index, []).append(part)
    for several in parts.values():
        done = 1
        for before, part in sorted(several):
            if before % done:
                return "has groups over parts of an axis that lie in each other"
            done = before * part
    return ""


def _permute(context: Context, instruction: Instruction, operands: list[Instruction]) -> str:
    if not all(operand.shape.leaves for operand in operands):
        return "has an operand without an array"
    pairs = pairs_of(instruction)
    for ends in zip(*pairs, strict=True):
        if not _distinct(ends, context.devices):
            return f"moves between devices that are not once each of 0 .. {context.devices - 1:,}"
    return ""


def _started(check: Check) -> Check:
    """A check of a start whose shape holds its operands and then its results, beside that of what is started."""

    def both(context: Context, instruction: Instruction, operands: list[Instruction]) -> str:
        elements = instruction.shape.elements
        if len(elements) < 2:
            return "does not have its operands and its result in its shape"
        given = [operand.shape for operand in operands]
        if not (alike(elements[0], given[0]) or alike(elements[0], Shape("tuple", elements=tuple(given)))):
            return "does not have its operands and its result in its shape"
        return check(context, instruction, operands)

    return both


_UNARY = """
    abs acos acosh asin asinh atanh bitcast-convert broadcast cbrt ceil cholesky convert cosine cosh count-leading-zeros
    erf exponential exponential-minus-one fft floor get-dimension-size imag infeed is-finite log log-plus-one logistic
    negate not popcnt real reduce-precision reshape reverse rng-bit-generator round-nearest-afz round-nearest-even rsqrt
    sign sine sinh slice sqrt tan tanh transpose topk recv get-tuple-element bitcast copy domain opt-barrier copy-start
    copy-done while all-reduce-done all-gather-done collective-permute-done async-update async-done send-done recv-done
""".split()
_BINARY = """
    add add-dependency and atan2 compare complex convolution divide gather maximum minimum multiply or outfeed pad power
    remainder send set-dimension-size shift-left shift-right-arithmetic shift-right-logical stochastic-convert subtract
    triangular-solve xor
""".split()
_OPERANDS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(_UNARY, (1, 1)),
    **dict.fromkeys(_BINARY, (2, 2)),
    **dict.fromkeys("parameter constant iota partition-id replica-id".split(), (0, 0)),
    **dict.fromkeys("clamp select select-and-scatter batch-norm-training".split(), (3, 3)),
    **dict.fromkeys("batch-norm-grad batch-norm-inference".split(), (5, 5)),
    **dict.fromkeys(
        """
        all-gather all-gather-start all-reduce all-reduce-start all-to-all collective-broadcast collective-permute
        collective-permute-start concatenate conditional dynamic-reshape dynamic-slice map reduce-scatter sort
        """.split(),
        (1, _MANY),
    ),
    **dict.fromkeys("dot ragged-dot dynamic-update-slice reduce reduce-window".split(), (2, _MANY)),
    "scatter": (3, _MANY),
    "ragged-all-to-all": (1, _MANY),
}  # fmt: skip

_CHECKS: dict[str, Check] = {
    **dict.fromkeys([*(PASSES - {"copy-start", "copy-done"}), "domain", "add-dependency"], _hands_on),
    "tuple": _tuple,
    "get-tuple-element": _element,
    "call": _call,
    "fusion": _call,
    "while": _while,
    "conditional": _conditional,
    "async-start": _async_start,
    "async-update": _async_next,
    "async-done": _async_next,
    "copy-start": _copy_start,
    "copy-done": _copy_done,
    "dot": _dot,
    "ragged-dot": _dot,
    "convolution": _convolution,
    "custom-call": _custom_call,
    **dict.fromkeys(
        """
        all-gather all-reduce all-reduce-start all-to-all collective-broadcast ragged-all-to-all reduce-scatter
        """.split(),
        _collective,
    ),
    "all-gather-start": _started(_collective),
    "collective-permute": _permute,
    "collective-permute-start": _started(_permute),
    "send": _permute,
}

# opcode -> the least and the most operands, and the check, if there is one
ANY: tuple[int, int, Check | None] = (0, _MANY, None)
RULES: dict[str, tuple[int, int, Check | None]] = {
    opcode: (*_OPERANDS.get(opcode, (0, _MANY)), _CHECKS.get(opcode)) for opcode in (*_OPERANDS, *_CHECKS)
}
