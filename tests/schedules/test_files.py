"""Tables of one's own: files and rows that are schedules, and those that are none."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.schedules import Cell, files, make
from jaxllm.schedules.files import load, of_rows, read_csv, write_csv
from jaxllm.schedules.table import Schedule
from jaxllm.schedules.validity import validate
from jaxllm.spec.errors import SpecError
from tests.schedules.sizes import at_random, every

GOOD = "stage 0,stage 1\nF0,\nF1,F0\n,BW0\nBW0,F1\n,BW1\nBW1,\n"


def test_round_trip(tmp_path):
    path = tmp_path / "table.csv"
    for schedule in (*every((2, 3, 4)), *map(at_random, range(40))):
        write_csv(schedule, path)
        read = read_csv(path, schedule.stages, schedule.microbatches)
        assert (read.table, read.placement, read.chunks) == (schedule.table, schedule.placement, schedule.chunks)


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        GOOD.removeprefix("stage 0,stage 1\n"),
        GOOD.replace("\n", "\r\n"),
        "\ufeff" + GOOD,
        "# mine\n# placement: ring\n\n" + GOOD.replace(",", " , ") + "\n\n",
        GOOD.replace("stage", "Stage").replace("F0", '"F0"').replace("\n,", "\n.,"),
        GOOD.replace("F0", "F0.0").replace("BW1", "BW01"),
    ],
)
def test_ways_to_write_the_same(tmp_path, text):
    path = tmp_path / "mine.csv"
    path.write_text(text, encoding="utf-8", newline="")
    assert read_csv(path, 2, 2).table == of_rows(["F0 .", "F1 F0", ". BW0", "BW0 F1", ". BW1", "BW1 ."]).table


def test_rows_of_python():
    rows = ["F0 .", [Cell("F", 1), "F0"], (None, Cell("BW", 0)), "BW0 F1", [None, "BW1"], ["BW1", ""]]
    schedule = of_rows(rows, name="mine")
    assert (schedule.stages, schedule.microbatches, schedule.chunks, schedule.ticks) == (2, 2, 1, 6)
    assert of_rows(schedule.table, name="mine") == schedule


def test_a_table_in_a_v(tmp_path):
    path = tmp_path / "v.csv"
    path.write_text("# Placement: V\nF0,\n,F0\n,F0.1\nF0.1,\nBW0.1,\n,BW0.1\n,BW0\nBW0,\n")
    schedule = read_csv(path, 2, 1)
    assert (schedule.placement, schedule.chunks) == ("v", 2)
    with pytest.raises(SpecError, match="F0.1 at tick 2, stage 1 comes too early: F0.1 at tick 3, stage 0"):
        of_rows(schedule.table)


@pytest.mark.parametrize(
    "text, way_out",
    [
        ("", "no ticks"),
        ("# nothing\n\n", "no ticks"),
        ("F0,,\n", "line 1 has 3 columns for 2 stages"),
        ("F0\n", "line 1 has 1 column for 2 stages"),
        ("# mine\nF0,\n\nF1,F0,\n", "line 4 has 3 columns"),
        ("stage 0,stage 1,stage 2\n", "line 1 has 3 columns"),
        ("stage 0,stage 2\n", "line 1 does not name the stages in order"),
        ("F0,\nstage 0,stage 1\n", "line 2: 'stage 0' is no cell"),
        ("F0,\nG1,\n", "line 2: 'G1' is no cell"),
        ("F,\n", "'F' is no cell"),
        ("f0,\n", "'f0' is no cell"),
        ("F-1,\n", "'F-1' is no cell"),
        ("F0.,\n", "'F0.' is no cell"),
        ("F1e3,\n", "'F1e3' is no cell"),
        ("F٣,\n", "is no cell"),
        ("F99999999999999999999,\n", "is no cell"),
        ("F0 F1,\n", "'F0 F1' is no cell"),
        ("F0;\n", "has 1 column"),
        ("F" * 200_000 + ",\n", "line 1 cannot be taken apart"),
        ("# placement: w\nF0,\n", "line 1: placement 'w' is unknown"),
        ("F2,\n", "F2 at tick 0, stage 0 is of microbatch 2, and there are 2 microbatches; count from 0 to 1"),
        ("# placement: v\nF0.2,\n", "placement v has 2 chunks"),
        ("F0,\nF0,\n", "F0 at tick 1, stage 0 does again what F0 at tick 0, stage 0 has done"),
        (GOOD.replace(",BW1", ","), "BW1 is missing on stage 1"),
        (GOOD.replace(",BW1", ",B1"), "W1 is missing on stage 1"),
        (GOOD.replace("\nBW1", "\nBW0"), "BW0 at tick 5, stage 0 does again"),
    ],
)
def test_files_that_are_none(tmp_path, text, way_out):
    path = tmp_path / "mine.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SpecError) as error:
        read_csv(path, 2, 2)
    assert way_out in str(error.value)
    assert str(error.value).startswith(f"schedule {path}: ") and "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(SpecError, match="cannot be read: No such file"):
        read_csv(tmp_path / "no.csv", 2, 2)
    with pytest.raises(SpecError, match="cannot be read: Is a directory"):
        read_csv(tmp_path, 2, 2)
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00F")
    with pytest.raises(SpecError, match="no UTF-8 text"):
        read_csv(tmp_path / "bytes.csv", 2, 2)
    with pytest.raises(SpecError, match="cannot be written"):
        write_csv(make("1f1b", 2, 2), tmp_path / "no" / "folder.csv")


def test_a_name_or_a_file(tmp_path):
    path = tmp_path / "mine.csv"
    write_csv(make("interleaved", 2, 4, 2), path)
    assert load(str(path), 2, 4).table == load(str(path), 2, 4, 2).table == load("interleaved", 2, 4).table
    with pytest.raises(SpecError, match="its cells are of 2 chunks, and 3 are asked for"):
        load(str(path), 2, 4, 3)
    with pytest.raises(SpecError, match="did you mean 'interleaved'"):
        load("interleave", 2, 4)


BAD_ROWS = {
    "early": (
        ["F0 F0", "BW0 BW0"],
        "F0 at tick 0, stage 1 comes too early: F0 at tick 0, stage 0 must be done by then; tick 1 would do",
    ),
    "early backward": (
        ["F0 .", "BW0 F0", ". BW0"],
        "BW0 at tick 1, stage 0 comes too early: BW0 at tick 2, stage 1 must be done by then; tick 3 would do",
    ),
    "at once": (
        ["F0 .", ". F0", "BW0 BW0"],
        "BW0 at tick 2, stage 0 comes too early: BW0 at tick 2, stage 1 must be done by then; tick 3 would do",
    ),
    "W before B": (["F0 .", ". F0", ". W0", ". B0", "BW0 ."], "W0 on stage 1 waits for B0 on stage 1, which comes"),
    "no last backward": (["F0 .", ". F0", "BW0 ."], "BW0 is missing on stage 1"),
    "both ways": (["F0 .", ". F0", ". BW0", "BW0 W0"], "W0 at tick 3, stage 1 does again what BW0 at tick 2, stage 1"),
    "ragged": (["F0 .", "F0"], "tick 1 has 1 cells for 2 stages"),
    "one stage": (["F0", "BW0"], "stages=1"),
    "none": ([], "no ticks"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_that_are_none(name):
    rows, way_out = BAD_ROWS[name]
    with pytest.raises(SpecError) as error:
        of_rows(rows)
    assert way_out in str(error.value)


def test_cells_that_are_none():
    for cell, way_out in (
        (Cell("X", 0), "X0 at tick 0, stage 0 is none of F, B, W and BW"),
        (Cell("F", 0, 1), "is of chunk 1, and there is 1 chunk; count from 0 to 0"),
        (Cell("F", -1), "is of microbatch -1"),
    ):
        with pytest.raises(SpecError) as error:
            validate(Schedule("mine", 2, 1, 1, "ring", ((cell, None),)))
        assert way_out in str(error.value)


def test_the_limit_of_memory():
    for name, most in (("1f1b", 4), ("gpipe", 8), ("zb-h2", 7), ("zb-v", 8), ("dualpipev", 9)):
        schedule = make(name, 4, 8)
        validate(schedule, memory=most)
        with pytest.raises(SpecError, match=rf"is activation {most} that the stage keeps at once, and {most - 1} is"):
            validate(schedule, memory=most - 1)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_table_with_one_thing_wrong_is_refused_or_runs(data):
    """Whatever is done to a table, what is still accepted is a schedule by definition."""
    schedule = at_random(data.draw(st.integers(0, 50)))
    table = [list(row) for row in schedule.table]
    cells = [(tick, stage) for tick, stage, _ in schedule.cells()]
    (a, s), (b, t) = data.draw(st.sampled_from(cells)), data.draw(st.sampled_from(cells))
    change = data.draw(st.sampled_from(("swap", "drop", "double", "move", "rename")))
    if change == "swap":
        table[a][s], table[b][t] = table[b][t], table[a][s]
    elif change == "drop":
        table[a][s] = None
    elif change == "double":
        table[b][t] = table[a][s]
    elif change == "move":
        row = data.draw(st.integers(0, len(table) - 1))
        table[row][s], table[a][s] = table[a][s], table[row][s]
    else:
        table[a][s] = Cell(data.draw(st.sampled_from(("F", "B", "W", "BW"))), table[a][s].microbatch, table[a][s].chunk)
    changed = Schedule(
        "changed", schedule.stages, schedule.microbatches, schedule.chunks, schedule.placement, tuple(map(tuple, table))
    )
    expected = runs(changed)
    try:
        validate(changed)
    except SpecError as error:
        assert not expected and "\n" not in str(error)
    else:
        assert expected


def runs(schedule):
    """The definition of a schedule, written down again: tick by tick, each cell once, after what it needs."""
    done = set()
    for row in schedule.table:
        now = []
        for stage, cell in enumerate(row):
            if cell is None:
                continue
            part = schedule.part(stage, cell.chunk)
            forward, after = ("F", cell.microbatch, part), ("B", cell.microbatch, part + 1)
            needed = {
                "F": {("F", cell.microbatch, part - 1)} if part else set(),
                "W": {("B", cell.microbatch, part)},
            }.get(cell.kind, {forward} | ({after} if part + 1 < schedule.parts else set()))
            work = [(kind, cell.microbatch, part) for kind in cell.kind]
            if not needed <= done or done & {*work}:
                return False
            now += work
        done |= {*now}
    return len(done) == 3 * schedule.parts * schedule.microbatches


def test_a_table_has_no_name_of_a_schedule_of_its_own():
    with pytest.raises(SpecError, match="that is the name of a schedule of its own"):
        of_rows(["F0 .", ". F0", ". BW0", "BW0 ."], name="1f1b")


@pytest.mark.parametrize("rows", [5, "F0 .", [5], [[1, 2]], [None]])
def test_what_is_no_table_is_told(rows):
    with pytest.raises(SpecError, match="is no table|is no row of cells"):
        of_rows(rows)


def test_what_is_no_file_with_a_table_is_told(tmp_path):
    pipe, other, large = tmp_path / "pipe.csv", tmp_path / "table.txt", tmp_path / "large.csv"
    os.mkfifo(pipe)
    other.write_text("F0,\n")
    with large.open("wb") as file:
        file.truncate(files.MOST_BYTES + 1)
    for path, sentence in ((pipe, "no file with a table"), (other, "ends in .csv; rename it"), (large, "name another file")):
        with pytest.raises(SpecError, match=sentence):
            load(str(path), 2, 1)


def test_a_chunk_that_no_stage_can_have_is_named(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("F0.9999,\n")
    with pytest.raises(SpecError, match=r"F0\.9999 is of chunk 9999; 2047 is the highest there is"):
        load(str(path), 2, 1)


@pytest.mark.parametrize("memory", [0, -1, True, "a", 1.5])
def test_a_bound_of_memory_is_a_number_of_activations(memory):
    with pytest.raises(SpecError, match="no number of activations; choose 1 or more"):
        validate(make("1f1b", 2, 2), memory)
