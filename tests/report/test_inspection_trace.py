import json
from dataclasses import replace
from itertools import pairwise

import pytest

from jaxllm.report.trace import save_trace, trace
from jaxllm.spec.errors import SpecError
from tests.report.inspections import HOSTILE, MEMORY, NOTHING, STEP


def events(report, phase, track=None):
    return [e for e in trace(report)["traceEvents"] if e["ph"] == phase and track in (None, e["tid"])]


def by_name(report, track):
    return {event["name"]: event for event in events(report, "X", track)}


def check_format(data):
    """What the trace-event format asks for: phases with their fields, and slices of a track that do not cross."""
    assert set(data) == {"displayTimeUnit", "otherData", "traceEvents"} and data["displayTimeUnit"] in ("ns", "ms")
    fields = {"M": {"name", "ph", "pid", "tid", "args"}, "C": {"name", "ph", "pid", "tid", "ts", "args"}}
    fields["X"] = fields["C"] | {"cat", "dur"}
    tracks = {}
    for event in data["traceEvents"]:
        assert set(event) == fields[event["ph"]]
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int) and event["name"]
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] > 0
            tracks.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
        if event["ph"] == "C":
            assert all(isinstance(value, int) for value in event["args"].values())
    named = {e["tid"] for e in data["traceEvents"] if e["name"] == "thread_name"}
    assert set(tracks) <= named
    for slices in tracks.values():
        slices.sort()
        for (_, end), (start, _) in pairwise(slices):
            assert end <= start + 1e-9


@pytest.mark.parametrize(
    "report", [STEP, NOTHING, HOSTILE, replace(STEP, machine=None)], ids=["step", "nothing", "hostile", "bare"]
)
def test_it_is_a_trace(tmp_path, report):
    path = tmp_path / "trace.json"
    report.trace(path)
    data = json.loads(path.read_text(encoding="utf-8"))
    check_format(data)
    assert data == trace(report)
    first = path.read_bytes()
    save_trace(report, path)
    assert path.read_bytes() == first


def test_operations_stand_in_the_order_of_the_schedule_and_last_as_long_as_the_roofline_has_it():
    slices = events(STEP, "X", 1)
    assert [event["name"] for event in slices] == [operation.place.name for operation in STEP.operations]
    lengths = {event["name"]: event["dur"] for event in slices}
    assert lengths["dot.1"] == 0.72 and lengths["update.9"] == 4200.0 and lengths["all-reduce.2"] == 13.0
    assert "h100 needs at least" in trace(STEP)["otherData"]["time"]
    (process,) = [e for e in events(STEP, "M") if e["name"] == "process_name"]
    assert "not of a run" in process["args"]["name"] and "one of 8 devices" in process["args"]["name"]


def test_without_a_machine_each_operation_takes_a_microsecond_and_the_trace_says_so():
    bare = replace(STEP, machine=None)
    assert [(event["ts"], event["dur"]) for event in events(bare, "X", 1)] == [(float(i), 1.0) for i in range(6)]
    assert "one microsecond for each operation" in trace(bare)["otherData"]["time"]


def test_an_asynchronous_collective_runs_beside_what_follows_until_it_is_waited_for():
    operations, collectives = by_name(STEP, 1), by_name(STEP, 2)
    gather = collectives["all-gather over data"]
    assert gather["ts"] == operations["all-gather-start.1"]["ts"] == 0.72
    assert gather["dur"] == 7.0 and operations["all-gather-start.1"]["dur"] == 0.001
    assert gather["ts"] < operations["dot.2"]["ts"] < gather["ts"] + gather["dur"]
    assert operations["fusion.8"]["ts"] == pytest.approx(gather["ts"] + gather["dur"])  # waits
    reduce, its = collectives["all-reduce over data+tensor"], operations["all-reduce.2"]
    assert (reduce["ts"], reduce["dur"]) == (its["ts"], its["dur"])


def test_a_short_collective_ends_with_the_last_operation_beside_it():
    quick = tuple(replace(o, seconds=1e-9) if "gather" in o.opcode else o for o in STEP.operations)
    report = replace(STEP, operations=quick)
    gather, dot = by_name(report, 2)["all-gather over data"], by_name(report, 1)["dot.2"]
    assert gather["ts"] + gather["dur"] == pytest.approx(dot["ts"] + dot["dur"])


def test_collectives_at_the_same_time_have_tracks_of_their_own():
    gather = STEP.collectives[0]
    twin = replace(gather, place=replace(gather.place, name="all-gather-start.2"), axes=("tensor",))
    start = STEP.operations[1]
    second = replace(start, place=replace(start.place, name="all-gather-start.2"))
    report = replace(STEP, collectives=(gather, twin), operations=(*STEP.operations[:2], second, *STEP.operations[2:]))
    check_format(trace(report))
    assert list(by_name(report, 2)) == ["all-gather over data"] and list(by_name(report, 3)) == [
        "all-gather over tensor"
    ]
    titles = [event["args"]["name"] for event in events(report, "M") if event["name"] == "thread_name"]
    assert titles == ["operations", "collectives", "collectives beside those, 1"]


def test_a_collective_that_is_fused_runs_as_long_as_what_it_is_fused_with():
    gather = STEP.collectives[0]
    fused = replace(gather, place=replace(gather.place, name="inside.1"), overlapped=("dot.2", "fusion.8"))
    report = replace(STEP, collectives=(fused,))
    slice_, operations = by_name(report, 2)["all-gather over data"], by_name(report, 1)
    assert slice_["ts"] == operations["dot.2"]["ts"]
    assert slice_["ts"] + slice_["dur"] == pytest.approx(operations["fusion.8"]["ts"] + operations["fusion.8"]["dur"])


def test_a_collective_of_which_no_time_is_known_says_so():
    gather = STEP.collectives[0]
    lost = replace(gather, place=replace(gather.place, name="inside.1"), overlapped=())
    assert "unknown" in by_name(replace(STEP, collectives=(lost,)), 2)["all-gather over data"]["args"]["when"]
    assert "when" not in by_name(STEP, 2)["all-gather over data"]["args"]


def test_a_collective_of_several_dtypes_is_one_slice():
    gather = STEP.collectives[0]
    report = replace(STEP, collectives=(gather, replace(gather, dtype="f32", payload=1, wire=2)))
    args = by_name(report, 2)["all-gather over data"]["args"]
    assert (args["payload bytes"], args["wire bytes"], args["dtypes"]) == (4_194_305, 3_145_730, "bf16, f32")


def test_arguments_name_source_operation_flops_bytes_and_loops():
    args = by_name(STEP, 1)["dot.1"]["args"]
    assert args == {
        "instruction": "dot.1", "op_name": "jit(step)/forward/dot", "source": "model.py:31 < step.py:12",
        "phase": "forward", "executions": 32, "loops": "2 x 16", "opcode": "dot", "FLOPs": 134_217_728,
        "bytes read": 2_162_688, "bytes written": 262_144, "FLOPs a byte": 55.351, "bound by": "memory",
    }  # fmt: skip
    assert "loops" not in by_name(STEP, 1)["update.9"]["args"]
    assert by_name(STEP, 2)["all-reduce over data+tensor"]["args"]["stands for"] == "reduce-scatter"
    taken = replace(STEP.operations[0], place=replace(STEP.operations[0].place, conditional=True))
    assert "may not be taken" in by_name(replace(STEP, operations=(taken,)), 1)["dot.1"]["args"]["conditional"]


def test_the_counter_of_memory_follows_the_steps_and_keeps_the_peak():
    points = events(STEP, "C")
    moments = [event["ts"] for event in points]
    assert moments == sorted(set(moments))
    assert max(event["args"]["bytes"] for event in points) == max(level for _, level in MEMORY.timeline)
    starts = {event["name"]: event["ts"] for event in events(STEP, "X", 1)}
    levels = {event["ts"]: event["args"]["bytes"] for event in points}
    assert levels[starts["dot.2"]] == 11_001_000_001  # steps 30 to 41 lie between it and the next operation
    assert levels[starts["fusion.8"]] == 10_701_000_000 and levels[0.0] == 7_400_000_000


def test_without_steps_the_counter_is_spread_evenly():
    bare = replace(STEP, machine=None, operations=tuple(replace(o, step=None) for o in STEP.operations))
    points = {event["ts"]: event["args"]["bytes"] for event in events(bare, "C")}
    assert points[round(6 * 41 / 100, 3)] == 11_001_000_001 and len(points) == len(MEMORY.timeline)


def test_an_empty_program_has_an_empty_trace():
    assert not events(NOTHING, "X")
    assert [event["args"]["bytes"] for event in events(NOTHING, "C")] == [0]
    assert next(event["name"] for event in events(NOTHING, "M")) == "process_name"


def test_names_are_shown_and_not_obeyed():
    text = json.dumps(trace(HOSTILE))
    assert "\\\\u001b[31m" in text and "\\u202e" in text
    assert not any(ord(c) < 32 for event in events(HOSTILE, "X") for c in event["name"])


def test_a_path_that_cannot_be_written_is_one_sentence(tmp_path):
    with pytest.raises(
        SpecError, match=r"--trace .* cannot be written: No such file or directory; name another file\."
    ):
        STEP.trace(tmp_path / "gone" / "trace.json")
    with pytest.raises(SpecError, match="cannot be written"):
        STEP.trace(tmp_path)
