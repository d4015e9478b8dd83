"""A text gives the graph that the proto of the same program gives."""

from __future__ import annotations

import json
import re

import pytest
from jaxlib import _hlo

from jaxllm.hlo.attributes import unescaped
from jaxllm.hlo.emitted import emitted_payload
from jaxllm.hlo.errors import ParseError
from jaxllm.hlo.flops import matmul_lines
from jaxllm.hlo.graph import Computation, Instruction, Module
from jaxllm.hlo.groups import groups_of, pairs_of
from jaxllm.hlo.loops import executions, trip_count
from jaxllm.hlo.read import read_bytes
from tests.hlo.dumps import PROGRAMS, dumped

# Fields of the proto that measuring reads, for which a text must say as much.
FIELDS = (
    "parameter_number", "fusion_kind", "tuple_index", "dimensions", "feature_group_count", "batch_group_count",
    "channel_id", "custom_call_target", "comparison_direction", "sharding", "source_target_pairs",
    "frontend_attributes",
    "collective_device_list", "iota_collective_device_list", "mesh_axes_replica_group_list",
)  # fmt: skip
DOT = ("lhs_contracting_dimensions", "rhs_contracting_dimensions", "lhs_batch_dimensions")
RAGGED = ("lhs_ragged_dimensions", "rhs_group_dimensions")
PLACE = ("size", "stride", "padding_low", "padding_high", "window_dilation", "base_dilation")


def facts(module: Module, *, elements: bool = True) -> dict[str, dict[str, tuple]]:
    """By the names of computations and instructions: everything that one form says and the other must. The names of
    computations that a text leaves out, those of asynchronous calls, are left out; without `elements` also those
    instructions that only take an element of a tuple, which some texts write as `tuple#2`."""
    known: dict[str, dict[str, tuple]] = {}
    for computation in module.computations.values():
        if computation.name.startswith("async_"):
            continue
        inside = known[computation.name] = {}
        for instruction in computation.instructions:
            if elements or instruction.opcode != "get-tuple-element":
                inside[instruction.name] = facts_of(module, computation, instruction, elements)
        inside["ROOT"] = (name_of(computation, computation.root, elements), computation is module.entry)
    return known


def name_of(computation: Computation, instruction: Instruction, elements: bool) -> str:
    if elements or instruction.opcode != "get-tuple-element":
        return instruction.name
    return f"{name_of(computation, computation.operand(instruction), elements)}#{instruction.proto.tuple_index}"


def facts_of(module: Module, computation: Computation, instruction: Instruction, elements: bool) -> tuple:
    operands = tuple(name_of(computation, operand, elements) for operand in computation.operands(instruction))
    called = tuple(c.name if not c.name.startswith("async_") else "" for c in module.called(instruction))
    proto = instruction.proto
    dot, ragged = proto.dot_dimension_numbers, proto.ragged_dot_dimension_numbers
    numbers = tuple(
        tuple(getattr(owner, field))
        for owner, fields in ((dot, DOT), (ragged.dot_dimension_numbers, DOT), (ragged, RAGGED))
        for field in fields
    )
    window = tuple(tuple(getattr(place, field) for field in PLACE) for place in proto.window.dimensions)
    return (
        instruction.opcode, instruction.shape, instruction.op_name, operands, called, module.source(instruction),
        numbers, window, str(proto.convolution_dimension_numbers), config(proto.backend_config),
        tuple(str(getattr(proto, name)) for name in FIELDS),
    )  # fmt: skip


def config(text: bytes) -> object:
    """Newer compilers sort the keys in one form and not in the other."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def totals(module: Module) -> tuple[dict, dict]:
    runs = executions(module)
    lines, _ = matmul_lines(module, runs)
    return {line.key: (line.value, line.count) for line in lines}, emitted_payload(module, runs, {"all": 8})


def read(data: bytes | str) -> Module:
    return read_bytes(data.encode() if isinstance(data, str) else data, "x").module


def reference(text: str) -> Module:
    """The module as XLA's own parser reads the text."""
    return read(_hlo.hlo_module_from_text(text).as_serialized_hlo_module_proto())


SHORT = re.compile(rb"%[\w.\-]+#\d")  # an element of a tuple


def order(module: Module) -> list[str]:
    return [i.name for i in module.entry.instructions if i.opcode != "get-tuple-element"]


@pytest.mark.parametrize(("name", "target"), PROGRAMS)
def test_text_and_proto_of_a_program_are_one_graph(name: str, target: str) -> None:
    of = dumped(name, target)
    proto = read(of.proto)
    printed = of.files[of.name.replace(".hlo.pb", ".txt")]
    for text in (printed, of.printed(), of.printed(print_percent=False), of.printed(print_operand_shape=True)):
        module, elements = read(text), not SHORT.search(text)
        if (name, target) == ("ring", "gpu") and b"async-start(" not in text:
            # Of several arrays, a short form of async-start reads like the opcode that permutes have of their own.
            assert totals(module) == totals(proto)
            continue
        assert facts(module, elements=elements) == facts(proto, elements=elements)
        assert order(module) == order(proto)
        assert (module.aliases, module.scheduled) == (proto.aliases, proto.scheduled)
    module = read(printed)
    assert (module.name, module.devices, str(module.frames)) == (proto.name, proto.devices, str(proto.frames))
    assert totals(module) == totals(proto)
    assert totals(read(of.text))[0] == totals(proto)[0]


@pytest.mark.parametrize(("name", "target"), [("experts", "gpu"), ("ring", "tpu"), ("unet", "cpu")])
def test_long_and_short_forms(name: str, target: str) -> None:
    of = dumped(name, target)
    proto = facts(read(of.proto))
    for options in (
        {"print_percent": False, "print_operand_shape": True},
        {"print_percent": False, "print_program_shape": False},
        {"print_large_constants": True},
    ):
        assert facts(read(of.printed(**options))) == proto, options
    bare = read(of.printed(print_metadata=False, print_backend_config=False, include_layout_in_shapes=False))
    assert {name: list(inside) for name, inside in facts(bare).items()} == {n: list(i) for n, i in proto.items()}


def program(line: str, *, before: str = "", parameter: str = "f32[8,8]", root: str = "", devices: int = 8) -> str:
    """A text with one instruction of interest, called `it`, of the parameter `x`."""
    return f"""HloModule small, is_scheduled=true, num_partitions={devices}

%sum (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}}
{before}
ENTRY %main {{
  %x = {parameter} parameter(0)
  {line}
  {root or "ROOT %end = () tuple()"}
}}
"""


def it(module: Module) -> Instruction:
    return next(i for i in module.entry.instructions if i.name == "it")


GROUPS = {
    "{{0,1},{2,3},{4,5},{6,7}}": ((0, 1), (2, 3), (4, 5), (6, 7)),
    "{{0,2,4,6},{7,5,3,1}}": ((0, 2, 4, 6), (7, 5, 3, 1)),
    "{}": (tuple(range(8)),),
    "[2,4]<=[8]": ((0, 1, 2, 3), (4, 5, 6, 7)),
    "[4,2]<=[2,4]T(1,0)": ((0, 4), (1, 5), (2, 6), (3, 7)),
    "[2,4]<=[2,2,2]T(1,0,2)": ((0, 1, 4, 5), (2, 3, 6, 7)),
    "mesh['a'=2,'b'=4] {'b'}": ((0, 1, 2, 3), (4, 5, 6, 7)),
    "mesh['a'=2,'b'=4] {'a'}": ((0, 4), (1, 5), (2, 6), (3, 7)),
    "mesh['a'=2,'b'=4] {'a','b'}": (tuple(range(8)),),
    "mesh['a'=2,'b'=4] {'b','a'}": ((0, 4, 1, 5, 2, 6, 3, 7),),
    "mesh['a'=8] {'a':(2)4}": ((0, 1, 2, 3), (4, 5, 6, 7)),
    "mesh['a'=8] {'a':(1)2}": ((0, 4), (1, 5), (2, 6), (3, 7)),
    "mesh['a'=8] {'a':(2)2}": ((0, 2), (1, 3), (4, 6), (5, 7)),
    "mesh['a'=2,'b'=4], device_ids=(7,6,5,4,3,2,1,0) {'b'}": ((7, 6, 5, 4), (3, 2, 1, 0)),
    "mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b'}": ((0, 4, 1, 5), (2, 6, 3, 7)),
}


@pytest.mark.parametrize("groups", GROUPS)
def test_every_form_of_replica_groups(groups: str) -> None:
    text = program(
        f"%it = f32[8,8] all-reduce(%x), channel_id=1, replica_groups={groups}, use_global_device_ids=true, "
        "to_apply=%sum"
    )
    module = read(text)
    assert groups_of(it(module), 8) == GROUPS[groups]
    known = it(reference(text))
    assert groups_of(known, 8) == GROUPS[groups]
    fields = ("collective_device_list", "iota_collective_device_list", "mesh_axes_replica_group_list")
    for field in fields:
        assert str(getattr(it(module).proto, field)) == str(getattr(known.proto, field))


SMALL = {
    "all-to-all": program(
        "%it = ((f32[8,8]), f32[8,8], u32[]) all-to-all-start(%x), channel_id=1, replica_groups=[1,8]<=[8], "
        "dimensions={0}",
        root="ROOT %end = f32[8,8] all-to-all-done(%it)",
    ),
    "reduce-scatter": program(
        "%it = ((f32[8,8]), f32[1,8]) reduce-scatter-start(%x), channel_id=1, replica_groups=[1,8]<=[8], "
        "dimensions={0}, to_apply=%sum",
        root="ROOT %end = f32[1,8] reduce-scatter-done(%it)",
    ),
    "fusion": program(
        "%it = ((f32[8,8]), f32[8,8], s32[]) fusion-start(%x), kind=kLoop, calls=%double, "
        'metadata={op_name="jit(f)/add"}',
        before="""
%double (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8] parameter(0)
  ROOT %twice = f32[8,8] add(%p, %p)
}
""",
        root="ROOT %end = f32[8,8] fusion-done(%it)",
    ),
    "update": program(
        "%it = ((f32[8,8]), f32[4,8], s32[]) slice-start(%x), slice={[0:4], [0:8]}\n"
        "  %on = ((f32[8,8]), f32[4,8], s32[]) slice-update(%it)",
        root="ROOT %end = f32[4,8] slice-done(%on)",
    ),
    "loop": program(
        "%it = (s32[], f32[8,8]) while(%state), condition=%less, body=%more",
        before="""
%more (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[], f32[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %y = f32[8,8] get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], f32[8,8]) tuple(%next, %y)
}

%less (q: (s32[], f32[8,8])) -> pred[] {
  %q = (s32[], f32[8,8]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %seven = s32[] constant(7)
  ROOT %c = pred[] compare(%j, %seven), direction=LT
}
""",
    ).replace("  %it =", "  %zero = s32[] constant(0)\n  %state = (s32[], f32[8,8]) tuple(%zero, %x)\n  %it ="),
    "permute": program("%it = f32[8,8] collective-permute(%x), channel_id=2, source_target_pairs={{0,1},{1,2},{7,0}}"),
    "convolution": program(
        "%it = f32[2,6,6,8] convolution(%x, %k), window={size=3x3 stride=1x2 pad=0_0x-1_7 rhs_dilate=1x2}, "
        "dim_labels=b01f_01io->b01f, feature_group_count=2",
        parameter="f32[2,8,10,4]",
    ).replace("  %it =", "  %k = f32[3,3,2,8] constant({...})\n  %it ="),
    "conditional": program(
        "%it = f32[8,8] conditional(%w, %x, %x), branch_computations={%one, %two}",
        before="""
%one (p: f32[8,8]) -> f32[8,8] {
  ROOT %p = f32[8,8] parameter(0)
}

%two (q: f32[8,8]) -> f32[8,8] {
  %q = f32[8,8] parameter(0)
  ROOT %n = f32[8,8] negate(%q)
}
""",
    ).replace("  %it =", "  %w = s32[] constant(1)\n  %it ="),
    "choice": program(
        "%it = f32[8,8] conditional(%w, %x, %x), true_computation=%one, false_computation=%two",
        before="""
%one (p: f32[8,8]) -> f32[8,8] {
  ROOT %p = f32[8,8] parameter(0)
}

%two (q: f32[8,8]) -> f32[8,8] {
  %q = f32[8,8] parameter(0)
  ROOT %n = f32[8,8] negate(%q)
}
""",
    ).replace("  %it =", "  %w = pred[] constant(true)\n  %it ="),
    "constants": program(
        "%it = f32[8,8] add(%x, %x)\n  %nested = s32[2,2] constant({ {1, -2}, {3, 4} })\n"
        "  %pair = (f32[], s32[]) constant((1.5, 7))\n  %big = u64[] constant(18446744073709551615)\n"
        "  %no = f32[8] constant({1, nan, inf, -inf, 1e-30, 0.5, 2, 3})"
    ),
    "quotes": program(
        r'%it = f32[8,8] custom-call(%x), custom_call_target="say(\"hi\", {)", '
        r'metadata={op_name="jit(f)/\"quoted\", {brace}/tab\there/na\303\257ve" source_file="/a/\"b\".py" '
        r"source_line=7}, "
        r'backend_config="free {text} with \"quotes\""'
    ),
    "unicode": program(
        '%it = f32[8,8] negate(%x), metadata={op_name="jit(f)/größe/注意" source_file="é.py" source_line=3}'
    ),
    "space": program("%it = f32[8,8]{1,0:T(8,128)(2,1)S(5)} copy(%x)"),
    "sharded": program(
        "%copy0 = f32[8,8] copy(%x), sharding={devices=[2,4]<=[8]}\n"
        "  %copy1 = f32[8,8] copy(%x), sharding={devices=[4,2]<=[2,4]T(1,0)}\n"
        "  %copy2 = f32[8,8] copy(%x), sharding={devices=[2,1,4]<=[8] last_tile_dim_replicate}\n"
        "  %copy3 = f32[8,8] copy(%x), sharding={devices=[2,1,2,2]<=[8] last_tile_dims={manual, replicated}}\n"
        "  %copy4 = f32[8,8] copy(%x), sharding={devices=[2,4]0,2,4,6,1,3,5,7}\n"
        "  %copy5 = f32[8,8] copy(%x), sharding={maximal device=3}\n"
        "  %copy6 = f32[8,8] copy(%x), sharding={manual}\n"
        "  %it = (f32[8,8], f32[8,8]) tuple(%x, %x), sharding={{replicated}, {devices=[1,8]<=[8]}}"
    ),
    "token": program(
        "%t = token[] after-all()\n  %it = (f32[8,8], u32[], token[]) send(%x, %t), channel_id=1, "
        'frontend_attributes={_xla_send_recv_source_target_pairs="{{0,1},{1,2}}"}\n'
        "  %d = token[] send-done(%it), channel_id=1"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_a_small_text_is_what_xla_s_own_parser_reads(name: str) -> None:
    module, known = read(SMALL[name]), reference(SMALL[name])
    assert facts(module).keys() == facts(known).keys()
    for computation, instructions in facts(known).items():
        for instruction, expected in instructions.items():
            found = facts(module)[computation][instruction]
            for mine, theirs in zip(found, expected, strict=True):
                assert without_layout(mine) == without_layout(theirs), (computation, instruction)


@pytest.mark.parametrize("name", SMALL)
def test_elements_of_tuples_may_stand_for_instructions(name: str) -> None:
    text = SMALL[name]
    module = read(text)
    for computation in module.computations.values():
        for instruction in computation.instructions:
            if instruction.opcode == "get-tuple-element" and instruction is not computation.root:
                short = name_of(computation, instruction, False)
                text = re.sub(rf"\n  %{re.escape(instruction.name)} = .*", "", text)
                text = re.sub(rf"%{re.escape(instruction.name)}(?=[,)])", f"%{short}", text)
    assert facts(read(text), elements=False) == facts(module, elements=False)


def without_layout(fact: object) -> object:
    """XLA gives an array without a layout the usual one."""
    return str(fact) if not isinstance(fact, (str, tuple, bool)) else fact


def test_what_the_small_texts_say() -> None:
    start = it(read(SMALL["fusion"]))
    module = read(SMALL["fusion"])
    (inside,) = module.called(it(module))
    assert (start.opcode, inside.root.opcode, inside.root.op_name) == ("async-start", "fusion", "jit(f)/add")
    assert [c.name for c in module.called(inside.root)] == ["double"]
    module = read(SMALL["all-to-all"])
    (inside,) = module.called(it(module))
    assert groups_of(inside.root, 8) == (tuple(range(8)),)
    module = read(SMALL["loop"])
    assert trip_count(module, module.entry, it(module)) == 7
    assert it(read(SMALL["unicode"])).op_name == "jit(f)/größe/注意"
    assert read(SMALL["unicode"]).source(it(read(SMALL["unicode"]))) == "é.py:3"
    quoted = it(read(SMALL["quotes"]))
    assert quoted.op_name == 'jit(f)/"quoted", {brace}/tab\there/naïve'
    assert quoted.proto.custom_call_target == 'say("hi", {)'
    assert quoted.proto.backend_config == b'free {text} with "quotes"'
    assert pairs_of(it(read(SMALL["permute"]))) == ((0, 1), (1, 2), (7, 0))
    assert pairs_of(it(read(SMALL["token"]))) == ((0, 1), (1, 2))
    shape = it(read(SMALL["space"])).shape
    assert (shape.tiles, shape.memory_space, shape.minor_to_major) == (((8, 128), (2, 1)), 5, (1, 0))


def test_a_sharding_by_axes_of_a_mesh() -> None:
    forms = {
        "{mesh['a'=2,'b'=4], [{'a'}, {}]}": [[(0, 0, 0)], []],
        "{mesh['a'=2,'b'=4], [{}, {'b':(2)2, ?}], replicated={'a'}}": [[], [(1, 2, 2)]],
        "{mesh['a'=2,'b'=4], [{'b','a'}, {}]}": [[(1, 0, 0), (0, 0, 0)], []],
        "{mesh['a'=2,'b'=4], replicated}": [],
        "{mesh[], replicated}": [],
    }
    for text, expected in forms.items():
        named = it(read(program(f"%it = f32[8,8] copy(%x), sharding={text}"))).proto.sharding.named_sharding
        found = [
            [(a.mesh_axis_index, a.sub_axis_info.pre_size, a.sub_axis_info.size) for a in dim.axes]
            for dim in named.dim_shardings
        ]
        assert found == expected, text
        sizes = [("a", 2), ("b", 4)] if "'a'" in text else []
        assert named.HasField("mesh") and [(axis.name, axis.size) for axis in named.mesh.axes] == sizes
    turned = "{mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)), [{'a'}, {}]}"
    mesh = it(read(program(f"%it = f32[8,8] copy(%x), sharding={turned}"))).proto.sharding.named_sharding.mesh
    assert (list(mesh.iota_transform.reshape_dims), list(mesh.iota_transform.transpose_perm)) == ([4, 2], [1, 0])


def test_a_configuration_over_several_lines() -> None:
    text = program(
        '%it = f32[8,8] custom-call(%x), custom_call_target="k", metadata={op_name="f"}, backend_config='
        '{"custom_call_config": {"body": "TUx7",\n"cost_estimate": {\n"flops":8192,\n"transcendentals":0\n}, "x": [1]}}'
    )
    assert it(read(text)).proto.backend_config.count(b"\n") == 4
    assert it(read(text)).op_name == "f"
    with pytest.raises(ParseError, match="line 11, byte .*a brace of this line is never closed"):
        read(text.replace("}, \"x\": [1]}}", ""))


def test_computations_in_any_order() -> None:
    text = SMALL["loop"]
    head, tables, *computations = text.split("\n\n")
    body = next(c for c in computations if "%more" in c.splitlines()[0] or "%more" in c.splitlines()[1])
    entry = next(c for c in computations if "ENTRY" in c)
    others = [c for c in (tables, *computations) if c not in (body, entry)]
    turned = read("\n\n".join((head, entry.strip(), body.strip(), *others)))
    order = [computation.name for computation in turned.computations.values()]
    assert order.index("more") < order.index("main") and order.index("less") < order.index("main")
    assert facts(turned) == facts(read(text))


def test_windows_line_ends_and_comments() -> None:
    text = program("%it = f32[8,8] add(%x, %x), metadata={op_name=\"a\"}")
    turned = "// made by hand\n\n" + text.replace("\n", "\r\n")
    assert facts(read(turned)) == facts(read(text))


@pytest.mark.parametrize(
    ("text", "plain"),
    [(r"a\"b", 'a"b'), (r"\\", "\\"), (r"\n\t\r", "\n\t\r"), (r"\303\251", "é"), (r"\xc3\xa9", "é"), ("plain",) * 2],
)
def test_escapes(text: str, plain: str) -> None:
    assert unescaped(text) == plain
