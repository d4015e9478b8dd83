"""The compiled step played on its machine: programs of a few instructions whose time is known by hand, and two real ones."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

import jaxllm
from jaxllm.cli import main
from jaxllm.hlo.read import read_bytes
from jaxllm.hlo.tasks import Program, Sent, Task, programs
from jaxllm.played import Device, play, together
from jaxllm.report.played import MEET, document, largest, print_played
from jaxllm.spec.errors import TargetError
from jaxllm.theory.symbols import Symbols
from jaxllm.theory.matmul import product
from jaxllm.theory.time import step_time
from tests.report.test_inspection_trace import check_format

NOUNS = (
    jaxllm.ModelConfig.load("llama-tiny"), jaxllm.Layout.parse("data=4,tensor=2"), jaxllm.Machine.load("a100-80:8"),
    jaxllm.Workload(4, 128, "bf16-f32"),
)  # fmt: skip
CLOSED = step_time(*NOUNS)
R, S = CLOSED.rates, Symbols.of(NOUNS[0], NOUNS[1], NOUNS[3])
AXES = {"data": 4, "tensor": 2}
OVER_DATA, OVER_TENSOR = "replica_groups={{0,2,4,6},{1,3,5,7}}", "replica_groups={{0,1},{2,3},{4,5},{6,7}}"

SUM = """%sum {
  %s.0 = bf16[] parameter(0)
  %s.1 = bf16[] parameter(1)
  ROOT %s.2 = bf16[] add(%s.0, %s.1)
}
"""


def module(entry, more="", devices=8):
    head = f"HloModule m, is_scheduled=true, num_partitions={devices}\n\n"
    return read_bytes(f"{head}{SUM}\n{more}\nENTRY %main {{\n{entry}\n}}\n".encode(), "m.txt", scheduled=True).module


def played(entry, more=""):
    return play(module(entry, more), AXES, S, CLOSED, "gpu")


def dot(name, left="a", right="a"):
    return f"  %{name} = bf16[4096,4096]{{1,0}} dot(%{left}, %{right}), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}\n"


A = "  %a = bf16[4096,4096]{1,0} parameter(0)\n"
DOT = float(product(R, 4096, 4096, 4096, 2))
WHOLE = 4096 * 4096 * 2  # bytes of an array


def gather(name, of="a", config="{}"):
    return (
        f"  %{name} = (bf16[4096,4096]{{1,0}}, bf16[16384,4096]{{1,0}}) all-gather-start(%{of}), {OVER_DATA}, "
        f"dimensions={{0}}, backend_config={config}\n"
    )


def done(name, start):
    return f"  %{name} = bf16[16384,4096]{{1,0}} all-gather-done(%{start})\n"


GATHER = float(R.seconds(S, "all-gather", ("data",), 3 * WHOLE, 1))  # 478 us, less than DOT's 632


def by_name(one):
    return {operation.name: operation for operation in one.operations}


def test_one_after_another():
    one = played(f"{A}{dot('d')}  ROOT %n = bf16[4096,4096]{{1,0}} negate(%d)")
    through = 2 * WHOLE / R.memory + R.kernel
    assert one.parts["products"] == pytest.approx(DOT) and one.parts["memory"] == pytest.approx(through)
    assert one.seconds == pytest.approx(DOT + through + R.step)
    assert by_name(one)["d"].flops == 2 * 4096**3 and one.kernels == 2 and not one.notes


def test_a_fusion_reads_what_its_product_does_not():
    fused = f"""%f {{
  %a = bf16[4096,4096]{{1,0}} parameter(0)
  %b = f32[4096,4096]{{1,0}} parameter(1)
  %c = bf16[4096,4096]{{1,0}} convert(%b)
  %e = bf16[4096,8]{{1,0}} slice(%c), slice={{[0:4096],[0:8]}}
{dot("d", right="e").replace("%d = bf16[4096,4096]", "ROOT %d = bf16[4096,8]")}}}
"""
    entry = f"""{A}  %b = f32[4096,4096]{{1,0}} parameter(1)
  ROOT %f = bf16[4096,8]{{1,0}} fusion(%a, %b), kind=kCustom, calls=%f"""
    one = played(entry, fused)
    (operation,) = one.operations
    moved = (operation.read + operation.written) / R.memory
    assert one.parts["products"] == pytest.approx(moved + R.kernel) and operation.read > WHOLE


def loop(body, trips, carried="bf16[4096,4096]{1,0}"):
    tuple_ = f"(s32[], {carried})"
    more = f"""%body {{
  %p = {tuple_} parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %a = {carried} get-tuple-element(%p), index=1
{body}  ROOT %t = {tuple_} tuple(%i, %out)
}}

%condition {{
  %q = {tuple_} parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant({trips})
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}}
"""
    call = f"""  %zero = s32[] constant(0)
  %start = {tuple_} tuple(%zero, %a)
  %w = {tuple_} while(%start), condition=%condition, body=%body, backend_config={{"known_trip_count":{{"n":"{trips}"}}}}
"""
    return call, more


def test_a_loop_is_played_once_for_all_of_its_turns():
    call, more = loop(dot("out"), 7)
    one = played(f"{A}{call}  ROOT %r = bf16[4096,4096]{{1,0}} get-tuple-element(%w), index=1", more)
    assert one.parts["products"] == pytest.approx(7 * DOT)
    assert [operation.runs for operation in one.operations] == [7]  # and no condition
    assert max(each.end for each in one.slices) == pytest.approx(7 * DOT)
    assert "6 turns of w more" in [each.name for each in one.slices]


def test_what_runs_beside_a_product_is_hidden():
    one = played(f"{A}{gather('g')}{dot('d')}{dot('e')}{done('h', 'g')}  ROOT %t = (bf16[4096,4096]{{1,0}}) tuple(%e)")
    (sent,) = one.traffic
    assert (sent.axes, sent.exposed, sent.hidden) == (("data",), 0, pytest.approx(GATHER))
    assert one.seconds == pytest.approx(2 * DOT + R.step)


def test_what_nothing_runs_beside_is_waited_for():
    one = played(f"{A}{gather('g')}{done('h', 'g')}{dot('d')}  ROOT %t = (bf16[4096,4096]{{1,0}}) tuple(%d)")
    (sent,) = one.traffic
    assert (sent.exposed, sent.hidden) == (pytest.approx(GATHER), 0)
    assert one.seconds == pytest.approx(GATHER + DOT + R.step)
    config = '{"collective_backend_config":{"is_sync":true}}'
    same = played(f"{A}{gather('g', config=config)}{dot('d')}{done('h', 'g')}  ROOT %t = (bf16[4096,4096]{{1,0}}) tuple(%d)")
    assert same.seconds == pytest.approx(one.seconds)  # a start that is all of it


def test_collectives_of_the_same_axes_go_one_after_another_and_others_beside_them():
    both = f"{gather('g')}{gather('h')}"
    over_tensor = gather("h").replace(OVER_DATA, OVER_TENSOR).replace("16384", "8192")
    ends = f"{done('i', 'g')}{done('j', 'h')}"
    same = played(f"{A}{both}{ends}  ROOT %t = (bf16[16384,4096]{{1,0}}) tuple(%i)")
    other = played(f"{A}{gather('g')}{over_tensor}{ends.replace('j = bf16[16384', 'j = bf16[8192')}  ROOT %t = () tuple()")
    least = float(R.seconds(S, "all-gather", ("tensor",), WHOLE, 1))
    assert same.seconds == pytest.approx(2 * GATHER + R.step)
    assert other.seconds == pytest.approx(max(GATHER, least) + R.step)
    assert {each.axes for each in other.traffic} == {("data",), ("tensor",)}


def test_a_loop_waits_for_what_was_started_before_it():
    reduce = f"  %out = bf16[4096,4096]{{1,0}} all-reduce(%a), {OVER_DATA}, to_apply=%sum\n"
    call, more = loop(reduce, 3)
    one = played(f"{A}{gather('g')}{call}{done('h', 'g')}  ROOT %t = (bf16[16384,4096]{{1,0}}) tuple(%h)", more)
    each = float(R.seconds(S, "all-reduce", ("data",), 2 * WHOLE * 3 // 4, 1))
    assert one.seconds == pytest.approx(GATHER + 3 * each + R.step)
    assert by_name(one)["out"].runs == 3


def test_copies_to_host_memory_go_over_its_link():
    host = "bf16[4096,4096]{1,0:S(5)}"
    start = f"  %c = ({host}, bf16[4096,4096]{{1,0}}, u32[]) copy-start(%a)\n"
    one = played(f"{A}{start}{dot('d')}  %e = {host} copy-done(%c)\n  ROOT %t = ({host}) tuple(%e)")
    copied = by_name(one)["c"]
    assert copied.part == "host" and copied.copied == WHOLE and copied.seconds == pytest.approx(WHOLE / R.host)
    assert copied.waited == pytest.approx(WHOLE / R.host - DOT) == pytest.approx(one.parts["host"])


def test_what_nobody_can_time_is_said():
    call = '  %c = bf16[4096,4096]{1,0} custom-call(%a), custom_call_target="mystery"\n'
    one = played(f"{A}{call}{dot('d', 'c', 'c')}  ROOT %t = (bf16[4096,4096]{{1,0}}) tuple(%d)")
    (note,) = one.notes
    assert note.startswith("c takes no time: custom call mystery")
    odd = gather("g").replace(OVER_DATA, "replica_groups={{0,3,4,6},{1,2,5,7}}")
    (note,) = played(f"{A}{odd}{done('h', 'g')}  ROOT %t = (bf16[16384,4096]{{1,0}}) tuple(%h)").notes
    assert "its groups run along no mesh axes" in note


def test_of_a_conditional_the_dearest_branch_is_played():
    more = f"""%cheap {{
  ROOT %a = bf16[4096,4096]{{1,0}} parameter(0)
}}

%dear {{
{A}{dot("d").replace("%d =", "ROOT %d =")}}}
"""
    entry = f"""{A}  %k = s32[] parameter(1)
  ROOT %c = bf16[4096,4096]{{1,0}} conditional(%k, %a, %a), branch_computations={{%cheap, %dear}}"""
    one = played(entry, more)
    assert one.parts["products"] == pytest.approx(DOT) and "runs one of 2 branches" in one.notes[0]


def test_an_attention_of_many_heads_is_a_product_of_many():
    entry = """  %a = bf16[32,2048,128]{2,1,0} parameter(0)
  ROOT %d = bf16[32,2048,2048]{2,1,0} dot(%a, %a), lhs_batch_dims={0}, rhs_batch_dims={0}, DIMS"""
    dims = "lhs_contracting_dims={2}, rhs_contracting_dims={2}"
    (program,) = programs(module(entry.replace("DIMS", dims)), AXES)
    (multiplied,) = program.tasks[0].products
    assert (multiplied.rows, multiplied.inner, multiplied.columns, multiplied.many) == (2048, 128, 2048, 32)


CHAIN = """%begin {
  %b.0 = bf16[4096,4096]{1,0} parameter(0)
  %b.1 = bf16[16384,4096]{1,0} all-gather(%b.0), GROUPS, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %b.2 = (bf16[4096,4096]{1,0}, bf16[16384,4096]{1,0}) custom-call(%b.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 {
  %m.0 = bf16[4096,4096]{1,0} parameter(0)
  %m.1 = bf16[4096,4096]{1,0} parameter(1)
  %m.2 = bf16[16384,4096]{1,0} parameter(2)
  %m.3 = bf16[4096,4096]{1,0} dot(%m.0, %m.0), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %m.4 = bf16[16384,4096]{1,0} all-gather(%m.1), GROUPS, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %m.5 = (bf16[4096,4096]{1,0}, bf16[4096,4096]{1,0}, bf16[16384,4096]{1,0}) tuple(%m.3, %m.1, %m.4)
}

%fused_computation.end {
  %e.0 = bf16[4096,4096]{1,0} parameter(0)
  %e.1 = bf16[16384,4096]{1,0} all-gather(%e.0), GROUPS, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %e.2 = bf16[16384,4096]{1,0} custom-call(%e.0, %e.1), custom_call_target="AsyncCollectiveDone"
}
""".replace("GROUPS", OVER_DATA).replace("%begin", "%fused_computation.begin")


def test_a_collective_that_a_tpu_spreads_over_fusions_runs_beside_them():
    pair, three = "(bf16[4096,4096]{1,0}, ", "(bf16[4096,4096]{1,0}, bf16[4096,4096]{1,0}, bf16[16384,4096]{1,0})"
    entry = f"""{A}  %s = {pair}bf16[16384,4096]{{1,0}}) fusion(%a), kind=kCustom, calls=%fused_computation.begin
  %s.1 = bf16[16384,4096]{{1,0}} get-tuple-element(%s), index=1
  %m = {three} fusion(%a, %a, %s.1), kind=kOutput, calls=%async_collective_fusion.1
  %m.9 = bf16[4096,4096]{{1,0}} get-tuple-element(%m), index=1
  ROOT %d = bf16[16384,4096]{{1,0}} fusion(%m.9), kind=kCustom, calls=%fused_computation.end"""
    one = played(entry, CHAIN)
    (sent,) = one.traffic
    assert (sent.exposed, sent.hidden) == (0, pytest.approx(GATHER))
    assert one.seconds == pytest.approx(DOT + R.step)
    assert {operation.name for operation in one.operations} == {"s", "m"}
    assert by_name(one)["m"].written == WHOLE  # what the collective moves is not the fusion's


def test_a_bubble_is_explained():
    one = played(f"{A}{dot('d')}  ROOT %n = bf16[4096,4096]{{1,0}} negate(%d)")
    text = io.StringIO()
    print_played(replace(one, parts=one.parts | {"bubble": 1.0}, seconds=one.seconds + 1), Console(file=text, width=80))
    shown = " ".join(text.getvalue().split())
    assert f"bubble of the pipeline: +1.00 s; {MEET}" in shown and "matmuls" in shown


def test_stages_wait_for_each_other():
    """A stage that computes twice as long as the other in each turn: the other idles as long as it computes."""
    sends = [Sent("permute", ("tensor",), 1000, (1 - stage,)) for stage in (0, 1)]
    permute = [Task(9, "p", "collective-permute", sent=each) for each in sends]
    busy = {stage: Task(1, "n", "negate", read=(stage + 1) * 10**9) for stage in (0, 1)}
    devices = [Device(stage, S, R) for stage in (0, 1)]
    bodies = [Task(5, "w", "while", body=(busy[stage], permute[stage]), turns=4) for stage in (0, 1)]
    together(devices, [Program((body,)) for body in bodies])
    sent = float(R.seconds(S, "permute", ("tensor",), 1000, 1))
    assert devices[0].now == devices[1].now == pytest.approx(4 * (2e9 / R.memory + R.kernel + sent))
    assert (devices[0].idle, devices[1].idle) == (pytest.approx(4 * 1e9 / R.memory), 0)


def test_turns_that_a_table_tells_are_played_one_by_one():
    inner = Task(2, "gate", "while", body=(Task(1, "n", "negate", read=10**9),), turns=(1, 0, 3), by=5)
    device = Device(0, S, R)
    together([device], [Program((Task(5, "ticks", "while", body=(inner,), turns=3),))])
    assert device.now == pytest.approx(4 * (1e9 / R.memory + R.kernel))
    assert [one.runs for one in device.operations()] == [4]


# ---------------------------------------------------------------- real programs

GPU = ["llama-tiny", "--mesh", "a100-80:2", "--layout", "pipe=2,microbatches=2,remat=full"]
TPU = ["llama-tiny", "--mesh", "v5e:2x2", "--layout", "data=4"]


def test_a_pipeline_for_gpus_as_json_and_as_a_trace(tmp_path, capsys):
    path = tmp_path / "trace.json"
    code = main(["time", *GPU, "--compiled", "--json", "--trace", str(path)])
    captured = capsys.readouterr()
    assert code == 0 and f"jaxllm: wrote {path}" in captured.err and "compiling with XLA:GPU" in captured.err
    data = json.loads(captured.out)
    compiled = data["compiled"]
    assert compiled["compiler"] == "gpu" and compiled["stage"] in (0, 1) and compiled["notes"] == []
    parts = {part["part"]: part for part in compiled["parts"]}
    assert sum(part["played"] for part in parts.values()) == pytest.approx(compiled["seconds"])
    assert sum(part["predicted"] for part in parts.values()) == pytest.approx(data["seconds"])
    assert parts["bubble of the pipeline"]["played"] > 0 and parts["collectives over pipe"]["predicted"] > 0
    flops = sum(one["flops"] * one["runs"] for one in compiled["operations"])
    assert 0 < flops < 2 * data["hardware_flops"]
    assert any(one["source"].startswith("llama.py:") for one in compiled["operations"])
    trace = json.loads(path.read_text())
    tracks = {event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "thread_name"}
    assert {"compute", "collectives over pipe"} <= tracks
    assert {event["name"] for event in trace["traceEvents"] if event["ph"] == "X"} >= {"wait for another stage"}
    nest(trace)


def nest(trace):
    """Slices of a track lie in each other or one after another."""
    tracks = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], -event["dur"]))
    assert tracks
    for slices in tracks.values():
        open_ = []
        for start, minus in sorted(slices):
            end = start - minus
            while open_ and open_[-1] <= start + 2e-3:
                open_.pop()
            assert not open_ or end <= open_[-1] + 2e-3
            open_.append(end)


def test_a_step_for_tpus_as_a_table(capsys):
    code = main(["time", *TPU, "--compiled"])
    out = " ".join(capsys.readouterr().out.split())
    assert code == 0 and "The program that XLA:TPU makes of it, played on the same machine" in out
    assert "of what was played the longest are" in out and "collectives over data" in out and "kernels of at least" not in out


def test_from_python():
    one = played(f"{A}{dot('d')}  ROOT %n = bf16[4096,4096]{{1,0}} negate(%d)")
    assert largest(one, "products")[0].name == "d" and document(one)["parts"]
    assert jaxllm.played_time.__module__ == "jaxllm.played"
    assert str(by_name(one)["d"]).endswith(", multiplies 137 GFLOP, reads 33.6 MB and writes 33.6 MB")


# ---------------------------------------------------------------- the closed form's trace, and bad input


@pytest.mark.parametrize("layout", ["data=2,tensor=4,zero=3,remat=full", "pipe=4,tensor=2,microbatches=8,remat=full"])
def test_the_closed_form_as_a_trace(layout, tmp_path, capsys):
    path = tmp_path / "trace.json"
    step = ["llama-2-7b", "--mesh", "a100-80:8", "--layout", layout, "--seq", "2048"]
    code = main(["time", *step, "--trace", str(path), "--json"])
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, f"jaxllm: wrote {path}\n")
    trace = json.loads(path.read_text())
    check_format(trace | {"traceEvents": [event for event in trace["traceEvents"] if event["pid"] == 1]})
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X" and event["pid"] == 1]
    seconds = json.loads(captured.out)["seconds"]
    assert max(event["ts"] + event["dur"] for event in slices) == pytest.approx(1e6 * seconds)
    stages = {event["tid"] for event in trace["traceEvents"] if event["pid"] == 2 and event["ph"] == "X"}
    assert stages == (set(range(1, 5)) if "pipe" in layout else set())
    categories = {event["cat"] for event in slices}
    assert {"blocks", "waited for", "optimizer"} <= categories and ("hidden" in categories) == ("zero=3" in layout)


BAD = {
    "cpu": (["--mesh", "cpu:8", "--layout", "data=8", "--compiled"], "cpu has no figure peak.bf16"),
    "suffix": (["--mesh", "a100-80:8", "--layout", "data=8", "--trace", "t.txt"], "--trace 't.txt': .txt is not a trace"),
    "folder": (["--mesh", "a100-80:8", "--layout", "data=8", "--trace", "nowhere/t.json"], "there is no folder nowhere"),
    "batch": (["--mesh", "a100-80:8", "--layout", "data=8", "--compiled", "--batch", "3"], "no whole number of sequences"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case, capsys):
    options, reason = BAD[case]
    code = main(["time", "llama-tiny", *options])
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "") and reason in captured.err
    assert captured.err.startswith("jaxllm: ") and len(captured.err.strip().splitlines()) == 1


def test_a_target_that_is_not_here(capsys, monkeypatch):
    def missing(*_):
        raise TargetError("XLA:GPU is not installed; pip install it.")

    monkeypatch.setattr("jaxllm.targets.start.prepare", missing)
    assert main(["time", *GPU, "--compiled"]) == 3
    assert capsys.readouterr().err.endswith("jaxllm: XLA:GPU is not installed; pip install it.\n")
