"""`jaxllm schedule`: what it prints, what it writes, how it ends."""

import io
import json
import re
import subprocess
import sys

import pytest

from jaxllm.cli import main
from jaxllm.report.schedule import print_schedule
from jaxllm.report.schedule_plot import check_cells
from jaxllm.report.table import console
from jaxllm.schedules import make, names
from jaxllm.schedules.files import write_csv
from jaxllm.schedules.simulation import simulate
from jaxllm.spec.errors import SpecError

SIZE = ("--stages", "4", "--microbatches", "8")


def run(capsys, *arguments):
    code = main(["schedule", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def drawn(out):
    """Of each stage its cells, in order, from the blocks of the terminal."""
    rows = {}
    for line in out.splitlines():
        found = re.fullmatch(r"stage (\d+)((?: +\S+)+)", line)
        if found and not re.search(r"[a-z]{2}", found[2]):
            rows.setdefault(int(found[1]), []).extend(found[2].split())
    return [rows[stage] for stage in sorted(rows)]


@pytest.mark.parametrize("name", names())
def test_table(name, capsys):
    code, out, err = run(capsys, name, *SIZE)
    assert (code, err) == (0, "")
    schedule = make(name, 4, 8)
    assert drawn(out) == [[str(row[s] or ".") for row in schedule.table] for s in range(4)]
    assert max(map(len, out.splitlines())) <= 80
    assert f"bubble {100 * simulate(schedule).bubble:.2f} %: the same" in " ".join(out.split())
    assert f"{schedule.ticks}; a result" in out and "forward" in out


def test_colour_adds_nothing_that_is_not_told_by_letters():
    from rich.console import Console

    simulation = simulate(make("zb-v", 4, 8))
    plain, colour = io.StringIO(), io.StringIO()
    print_schedule(simulation, console(plain))
    print_schedule(
        simulation,
        Console(file=colour, force_terminal=True, color_system="truecolor", width=80, highlight=False, markup=False),
    )
    assert "\x1b" not in plain.getvalue() and "\x1b[" in colour.getvalue()
    assert re.sub(r"\x1b\[[0-9;]*m", "", colour.getvalue()) == plain.getvalue()


def test_json(capsys):
    code, out, err = run(capsys, "zb-v", *SIZE, "--json", "--times", "f=1,b=2,w=1,comm=0.5")
    assert (code, err) == (0, "")
    found = json.loads(out)
    schedule = make("zb-v", 4, 8)
    assert list(found) == [
        "schema", "name", "stages", "microbatches", "chunks", "placement", "ticks", "table", "times", "span", "bubble",
        "in_step", "closed_form_bubble", "stash", "slots", "transfers",
    ]  # fmt: skip
    assert (found["schema"], found["name"], found["placement"]) == (1, "zb-v", "v")
    assert found["table"] == [[cell and str(cell) for cell in row] for row in schedule.table]
    assert found["times"] == {"f": 1, "b": 2, "w": 1, "comm": 0.5}
    assert found["bubble"] == pytest.approx((found["span"] - 32) / found["span"])
    assert found["closed_form_bubble"] is None
    assert found["stash"][3] == {"stage": 3, "activations": 8, "whole_stage_activations": 4, "weight_stash": 8}
    assert found["slots"] == {"inputs": 3, "stash": 8, "weights": 8}
    assert found["transfers"]["relative_to_1f1b"] == 2
    assert found["transfers"]["stages"][0] == {
        "stage": 0, "activations_up": 8, "activations_down": 0, "cotangents_up": 8, "cotangents_down": 0
    }  # fmt: skip


def test_closed_form_in_json(capsys):
    found = json.loads(run(capsys, "1f1b", *SIZE, "--json")[1])
    assert found["closed_form_bubble"] == found["bubble"] == pytest.approx(3 / 11)


def test_a_table_of_ones_own(tmp_path, capsys):
    path = tmp_path / "mine.csv"
    write_csv(make("interleaved", 4, 8, 3), path)
    code, out, _ = run(capsys, path, *SIZE)
    assert code == 0 and "none is known" in out and "3 chunks on each stage" in out
    assert json.loads(run(capsys, path, *SIZE, "--json")[1])["closed_form_bubble"] is None
    path.write_text("F0,,,\n,F0,,\n,,F0,\n,,,BW0\n,,BW0,\n,BW0,,\nBW0,,,\n")
    code, out, err = run(capsys, path, "--stages", 4, "--microbatches", 1)
    assert (code, out) == (2, "") and "F0 is missing on stage 3" in err


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_picture(suffix, tmp_path, capsys):
    path = tmp_path / f"picture.{suffix}"
    code, _, err = run(capsys, "zb-v", *SIZE, "--png", path, "--times", "f=1,b=1.5,w=0.5,comm=0.1")
    assert (code, err) == (0, f"jaxllm: wrote {path}\n")
    assert path.stat().st_size > 10_000 / (1 if suffix == "png" else 4)
    if suffix == "svg":
        text = path.read_text()
        for word in ("F0", "B7.1", "W7", "stage 3", "W: gradient of the weights, chunk 1", "bubble"):
            assert f">{word}" in text or f"{word} " in text, word


def test_a_picture_shows_so_many_cells():
    check_cells(simulate(make("1f1b", 4, 1000)))
    with pytest.raises(SpecError, match="take fewer microbatches"):
        check_cells(simulate(make("1f1b", 4, 2000)))


def test_trace(tmp_path, capsys):
    path = tmp_path / "trace.json"
    code, _, err = run(capsys, "dualpipev", *SIZE, "--trace", path, "--times", "comm=0.25")
    assert (code, err) == (0, f"jaxllm: wrote {path}\n")
    events = json.loads(path.read_text())["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "thread_name"]
    assert names == ["stage 0", "stage 1", "stage 2", "stage 3"]
    cells = [event for event in events if event["ph"] == "X"]
    assert len(cells) == sum(1 for _ in make("dualpipev", 4, 8).cells())
    for track in range(1, 5):
        mine = [(event["ts"], event["ts"] + event["dur"]) for event in cells if event["tid"] == track]
        assert all(end <= start + 1e-6 for (_, end), (start, _) in zip(mine, mine[1:], strict=False))


def test_a_trace_of_short_cells_has_them_all(tmp_path, capsys):
    path = tmp_path / "trace.json"
    assert run(capsys, "1f1b", *SIZE, "--trace", path, "--times", "f=0.0001,b=0.0001,w=0.00005")[0] == 0
    found = json.loads(path.read_text())
    assert "one unit of the times is 100,000 microseconds" in found["otherData"]["time"]
    assert {event["dur"] for event in found["traceEvents"] if event["ph"] == "X"} == {10, 15}


def test_a_large_table_is_not_printed(capsys):
    code, out, _ = run(capsys, "1f1b", "--stages", "200", "--microbatches", "600")
    assert code == 0 and len(out.splitlines()) < 20
    assert "240,000 cells are too many to read here; --json has all of them" in out and "200 down to 1 by stage" in out


BAD = {
    "no name": ([*SIZE], "NAME|FILE"),
    "no stages": (["1f1b", "--microbatches", "8"], "--stages"),
    "no microbatches": (["1f1b", "--stages", "4"], "--microbatches"),
    "unknown": (["1f1", *SIZE], "did you mean '1f1b'"),
    "no stages at all": (["1f1b", "--stages", "0", "--microbatches", "8"], "--stages '0' is no whole number"),
    "one stage": (["1f1b", "--stages", "1", "--microbatches", "8"], "--stages '1' is no whole number from 2 to 10^9; write it like --stages 8"),
    "negative": (["1f1b", "--stages", "-4", "--microbatches", "8"], "--stages 8"),
    "half a microbatch": (["1f1b", "--stages", "4", "--microbatches", "0.5"], "--microbatches 8"),
    "too many stages": (["1f1b", "--stages", "5000", "--microbatches", "8"], "1,024"),
    "too many microbatches": (["1f1b", "--stages", "4", "--microbatches", "1000000"], "100,000"),
    "too many cells": (["1f1b", "--stages", "64", "--microbatches", "50000"], "5,208 microbatches or fewer"),
    "a chunk too many": (["1f1b", *SIZE, "--virtual", "2"], "take 1, or interleaved"),
    "no chunk": (["interleaved", *SIZE, "--virtual", "0"], "--virtual 8"),
    "too few microbatches": (["zb-v", "--stages", "4", "--microbatches", "3"], "take 4 microbatches or more"),
    "no times": (["1f1b", *SIZE, "--times", ""], "key=value"),
    "unknown time": (["1f1b", *SIZE, "--times", "forward=1"], "known: b, comm, f, w"),
    "negative time": (["1f1b", *SIZE, "--times", "f=-1"], "write it like f=1"),
    "no commas": (["1f1b", *SIZE, "--times", "f=1;b=1"], "write commas between them"),
    "no number": (["1f1b", *SIZE, "--times", "b=nan"], "write it like b=1"),
    "no time at all": (["1f1b", *SIZE, "--times", "f=0,b=0,w=0"], "give one of them"),
    "no such file": (["no.csv", *SIZE], "cannot be read"),
    "picture of an unknown kind": (["1f1b", *SIZE, "--png", "x.gif"], ".png, .svg or .pdf"),
    "picture in no folder": (["1f1b", *SIZE, "--png", "/no/such/x.png"], "no folder"),
    "picture of too much": (["1f1b", "--stages", "4", "--microbatches", "1300", "--png", "x.png"], "10,000 is the"),
    "trace of an unknown kind": (["1f1b", *SIZE, "--trace", "x.txt"], "end it in .json"),
    "twice": (["1f1b", *SIZE, "--stages", "8"], "--stages is given twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_one_sentence(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, way_out = BAD[name]
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("jaxllm: ") and err.count("\n") == 1 and err.endswith("\n")
    assert way_out in err
    assert not list(tmp_path.iterdir())


def test_none_of_it_needs_numpy_or_jax():
    code = f"""
import sys
from jaxllm.cli import main
assert main(["schedule", "dualpipev", *{SIZE!r}, "--json"]) == 0
assert main(["schedule", "nothing", *{SIZE!r}]) == 2
assert not {{"numpy", "jax", "matplotlib"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
