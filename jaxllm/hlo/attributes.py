"""The rest of a line of HLO text, what follows the operands, as the fields of an HloInstructionProto.

Only the fields that something here reads, and never an error: a number that no field can hold becomes the largest that
it can, for verify.py to refuse where it matters.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from jaxllm.hlo.graph import Shape
from jaxllm.hlo.protos import classes

_INT32, _INT64 = 2**31 - 1, 2**63 - 1

_ESCAPE = re.compile(r"\\([0-7]{1,3}|x[0-9a-fA-F]{2}|.)", re.S)
_STRING = r'"(?:[^"\\]++|\\.)*+"'
_FLAT = rf'\{{(?:[^{{}}"]++|{_STRING})*+\}}'  # braces around strings and what is none
_DEEPER = rf'\{{(?:[^{{}}"]++|{_STRING}|{_FLAT})*+\}}'
_BRACED = rf'\{{(?:[^{{}}"]++|{_STRING}|{_DEEPER})*+\}}'
_QUOTED = re.compile(_STRING, re.S)
_JSON = re.compile(rf"[{{}}]|{_STRING}?", re.S)
_NUMBERS = re.compile(r"\d+")

_DIMENSIONS = re.compile(r"\bdimensions=\{([\d,]*)\}")
_CONTRACTED = (
    (re.compile(r"\blhs_contracting_dims=\{([\d,]*)\}"), "lhs_contracting_dimensions"),
    (re.compile(r"\brhs_contracting_dims=\{([\d,]*)\}"), "rhs_contracting_dimensions"),
    (re.compile(r"\blhs_batch_dims=\{([\d,]*)\}"), "lhs_batch_dimensions"),
)
_RAGGED = (
    (re.compile(r"\blhs_ragged_dims=\{([\d,]*)\}"), "lhs_ragged_dimensions"),
    (re.compile(r"\brhs_group_dims=\{([\d,]*)\}"), "rhs_group_dimensions"),
)
_INDEX = re.compile(r"\bindex=(\d+)")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_METADATA = re.compile(rf", metadata={_BRACED}")
_KIND = re.compile(r"\bkind=(\w+)")
_DIRECTION = re.compile(r"\bdirection=(\w+)")
_TARGET = re.compile(rf"custom_call_target=({_STRING})")
_PAIRS = re.compile(r"source_target_pairs=\{([\d,{} ]*)\}")
_PAIR = re.compile(r"\{(\d+),(\d+)\}")
_SHARDING = re.compile(rf"\bsharding=({_BRACED})")
FRONTEND = re.compile(rf"\bfrontend_attributes=({_BRACED})")
_ATTRIBUTE = re.compile(rf"(?<![\w.])([\w.]++)=({_STRING}|{_BRACED})")
_IOTA_DIMENSION = re.compile(r"\biota_dimension=(\d+)")
_FRAME = re.compile(r"\bstack_frame_id=(\d+)")
_FILE = re.compile(rf"source_file=({_STRING})")
_LINE = re.compile(r"\bsource_line=(\d+)")


def integer(text: str) -> int:
    """A number of decimal digits; the largest that a field can hold for what none can."""
    return int(text) if len(text) < 19 else _INT64


def integers(text: str) -> tuple[int, ...]:
    """All numbers in a text."""
    return tuple(map(integer, _NUMBERS.findall(text)))


def op_name_of(attributes: str) -> str:
    """The op_name in the metadata of a line; "" when there is none."""
    start = attributes.find('op_name="')
    if start < 0:
        return ""
    start += 9
    end = attributes.find('"', start)
    while end > 0 and attributes[end - 1] == "\\":
        end = attributes.find('"', end + 1)
    text = attributes[start:end] if end > 0 else ""
    return text if "\\" not in text and text.isascii() else unescaped(text)


def unescaped(text: str) -> str:
    """A string as it was before XLA wrote it between quotes, in C's escapes, of UTF-8. `text`: a character a byte."""
    if "\\" not in text and text.isascii():
        return text
    named = {"n": "\n", "t": "\t", "r": "\r"}

    def letter(match: re.Match[str]) -> str:
        code = match[1]
        if code[0] in "01234567":
            return chr(int(code, 8) & 255)
        return chr(int(code[1:], 16)) if code[0] == "x" and len(code) == 3 else named.get(code, code)

    return _ESCAPE.sub(letter, text).encode("latin-1").decode("utf-8", "replace")


def fields_of(opcode: str, shape: Shape, operands: str, attributes: str, op_name: str) -> Any:
    """The HloInstructionProto of a line, from the text of its operands and what follows them."""
    proto = classes()["HloInstructionProto"]()
    before, metadata, config = split(attributes)
    if config:
        value = config[len(", backend_config=") :]
        proto.backend_config = unescaped(value[1:-1]).encode() if value[0] == '"' else value.encode("latin-1")
    if metadata:
        _metadata(metadata, op_name, proto.metadata)
    if opcode == "parameter":
        proto.parameter_number = integer(operands) if operands.isascii() and operands.isdigit() else 0
    elif opcode == "constant":
        _literal(shape, operands, proto.literal)
    elif opcode in ("convolution", "custom-call"):
        proto.feature_group_count = proto.batch_group_count = 1
    if "=" not in before:
        return proto
    if opcode == "get-tuple-element":
        if found := _INDEX.search(before):
            proto.tuple_index = integer(found[1])
    elif opcode == "compare":
        if found := _DIRECTION.search(before):
            proto.comparison_direction = found[1]
    elif opcode == "fusion":
        if found := _KIND.search(before):
            proto.fusion_kind = found[1]
    elif opcode in ("dot", "ragged-dot"):
        _dot(before, proto, opcode)
    if "dimensions=" in before and (found := _DIMENSIONS.search(before)):
        proto.dimensions.extend(integers(found[1]))
    if "custom_call_target=" in before and (found := _TARGET.search(before)):
        proto.custom_call_target = unescaped(found[1][1:-1])
    elif "iota_dimension=" in before and (found := _IOTA_DIMENSION.search(before)):
        proto.dimensions.append(integer(found[1]))
    if "dim_labels=" in before:
        _convolution(before, proto)
    if "window=" in before and (found := _WINDOW.search(before)):
        _window(found[1], proto.window)
    if "replica_groups=" in before:
        _groups(before, proto)
    if "source_target_pairs=" in before and (found := _PAIRS.search(before)):
        for source, target in _PAIR.findall(found[1]):
            proto.source_target_pairs.add(source=integer(source), target=integer(target))
    if "channel_id=" in before and (found := _CHANNEL.search(before)):
        proto.channel_id = integer(found[1])
    if "sharding=" in before and (found := _SHARDING.search(before)):
        _sharding(found[1], proto.sharding)
    if "frontend_attributes=" in before and (found := FRONTEND.search(before)):
        for key, value in _ATTRIBUTE.findall(found[1]):
            proto.frontend_attributes.map.add(key=key, value=unescaped(value[1:-1]) if value[0] == '"' else value)
    return proto


def split(attributes: str) -> tuple[str, str, str]:
    """The attributes of a line but for two, its metadata and its backend_config, each with the comma before it."""
    cut = attributes.find(", backend_config=")
    if cut < 0:
        before, config, after = attributes, "", ""
    else:
        end = _end_of_config(attributes, cut + len(", backend_config="))
        before, config, after = attributes[:cut], attributes[cut:end], attributes[end:]
    start = before.find(", metadata={")
    if start < 0:
        return before + after, "", config
    metadata = before[start:]
    if metadata.find("}, ") > 0 and (found := _METADATA.match(metadata)):
        after = metadata[found.end() :] + after
        metadata = found[0]
    return before[:start] + after, metadata, config


def _end_of_config(text: str, begin: int) -> int:
    """The end of a backend_config, in JSON or in quotes; mostly that of the line."""
    if text.startswith('"', begin):
        found = _QUOTED.match(text, begin)
        return found.end() if found else len(text)
    if text.find("}, ", begin) < 0:
        return len(text)
    depth = 0
    for found in _JSON.finditer(text, begin):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if not depth:
            return found.end()
    return len(text)


def _metadata(text: str, op_name: str, metadata: Any) -> None:
    metadata.op_name = op_name
    if found := _FRAME.search(text):
        metadata.stack_frame_id = min(integer(found[1]), _INT32)
    if "source_file=" in text and (found := _FILE.search(text)):
        metadata.source_file = unescaped(found[1][1:-1])
    if "source_line=" in text and (found := _LINE.search(text)):
        metadata.source_line = min(integer(found[1]), _INT32)


def _literal(shape: Shape, operands: str, literal: Any) -> None:
    """Integers of a scalar: what counts loops."""
    field = {"s32": "s32s", "s64": "s64s", "u32": "u32s", "u64": "u64s"}.get(shape.dtype)
    if field is None or shape.dims or not re.fullmatch(r"-?\d{1,20}", operands, re.A):
        return
    value, bits = int(operands), int(field[1:3])
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if field[0] == "s" else (0, 2**bits)
    if low <= value < high:
        getattr(literal, field).append(value)


def _dot(text: str, proto: Any, opcode: str) -> None:
    numbers = proto.dot_dimension_numbers
    if opcode == "ragged-dot":
        ragged = proto.ragged_dot_dimension_numbers
        numbers = ragged.dot_dimension_numbers
        for pattern, field in _RAGGED:
            if found := pattern.search(text):
                getattr(ragged, field).extend(integers(found[1]))
    for pattern, field in _CONTRACTED:
        if found := pattern.search(text):
            getattr(numbers, field).extend(integers(found[1]))


_LABELS = re.compile(r"dim_labels=([\w?]{1,30})_([\w?]{1,30})->([\w?]{1,30})")
_WINDOW = re.compile(r"\bwindow=\{([^}]*)\}")
_FEATURE_GROUPS = re.compile(r"\bfeature_group_count=(\d+)")
_BATCH_GROUPS = re.compile(r"\bbatch_group_count=(\d+)")


def _convolution(text: str, proto: Any) -> None:
    found = _LABELS.search(text)
    if not found:
        return
    numbers = proto.convolution_dimension_numbers
    left, kernel, out = found[1], found[2], found[3]
    for labels, batch, feature, spatial in (
        (left, "input_batch_dimension", "input_feature_dimension", "input_spatial_dimensions"),
        (out, "output_batch_dimension", "output_feature_dimension", "output_spatial_dimensions"),
    ):
        setattr(numbers, batch, max(0, labels.find("b")))
        setattr(numbers, feature, max(0, labels.find("f")))
        getattr(numbers, spatial).extend(_spatial(labels))
    numbers.kernel_input_feature_dimension = max(0, kernel.find("i"))
    numbers.kernel_output_feature_dimension = max(0, kernel.find("o"))
    numbers.kernel_spatial_dimensions.extend(_spatial(kernel))
    if found := _FEATURE_GROUPS.search(text):
        proto.feature_group_count = integer(found[1])
    if found := _BATCH_GROUPS.search(text):
        proto.batch_group_count = integer(found[1])


def _window(text: str, window: Any) -> None:
    """`size=3x3 stride=2x2 pad=1_1x1_1 lhs_dilate=2x2 rhs_dilate=1x1`, each with a part for each spatial dim."""
    given = {key: value.split("x") for key, _, value in (part.partition("=") for part in text.split())}
    for position, size in enumerate(given.get("size", ())):

        def part(key: str, missing: str, position: int = position) -> str:
            values = given.get(key, ())
            return values[position] if position < len(values) else missing

        low, _, high = part("pad", "0_0").partition("_")
        window.dimensions.add(
            size=_signed(size),
            stride=_signed(part("stride", "1")),
            base_dilation=_signed(part("lhs_dilate", "1")),
            window_dilation=_signed(part("rhs_dilate", "1")),
            padding_low=_signed(low),
            padding_high=_signed(high),
        )


def _signed(text: str) -> int:
    """A number that may be negative; 0 for what is none."""
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit()):
        return 0
    return -integer(digits) if text.startswith("-") else integer(digits)


def _spatial(labels: str) -> list[int]:
    return [labels.index(digit) for digit in sorted(letter for letter in labels if letter in "0123456789")]


_LITERAL = re.compile(r"replica_groups=\{((?:\{[\d, ]*\},?)*)\}")
_GROUP = re.compile(r"\{([\d, ]*)\}")
_MESH_AND_ORDER = r"mesh\[([^\]]*)\](?:, device_ids=\(((?:[^()]|\([^()]*\))*+)\))?"
_MESH = re.compile(rf"replica_groups={_MESH_AND_ORDER} *\{{([^}}]*)\}}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


def _groups(text: str, proto: Any) -> None:
    """Groups as a list, as rows of an iota, or as axes of a mesh. Many collectives share theirs, of many devices."""
    for pattern in (_IOTA, _MESH, _LITERAL):
        if found := pattern.search(text):
            proto.MergeFrom(_group_fields(found[0]))
            return


@lru_cache(maxsize=64)
def _group_fields(text: str) -> Any:
    proto = classes()["HloInstructionProto"]()
    if found := _IOTA.match(text):
        iota = proto.iota_collective_device_list
        iota.num_replica_groups, iota.num_devices_per_group = integer(found[1]), integer(found[2])
        _order(iota, found[3], found[4])
    elif found := _MESH.match(text):
        _mesh_groups(found, proto.mesh_axes_replica_group_list)
    else:
        for group in _GROUP.findall(_LITERAL.match(text)[1]):  # type: ignore[index]
            proto.collective_device_list.replica_groups.add(replica_ids=integers(group))
    return proto


def _order(iota: Any, dims: str, transposed: str | None) -> None:
    """`[2,4]T(1,0)`: a range reshaped and transposed; XLA writes no transpose that changes nothing."""
    iota.iota_reshape_dims.extend(integers(dims))
    order = integers(transposed) if transposed else range(len(iota.iota_reshape_dims))
    iota.iota_transpose_perm.extend(min(dim, _INT32) for dim in order)


def _mesh_groups(found: re.Match[str], groups: Any) -> None:
    names = _mesh(found[1], found[2], groups.mesh)
    _axes(found[3], names, groups.axes)


def _axes(text: str, names: list[str], axes: Any) -> None:
    """`'a','b':(2)4`: axes of a mesh, or the part of one that has 4 places, each 2 from the outside."""
    for part in filter(None, (axis.strip(" ?") for axis in text.split(","))):
        name, _, sub = part.replace("'", "").replace('"', "").partition(":")
        axis = axes.add(mesh_axis_index=names.index(name) if name in names else len(names))
        if sub:
            before, size = (*integers(sub), 0, 0)[:2]
            axis.sub_axis_info.pre_size, axis.sub_axis_info.size = before, size


def _mesh(text: str, order: str | None, mesh: Any) -> list[str]:
    """`'a'=2,'b'=4`: names and sizes of axes, and the order of devices if it is none of 0, 1, ... Gives the names."""
    names = []
    if order and (iota := re.match(r"(?:<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?$", order)):
        mesh.iota_transform.reshape_dims.extend(integers(iota[1]))
        mesh.iota_transform.transpose_perm.extend(integers(iota[2] or ""))
    elif order:
        mesh.device_ids.extend(integers(order))
    for part in filter(None, text.split(",")):
        name, _, size = part.rpartition("=")
        names.append(name.strip(" '\""))
        mesh.axes.add(name=names[-1], size=_signed(size.strip()))
    return names


_KINDS = {"replicated": 0, "maximal": 1, "manual": 4, "unknown": 5, "unreduced": 6}
_TILED = re.compile(r"\{devices=\[([\d,]+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]*))")
_LAST = re.compile(r"last_tile_dims=\{([\w, ]*)\}")
_NAMED = re.compile(rf"\{{{_MESH_AND_ORDER}(?:, \[(.*?)\])?")
_BRACES = re.compile(r"\{([^{}]*)\}")
_PART = re.compile(_BRACED)


def _sharding(text: str, sharding: Any) -> None:
    """Of one array, or of each array of a tuple."""
    if text.startswith("{{"):
        sharding.type = 2
        for part in _PART.findall(text[1:-1]):
            _sharding(part, sharding.tuple_shardings.add())
        return
    if found := _NAMED.match(text):
        named = sharding.named_sharding
        named.mesh.SetInParent()
        names = _mesh(found[1], found[2], named.mesh)
        for dim in _BRACES.findall(found[3] or ""):
            _axes(dim, names, named.dim_shardings.add().axes)
        return
    word = re.match(r"\{([a-z]+)", text)
    if word and word[1] in _KINDS:
        sharding.type = _KINDS[word[1]]
        if word[1] == "maximal":
            sharding.tile_assignment_devices.extend(integers(text)[:1])
        return
    sharding.type = 3
    if found := _TILED.match(text):
        sharding.tile_assignment_dimensions.extend(integers(found[1]))
        if found[2]:
            _order(sharding, found[2], found[3])
        sharding.tile_assignment_devices.extend(integers(found[4] or ""))
    sharding.replicate_on_last_tile_dim = "last_tile_dim_replicate" in text
    if found := _LAST.search(text):
        sharding.last_tile_dims.extend(_KINDS.get(word.strip(), 0) for word in found[1].split(","))
