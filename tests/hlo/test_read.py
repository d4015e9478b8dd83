"""Programs out of files: which form, whose compiler; and what is wrong with a file, and where."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxllm.hlo.errors import ParseError
from jaxllm.hlo.protos import classes
from jaxllm.hlo.read import read_bytes, read_file
from jaxllm.hlo.wire import broken, fields
from jaxllm.spec.errors import SpecError
from tests.hlo.dumps import PROGRAMS, TARGETS, dumped
from tests.hlo.test_text import SMALL, program


def error(data: bytes | str, name: str = "x", **options: Any) -> ParseError:
    """The error of reading, which is one sentence with a place inside of the file."""
    data = data.encode() if isinstance(data, str) else data
    with pytest.raises(ParseError) as caught:
        read_bytes(data, name, **options)
    found = caught.value
    text = str(found)
    assert 0 <= found.offset <= len(data)
    assert "\n" not in text and text.endswith(".") and len(text) < 500
    assert text.startswith(f"{name}: ") and f"byte {found.offset:,}: " in text
    assert found.line == (data.count(b"\n", 0, found.offset) + 1 if found.line else 0)
    return found


# ---- forms and targets ----


@pytest.mark.parametrize(("name", "target"), PROGRAMS)
def test_three_forms_of_a_program(name: str, target: str, tmp_path: Path) -> None:
    of = dumped(name, target)
    path = tmp_path / of.name
    path.write_bytes(of.proto)
    whole = read_file(path, scheduled=True)
    assert (whole.form, whole.target, whole.module.scheduled) == ("HloProto", target, True)
    assert len(whole.buffers.buffer_allocations) > 0
    alone = read_bytes(of.module, "module")
    assert (alone.form, alone.buffers, alone.module.scheduled) == ("HloModuleProto", None, True)
    text = read_bytes(of.text, "text", scheduled=True)
    assert (text.form, text.buffers) == ("text", None)
    # A small program of XLA:CPU has no mark of it; nothing is ever told to be another's.
    told = {alone.target, text.target, read_bytes(of.printed(), "x").target}
    assert told <= {target, ""} and (target == "cpu" or told == {target})


def test_the_executable_of_any_backend_gives_its_module() -> None:
    compiled = jax.jit(lambda x: (x @ x).sum()).lower(jax.ShapeDtypeStruct((8, 8), "float32")).compile()
    data = compiled.runtime_executable().hlo_modules()[0].as_serialized_hlo_module_proto()
    found = read_bytes(data, "compiled")
    assert (found.form, found.module.scheduled) == ("HloModuleProto", True)
    assert {i.opcode for _, i in found.module.instructions()} >= {"parameter", "reduce"}


@pytest.mark.parametrize("target", TARGETS)
def test_every_file_of_a_dump_is_a_module_or_an_error_that_says_what_to_take(target: str) -> None:
    of = dumped("unet", target)
    modules = re.compile(r"\.hlo\.pb$|(after|before)_\w+(-partitioning|-inliner|-rewriter)?\.txt$|_partitioner\.txt$")
    others = 0
    for name, data in of.files.items():
        if modules.search(name) and b"HloModule " in data[:100] or name.endswith(".hlo.pb"):
            assert read_bytes(data, name).target in (target, "")
            continue
        others += 1
        found = error(data, name)
        assert found.offset == 0 and "take " in str(found)
        if "after_optimizations-" in name:
            instead = name.split("after_optimizations-")[0] + "after_optimizations.hlo.pb"
            assert f"take {instead}," in str(found) and instead == of.name
    assert others >= 6


def test_a_module_without_a_schedule_may_be_refused() -> None:
    of = dumped("cnn", "cpu")
    given = next(data for name, data in of.files.items() if name.endswith("before_optimizations.hlo.pb"))
    assert not read_bytes(given, "given").module.scheduled
    for data in (given, next(data for name, data in of.files.items() if name.endswith("before_optimizations.txt"))):
        assert re.search("has no schedule.*take .*after_optimizations.hlo.pb", str(error(data, scheduled=True)))


# ---- files that are none ----


def test_a_path_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"nothing\.pb: there is no such file; take "):
        read_file(tmp_path / "nothing.pb")
    with pytest.raises(SpecError, match="this is a folder; name one file"):
        read_file(tmp_path)
    (tmp_path / "module_0001.f.cpu_after_optimizations.hlo.pb").write_bytes(b"12")
    (tmp_path / "module_0002.g.cpu_after_optimizations.hlo.pb").write_bytes(b"1")
    with pytest.raises(SpecError, match=r"name a file of it, as module_0001\.f\.cpu_after_optimizations\.hlo\.pb\.$"):
        read_file(tmp_path)
    with pytest.raises(SpecError, match=r"cannot be read \(File name too long\)"):
        read_file(tmp_path / ("x" * 300))
    with pytest.raises(SpecError, match="cannot be read .*null"):
        read_file("a\0b")
    with pytest.raises(SpecError, match="this is a device and no file, and may have no end; take"):
        read_file("/dev/zero")
    with pytest.raises(SpecError, match="cannot be read"):
        read_file(tmp_path / "module_0002.g.cpu_after_optimizations.hlo.pb" / "inside")


NOTHING = {
    "empty": (b"", "the file is empty; dump it again"),
    "text": (b"hello\nworld\n", "this is no HLO: a text of it begins with HloModule"),
    "json": (b'{"a": 1}', "this is no HLO"),
    "zeros": (bytes(100), "this is no HLO"),
    "gzip": (b"\x1f\x8b\x08\x00", "compressed by gzip; unpack it"),
    "mlir": (b"module @jit_f {\n  func.func public @main", "other MLIR, which XLA has not compiled yet; take"),
    "bytecode": (b"ML\xefR\x00", "StableHLO or other MLIR"),
    "pbtxt": (b'hlo_module {\n  name: "f"\n', "an HloProto as text of protobuf"),
    "assignment": (b"BufferAssignment:\nallocation 0: ", "a buffer assignment as text"),
    "header": (b"HloModule jit_f, is_scheduled=true\n\n", "the text ends without an ENTRY"),
    "nameless": (b"HloModule \n", "the module has no name"),
    "another proto": (b"\x0a\x03abc\x12\x02\x08\x01", "a proto without a module of HLO in it"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_is_no_program(name: str) -> None:
    data, reason = NOTHING[name]
    assert reason in str(error(data))


def test_stablehlo_of_a_program() -> None:
    assert "take *after_optimizations.hlo.pb of a dump" in str(error(dumped("cnn", "cpu").files["lowered.mlir"]))


def test_protos_of_something_else() -> None:
    messages = classes()
    frames = messages["StackFrameIndexProto"](file_names=["a.py", "b.py"])
    buffers = messages["HloProto"](buffer_assignment=messages["BufferAssignmentProto"]())
    buffers.buffer_assignment.logical_buffers.add(id=1, size=8)
    empty = messages["HloProto"](hlo_module=messages["HloModuleProto"](name="jit_f"))
    for proto in (empty, messages["HloModuleProto"](name="jit_f")):
        assert "a proto without a module of HLO in it" in str(error(proto.SerializeToString()))
    for proto in (frames, buffers):
        assert re.search("without a module of HLO in it|this is no HLO", str(error(proto.SerializeToString())))


# ---- where a proto breaks ----


@pytest.mark.parametrize("target", TARGETS)
def test_a_cut_proto_says_where_it_ends(target: str) -> None:
    of = dumped("decode", target)
    for data in (of.proto, of.module):
        # What ends between two fields is a shorter message and not a cut one: no reader can tell.
        whole = {end for _, _, _, end in fields(data, 0, len(data))}
        for length in range(100, len(data) - 1, len(data) // 37):
            if length in whole:
                continue
            found = error(data[:length])
            # a number of up to ten bytes that is cut shows where it begins
            assert length - 10 <= found.offset <= length or data is of.module, str(found)


@pytest.mark.parametrize("target", TARGETS)
def test_a_dump_that_ends_before_its_buffers_is_a_module_without_them(target: str) -> None:
    data = dumped("decode", target).proto
    (end,) = (end for number, _, _, end in fields(data, 0, len(data)) if number == 1)
    assert end < len(data)
    found = read_bytes(data[:end], "x")
    assert (found.form, found.buffers) == ("HloProto", None)


def test_the_byte_at_which_a_proto_breaks() -> None:
    data = dumped("decode", "cpu").proto
    name = next(i.name for _, i in read_bytes(data, "x").module.instructions() if i.opcode == "while").encode()
    place = data.index(b"\x0a" + bytes([len(name)]) + name) + 2
    assert data[place:].startswith(name)
    wrong = data[: place + 1] + b"\xff" + data[place + 2 :]
    found = error(wrong)
    assert found.offset == place + 1
    assert "the name is no text of UTF-8 (in HloProto.hlo_module.computations.instructions)" in str(found)
    wrong = data[: place - 1] + b"\x7f" + data[place:]  # its length
    assert place - 2 <= error(wrong).offset <= place + 130


def test_what_the_wire_form_may_not_be() -> None:
    assert broken(b"\x00\x00", "HloProto").reason.startswith("there is no field 0")
    assert broken(b"\x0e\x00", "HloProto").reason.startswith("hlo_module has no type that a proto has")
    assert broken(b"\x08" + b"\xff" * 11, "HloProto").reason.startswith("a number goes on for more than 10 bytes")
    assert broken(b"\x0a\x05ab", "HloProto").reason == "hlo_module wants 5 bytes, and 2 are left (in HloProto)"
    assert (broken(b"\x0b\x08\x01", "HloProto").offset, broken(b"\x0b\x14", "HloProto").offset) == (3, 1)
    deep = b"\x10\x0b"  # element_type f32
    for _ in range(150):
        deep = b"\x22" + classes()["StackFrame"](file_location_id=len(deep)).SerializeToString()[1:] + deep
    reason = broken(deep, "ShapeProto").reason
    assert reason.startswith("messages lie more than 100 deep") and len(reason) < 200


# ---- what a module must be, told at an instruction of a proto ----


def damaged(change: Callable[[Any, Any], None], opcode: str) -> tuple[bytes, str]:
    """A dump in which one instruction of an opcode has been changed, and the instruction's name."""
    proto = classes()["HloProto"].FromString(dumped("scan_in_scan", "cpu").proto)
    for computation in proto.hlo_module.computations:
        for instruction in computation.instructions:
            if instruction.opcode == opcode:
                change(proto, instruction)
                return proto.SerializeToString(), instruction.name
    raise AssertionError(opcode)


def put(path: str, value: Any) -> Callable[[Any, Any], None]:
    """Sets a field of the instruction, or the first element of one that is repeated."""

    def change(proto: Any, instruction: Any) -> None:
        *parts, last = path.split(".")
        for part in parts:
            instruction = getattr(instruction, part)
        if isinstance(value, list):
            del getattr(instruction, last)[:]
            getattr(instruction, last).extend(value)
        else:
            setattr(instruction, last, value)

    return change


DAMAGED = {
    "operand": ("add", put("operand_ids", [1 << 40]), "an operand of .* is not defined before it"),
    "operands": ("dot", put("operand_ids", []), "has 0 operands, and dot takes 2 or more"),
    "element": ("get-tuple-element", put("tuple_index", 77), "takes element 77 of a tuple of"),
    "negative element": ("get-tuple-element", put("tuple_index", -1), "takes element -1 of a tuple"),
    "called": ("fusion", put("called_computation_ids", [1 << 40]), "calls a computation 1099511627776, which"),
    "uncalled": ("fusion", put("called_computation_ids", []), "calls 0 computations, and fusion calls 1"),
    "loop": ("while", put("called_computation_ids", []), "calls 0 computations, and a loop has a body and a condition"),
    "trips": ("while", put("backend_config", b'{"known_trip_count":{"n":"x"}}'), "whose known_trip_count is no number"),
    "contracted": ("dot", put("dot_dimension_numbers.lhs_contracting_dimensions", [9]), r"contracts dims \[9\] and"),
    "batch": ("dot", put("dot_dimension_numbers.lhs_batch_dimensions", [-1]), "contracts dims"),
    "type": ("add", put("shape.element_type", 99), "has elements of a type, number 99, that is not known here"),
    "dims": ("dot", put("shape.dimensions", [-4, 4]), r"has a shape that no array has, f32\[-4,4\]"),
    "many": ("dot", put("shape.dimensions", [1 << 40, 1 << 40]), "has a shape that no array has"),
    "layout": ("dot", put("shape.layout.minor_to_major", [0, 0]), "has a layout that is none of f32"),
    "space": ("dot", put("shape.layout.memory_space", -1), "has a memory space of -1"),
    "alignment": ("dot", put("shape.layout.tail_padding_alignment_in_elements", -8), "has tiles that no layout has"),
    "parameter": ("parameter", put("parameter_number", 44), "are not numbered from 0 on"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_told_at_the_instruction_s_name(name: str) -> None:
    opcode, change, reason = DAMAGED[name]
    data, instruction = damaged(change, opcode)
    found = error(data)
    assert re.search(reason, str(found)), str(found)
    if name != "parameter":
        assert data[found.offset :].startswith(instruction.encode())
        assert f": {instruction} " in str(found) or f" of {instruction} " in str(found)


def test_a_name_from_a_damaged_file_is_shown_in_one_line() -> None:
    def renamed(proto: Any, instruction: Any) -> None:
        instruction.name = "first line\nsecond\x1b[31m" + "x" * 5000
        del instruction.operand_ids[:]

    data, _ = damaged(renamed, "dot")
    text = str(error(data))
    assert "first line?second?[31mxxx" in text and text.endswith("dump the program again.")


def test_the_tables_of_a_module() -> None:
    of = dumped("scan_in_scan", "cpu")

    def changed(change: Callable[[Any], None]) -> str:
        proto = classes()["HloProto"].FromString(of.proto)
        change(proto.hlo_module)
        return str(error(proto.SerializeToString()))

    def first_called_like_second(module: Any) -> None:
        module.computations[0].id = module.computations[1].id

    def same_id(module: Any) -> None:
        module.computations[0].instructions[0].id = module.computations[1].instructions[0].id

    def backwards(module: Any) -> None:
        longest = max(module.schedule.sequences, key=lambda sequence: len(sequence.value.instruction_ids))
        longest.value.instruction_ids.reverse()

    expected: dict[str, Callable[[Any], Any]] = {
        "has no computation 12345, which is said to be its entry": lambda m: setattr(m, "entry_computation_id", 12345),
        "two computations have the id": first_called_like_second,
        "two instructions have the same id": same_id,
        "has no instruction that is its root": lambda m: setattr(m.computations[0], "root_id", 3 << 50),
        "is not a list of its instructions": lambda m: m.schedule.sequences[0].value.instruction_ids.pop(),
        "the schedule is of a computation 99999": lambda m: setattr(m.schedule.sequences[0], "key", 99999),
        "is not defined before it": backwards,
        "output [9] is said to take the place of argument 0 []": lambda m: m.input_output_alias.entries.add(
            output_shape_index=[9]
        ),
        "for 8,000,000 devices, and the most is": lambda m: setattr(
            m.device_assignment, "computation_count", 8_000_000
        ),
        "a row of the table FileLocations": lambda m: m.stack_frame_index.file_locations.add(file_name_id=99),
        "a row of the table StackFrames": lambda m: m.stack_frame_index.stack_frames.add(file_location_id=0),
    }
    for reason, change in expected.items():
        assert reason in changed(change)


def test_the_buffers_of_a_module() -> None:
    of = dumped("scan_in_scan", "cpu")

    def changed(change: Callable[[Any], None]) -> ParseError:
        proto = classes()["HloProto"].FromString(of.proto)
        change(proto.buffer_assignment)
        return error(proto.SerializeToString())

    found = changed(lambda b: setattr(b.logical_buffers[3].defined_at, "instruction_id", 5 << 50))
    assert "made by no instruction that there is" in str(found) and found.offset > len(of.module)
    assert "made by no instruction" in str(changed(lambda b: b.logical_buffers[0].defined_at.shape_index.append(50)))
    assert "of -8 bytes" in str(changed(lambda b: setattr(b.logical_buffers[0], "size", -8)))
    filled = lambda b: next(a for a in b.buffer_allocations if a.assigned)  # noqa: E731
    assert "holds a buffer 98765 that is not there" in str(
        changed(lambda b: setattr(filled(b).assigned[0], "logical_buffer_id", 98765))
    )
    assert "lies outside of its allocation" in str(changed(lambda b: setattr(filled(b).assigned[0], "offset", 1 << 50)))
    assert "or there twice" in str(
        changed(lambda b: setattr(b.buffer_allocations[0], "index", b.buffer_allocations[1].index))
    )
    argument = lambda b: next(a for a in b.buffer_allocations if a.is_entry_computation_parameter)  # noqa: E731
    assert "is said to be of parameter 66" in str(changed(lambda b: setattr(argument(b), "parameter_number", 66)))
    assert "an event of the trace" in str(
        changed(lambda b: setattr(b.heap_simulator_traces[0].events[0], "buffer_id", 98765))
    )


# ---- and at a line of a text ----


def reduced(groups: str) -> str:
    return program(f"%it = f32[8,8] all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%sum")


def permuted(pairs: str) -> str:
    return program(f"%it = f32[8,8] collective-permute(%x), source_target_pairs={{{pairs}}}")


LOOP, SPLIT, STARTED = SMALL["loop"], SMALL["convolution"], SMALL["fusion"]
STATE = "(s32[], f32[8,8])"
LINES = {
    "nine devices": (reduced("{{0,1,8}}"), r"has groups whose devices are not once each of 0 \.\. 7"),
    "twice": (reduced("{{0,1},{1,2}}"), "has groups whose devices are not once each"),
    "hole": (reduced("{{0,1},{},{2,3}}"), "has an empty group beside others"),
    "rows": (reduced("[2,4]<=[7]"), r"in rows, 2 by 4, that \[7\] do not fill"),
    "too many": (reduced("[2,8]<=[16]"), "has groups of 16 devices, and there are 8"),
    "transpose": (reduced("[2,4]<=[2,4]T(1,1)"), "has a transpose of 2 dims in its groups"),
    "large rows": (reduced("[2000000000000,4]<=[8000000000000]"), "has groups of 8,000,000,000,000 devices"),
    "mesh": (reduced("mesh['a'=2,'b'=8] {'b'}"), "over a mesh of 2 x 8, and there are 8 devices"),
    "axis": (reduced("mesh['a'=2,'b'=4] {'c'}"), "over axis 2 of a mesh of 2"),
    "sub-axis": (reduced("mesh['a'=2,'b'=4] {'b':(3)2}"), r"over a part \(3\)2 of an axis of 4"),
    "overlap": (reduced("mesh['a'=8] {'a':(1)4,'a':(2)2}"), "over parts of an axis that lie in each other"),
    "mesh's devices": (
        reduced("mesh['a'=2,'b'=4], device_ids=(0,1,2,3,4,5,6,6) {'b'}"),
        "over a mesh whose devices are not once each",
    ),
    "mesh's order": (
        reduced("mesh['a'=2,'b'=4], device_ids=([3,4]T(1,0)) {'b'}"),
        r"over a mesh of 8 devices, in the order of \[3, 4\]",
    ),
    "source": (permuted("{0,1},{0,2}"), r"moves between devices that are not once each of 0 \.\. 7"),
    "target": (permuted("{0,9}"), "moves between devices"),
    "nothing to reduce": (
        program("%none = () tuple()\n  %it = () all-reduce(%none), replica_groups={}, to_apply=%sum"),
        "has an operand without an array",
    ),
    "tuple": (program("%it = (f32[8,8], f32[2]) tuple(%x)"), "is a tuple of other elements than its shape has"),
    "copy": (program("%it = (f32[8,8]) copy(%x)"), "does not have the shape of its operand"),
    "not started": (program("%it = f32[8,8] copy-done(%x)"), "does not follow a copy that has been started"),
    "half copied": (
        program(
            "%it = (f32[8,8], f32[8,8], u32[]) copy-start(%x)",
            root="ROOT %end = f32[8,8] get-tuple-element(%it), index=0",
        ),
        "takes an element of a copy that has not been done",
    ),
    "start": (
        STARTED.replace("((f32[8,8]), f32[8,8], s32[])", "(f32[8,8], f32[8,8], s32[])"),
        "does not have its operands and its result in its shape",
    ),
    "no result": (
        STARTED.replace("((f32[8,8]), f32[8,8], s32[])", "f32[8,8]"),
        "does not have its operands and its result in its shape",
    ),
    "body": (
        LOOP.replace(f"ROOT %t = {STATE} tuple(%next, %y)", "ROOT %t = (s32[]) tuple(%next)"),
        "does not have the shape of what more gives",
    ),
    "truth": (
        LOOP.replace("ROOT %c =", "%c =").replace("=LT\n", "=LT\n  ROOT %z = (pred[]) tuple(%c)\n"),
        "has a condition that is no truth value",
    ),
    "one branch": (SMALL["conditional"].replace("{%one, %two}", "{%one}"), "has 3 operands for 1 branches"),
    "labels": (SPLIT.replace("b01f_01io->b01f", "b01f_0io->b01f"), "that are not those of an array of 4 dims"),
    "window": (SPLIT.replace("size=3x3", "size=3x4"), "has a window that is not that of its kernel"),
    "far window": (
        SPLIT.replace("rhs_dilate=1x2", "lhs_dilate=1x999999999"),
        "has a window of 3 places, 999,999,999 apart",
    ),
    "recursion": (
        LOOP.replace("constant(1)", f"constant(1)\n  %again = {STATE} call(%p), to_apply=%more"),
        "again calls more, in which it is itself",
    ),
    "twice defined": (program("%it = f32[8,8] add(%x, %x)\n  %it = f32[8,8] add(%x, %x)"), "it is defined twice"),
    "two roots": (program("ROOT %it = f32[8,8] add(%x, %x)"), "end is the second ROOT of main"),
    "undefined": (program("%it = f32[8,8] add(%x, %y)"), "operand y of it is not defined above it"),
    "uncalled": (program("%it = f32[8,8] map(%x), to_apply=%none"), "it calls none, which this text does not have"),
    "no element": (program("%t = (f32[8,8]) tuple(%x)\n  %it = f32[8,8] negate(%t#1)"), "t has no element 1"),
    "no opcode": (program("%it = f32[8,8]"), "an opcode and its operands are missing here"),
    "no shape": (program("%it = g17[8,8] negate(%x)"), r"'g17\[8,8\]' is no shape of HLO"),
    "dims": (program("%it = f32[8,a] negate(%x)"), "the dims '8,a' are no numbers"),
    "huge dims": (program("%it = f32[99999999999999999999] negate(%x)"), "the dims .* are no numbers"),
    "layout": (program("%it = f32[8,8]{1,1} negate(%x)"), r"the layout \{1,1\} is none of an array of 2 dims"),
    "tile": (program("%it = f32[8,8]{1,0:T(0,128)} negate(%x)"), "has tiles that no layout has"),
    "bracket": (program("%it = (f32[8,8], f32[2] tuple(%x)"), r"the bracket '\(' is never closed"),
    "quote": (program('%it = f32[8,8] custom-call("a, %x)'), "a quotation mark is never closed"),
    "deep tuples": (program(f"%it = {'(' * 60}f32[]{')' * 60} custom-call(%x)"), "tuples lie more than 50 deep"),
    "outside": (
        program("").replace("ENTRY", "  %it = f32[] constant(1)\nENTRY"),
        "is neither a computation nor an instruction",
    ),
    "end": (program("").replace("\nENTRY", "\n}\nENTRY"), "a computation ends here that never began"),
    "second entry": (program("").replace("%sum (a: f32[], b: f32[]) -> f32[]", "ENTRY %sum"), "is the second ENTRY"),
    "second computation": (program("", before="\n%sum {\n  %a = f32[] parameter(0)\n}\n"), "sum is defined twice"),
    "empty computation": (program("", before="\n%none {\n}\n"), "computation none has no instructions"),
    "row": (
        program("").replace("\n\n%sum", '\n\nFileNames\n1 "a.py"\n3 "b.py"\n\n%sum'),
        "row 2 of the table FileNames is missing",
    ),
    "kernel": (
        program(
            '%it = f32[8,8] custom-call(%x, %x), custom_call_target="__cublas$gemm", backend_config='
            '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["-1"]}}}'
        ),
        "has a configuration whose lhs_contracting_dimensions are no numbers",
    ),
    "deep configuration": (
        program(
            '%it = f32[8,8] custom-call(%x), custom_call_target="k", backend_config={"a":'
            + "[" * 300 + "]" * 300 + "}"
        ),
        "has a configuration nested more than 200 deep",
    ),
    "devices": (program("", devices=9999999), "the module is for 9,999,999 devices"),
    "alias": (
        program("").replace("is_scheduled=true", "input_output_alias={ {3}: (0, {}, may-alias) }"),
        r"output \[3\] is said to take the place of argument 0 \[\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_damage_is_told_at_its_line(name: str) -> None:
    text, reason = LINES[name]
    found = error(text)
    assert re.search(reason, str(found)), str(found)
    line = text.splitlines()[found.line - 1] if found.line else ""
    if ": it " in str(found):
        assert "%it" in line


def nested(depth: int, times: int) -> str:
    """Functions f0 .. that each call the one before, so many times."""
    functions = ["\n%f0 {\n  ROOT %p0 = f32[] parameter(0)\n}\n"]
    for k in range(1, depth):
        calls = "\n".join(f"  %c{k}.{n} = f32[] call(%p{k}), to_apply=%f{k - 1}" for n in range(times))
        functions.append(f"\n%f{k} {{\n  %p{k} = f32[] parameter(0)\n{calls}\n}}\n")
    line = f"%it = f32[] call(%x), to_apply=%f{depth - 1}"
    return program(line, before="".join(functions), parameter="f32[]")


def test_calls_in_too_many_ways() -> None:
    """Forty functions, each of which calls the next one twice, reach the last in 2^40 ways."""
    assert read_bytes(nested(12, 2).encode(), "x").module.scheduled
    assert "reached in more than 2,000,000 ways" in str(error(nested(40, 2)))


def test_calls_too_deep_in_each_other() -> None:
    assert read_bytes(nested(150, 1).encode(), "x").module.scheduled
    assert "calls lie more than 200 deep" in str(error(nested(250, 1)))
