"""What the schedule tells: lifetimes, traffic, overlap, recovered axes; by small texts where the answer is known by hand."""

import pytest

from jaxllm.hlo.classes import argument_kind
from jaxllm.hlo.groups import recovered_axes
from jaxllm.hlo.inspect import inspect_program
from jaxllm.hlo.lifetimes import lifetimes
from jaxllm.hlo.read import read_bytes
from jaxllm.hlo.traffic import traffic
from jaxllm.spec.errors import SpecError


def read(entry, computations="", header="num_partitions=8"):
    text = f"HloModule m, is_scheduled=true, {header}\n{computations}\nENTRY %main {{\n{entry}\n}}\n"
    return read_bytes(text.encode(), "text", scheduled=True)


def times(module, name):
    """First and last half step of an array of the entry."""
    lives = lifetimes(module)
    instruction = next(i for _, i in module.instructions() if i.name == name)
    return lives.of(instruction.id, 0)[1:]


CHAIN = """  %a = f32[256]{0} parameter(0)
  %b = f32[256]{0} negate(%a)
  %c = f32[256]{0} negate(%b)
  ROOT %d = f32[256]{0} add(%c, %a)"""


def test_an_array_lives_from_its_instruction_to_its_last_reader():
    module = read(CHAIN).module
    assert times(module, "b") == (3, 4) and times(module, "c") == (5, 6) and times(module, "d") == (7, 7)
    assert times(module, "a") == (1, 6)


def test_an_operand_that_dies_is_not_counted_beside_the_result():
    memory = inspect_program(read(CHAIN)).memory
    assert memory.peak == 2 * 1024 and memory.classes == {"argument": 1024, "temporary": 1024}
    assert not memory.exact


def test_a_donated_argument_is_free_until_its_output_is_made():
    entry = """  %a = f32[256]{0} parameter(0)
  %s = f32[] slice(%a), slice={[0:1]}
  %t = f32[1024]{0} broadcast(%s), dimensions={}
  %u = f32[] slice(%t), slice={[0:1]}
  ROOT %d = f32[256]{0} broadcast(%u), dimensions={}"""
    kept = inspect_program(read(entry)).memory
    given = inspect_program(read(entry, header="input_output_alias={ {}: (0, {}, may-alias) }")).memory
    assert (kept.peak, given.peak) == (1024 + 4096, 4096)
    assert (kept.aliased, given.aliased) == (0, 1024)


LOOP = """%body {
  %p = (s32[], f32[256]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[256]{0} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %j = s32[] add(%i, %one)
  %y = f32[256]{0} negate(%x)
  %z = f32[256]{0} negate(%y)
  ROOT %t = (s32[], f32[256]{0}) tuple(%j, %z)
}

%condition {
  %q = (s32[], f32[256]{0}) parameter(0)
  %k = s32[] get-tuple-element(%q), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%k, %five), direction=LT
}
"""
AROUND = """  %a = f32[256]{0} parameter(0)
  %zero = s32[] constant(0)
  %start = f32[256]{0} negate(%a)
  %init = (s32[], f32[256]{0}) tuple(%zero, %start)
  %w = (s32[], f32[256]{0}) while(%init), condition=%condition, body=%body
  ROOT %out = f32[256]{0} get-tuple-element(%w), index=1"""


def test_the_state_of_a_loop_is_free_between_its_last_reader_and_the_next_state():
    program = read(AROUND, LOOP)
    lives = lifetimes(program.module)
    by_name = {i.name: i for _, i in program.module.instructions()}

    def memory(name, leaf=0):
        return lives.memory(by_name[name].id, leaf)

    assert memory("start") == memory("x") == memory("init", 1) and memory("z") == memory("w", 1) == memory("out")
    given, made = lives.time(memory("x")), lives.time(memory("z"))
    step = lives.position
    assert given[1] == 2 * step[by_name["y"].id]  # its last reader
    assert made == (2 * step[by_name["z"].id] + 1, 2 * len(lives.order) - 1)
    report = inspect_program(program)
    (negated,) = {operation.place.count for operation in report.operations if operation.place.name == "y"}
    assert negated == 5
    assert report.memory.peak - report.memory.classes["constant"] in range(2 * 1024, 2 * 1024 + 16)


def test_what_a_loop_hands_on_unchanged_lives_throughout():
    kept = LOOP.replace("tuple(%j, %z)", "tuple(%j, %x)")
    program = read(AROUND, kept)
    lives = lifetimes(program.module)
    by_name = {i.name: i for _, i in program.module.instructions()}
    assert lives.memory(by_name["x"].id, 0) == lives.memory(by_name["out"].id, 0)
    assert lives.time(lives.memory(by_name["x"].id, 0))[1] == 2 * len(lives.order) - 1


def test_what_an_operation_reads_and_writes():
    fused = """%f {
  %f.0 = f32[1024]{0} parameter(0)
  %f.1 = s32[] parameter(1)
  %f.2 = f32[16]{0} dynamic-slice(%f.0, %f.1), dynamic_slice_sizes={16}
  ROOT %f.3 = f32[16]{0} negate(%f.2)
}

%g {
  %g.0 = f32[1024]{0} parameter(0)
  %g.1 = f32[16]{0} parameter(1)
  %g.2 = s32[] parameter(2)
  ROOT %g.3 = f32[1024]{0} dynamic-update-slice(%g.0, %g.1, %g.2)
}

%h {
  %h.0 = bf16[1024]{0} parameter(0)
  ROOT %h.1 = f32[1024]{0} convert(%h.0)
}
"""
    entry = """  %a = f32[1024]{0} parameter(0)
  %i = s32[] parameter(1)
  %sliced = f32[16]{0} fusion(%a, %i), kind=kLoop, calls=%f
  %updated = f32[1024]{0} fusion(%a, %sliced, %i), kind=kLoop, calls=%g
  %both = f32[1024]{0} add(%updated, %updated)
  %half = bf16[1024]{0} convert(%both)
  %wide = f32[1024]{0} fusion(%half), kind=kLoop, calls=%h
  %fast = f32[1024]{0:T(1024)S(1)} negate(%both)
  %name = f32[32,32]{1,0} bitcast(%both)
  ROOT %tuple = (f32[1024]{0:T(1024)S(1)}, f32[32,32]{1,0}) tuple(%fast, %name)"""
    module = read(entry, fused).module
    moved = {i.name: traffic(module, c, i) for c, i in module.instructions() if c is module.entry}
    assert moved["sliced"] == (64 + 4, 64)  # the slice and its index
    assert moved["updated"] == (64 + 4, 64)  # the update, in place
    assert moved["both"] == (4096, 4096)  # one array read twice is read once
    assert moved["wide"] == (2048, 4096)  # a conversion alone reads all of it
    assert moved["fast"] == (4096, 0)  # written on the chip
    assert moved["name"] == moved["tuple"] == moved["a"] == (0, 0)


def test_what_runs_beside_a_collective():
    sum_ = """%sum {
  %s.0 = f32[] parameter(0)
  %s.1 = f32[] parameter(1)
  ROOT %s.2 = f32[] add(%s.0, %s.1)
}
"""
    entry = """  %a = f32[64,64]{1,0} parameter(0)
  %start = f32[64,64]{1,0} all-reduce-start(%a), replica_groups=[2,4]<=[8], to_apply=%sum, backend_config=CONFIG
  %d = f32[64,64]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %done = f32[64,64]{1,0} all-reduce-done(%start)
  %e = f32[64,64]{1,0} dot(%done, %d), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %plain = f32[64,64]{1,0} all-reduce(%e), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%sum"""
    report = inspect_program(read(entry.replace("CONFIG", "{}"), sum_))
    first, second = report.collectives
    assert first.asynchronous and first.overlapped == ("d",) and not second.asynchronous
    assert report.mesh == {"axis0": 2, "axis1": 4} and (first.axes, second.axes) == (("axis1",), ("axis0",))
    assert (first.payload, first.wire) == (16384, 2 * 16384 * 3 // 4)
    config = '{"collective_backend_config":{"is_sync":true}}'
    first, _ = inspect_program(read(entry.replace("CONFIG", config), sum_)).collectives
    assert not first.asynchronous and not first.overlapped


def test_a_mesh_of_another_program_is_refused():
    entry = """  %a = f32[8]{0} parameter(0)
  ROOT %g = f32[16]{0} all-gather(%a), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}"""
    program = read(entry)
    assert inspect_program(program, mesh={"a": 4, "b": 2}).collectives[0].axes == ("b",)
    with pytest.raises(SpecError, match="16 devices and the program m is for 8"):
        inspect_program(program, mesh={"a": 16})
    with pytest.raises(SpecError, match=r"no collective of m runs over axes of the mesh a=8: g has the group"):
        inspect_program(program, mesh={"a": 8})


@pytest.mark.parametrize(
    ("groups", "pairs", "degrees"),
    [
        ([((0, 1), (2, 3), (4, 5), (6, 7))], [], (4, 2)),
        ([((0, 4), (1, 5), (2, 6), (3, 7))], [], (2, 4)),
        ([((0, 2), (1, 3), (4, 6), (5, 7))], [], (2, 2, 2)),
        ([((0, 1, 4, 5), (2, 3, 6, 7))], [], (2, 2, 2)),
        ([tuple((i,) for i in range(8))], [], ()),
        ([], [tuple((i, (i + 1) % 8) for i in range(8))], (8,)),
        ([], [((0, 2), (2, 4), (4, 6), (6, 0), (1, 3), (3, 5), (5, 7), (7, 1))], (4, 2)),
        ([(tuple(range(8)),)], [], (8,)),
    ],
)
def test_axes_that_nobody_named(groups, pairs, degrees):
    assert tuple(recovered_axes(groups, pairs, 8).values()) == degrees


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("params['layers']['v']", "parameter"),
        ("state.params['Dense_0']['kernel']", "parameter"),
        ("state.opt_state[0].mu['params']['w']", "optimizer"),
        ("opt_state[0].nu['w']", "optimizer"),
        ("optimizer['m']", "optimizer"),
        ("model.layers.0.kernel", "parameter"),
        ("m.states[0][1]", "parameter"),
        ("grads['w']", "gradient"),
        ("w", "parameter"),
        ("x", "argument"),
        ("v", "argument"),
        ("batch['tokens']", "argument"),
        ("", "argument"),
    ],
)
def test_arguments_by_name(name, kind):
    assert argument_kind(name) == kind
