"""What a backend emitted is put beside the line that it is of, where that can be told."""

from jaxllm.hlo.emitted import put_beside
from jaxllm.spec.ledger import Line

NORM = Line("collectives", "all-reduce", 4, axes=("pipe",), phase="update", dtype="f32")
LOSS = Line("collectives", "all-reduce", 4, axes=("pipe",), phase="forward", dtype="f32")
EMITTED = {("all-reduce", ("pipe",), "", "f32"): 4}


def test_a_collective_without_a_phase_is_of_the_one_line_that_lacks_as_much():
    (line,), notes = put_beside((NORM,), EMITTED, "gpu")
    assert (line.emitted, notes) == (4, ())


def test_of_two_lines_it_cannot_be_told_and_is_noted():
    lines, (note,) = put_beside((NORM, LOSS), EMITTED, "gpu")
    assert [line.emitted for line in lines] == [0, 0]
    assert note == "emitted: all-reduce of 4 bytes of f32 over pipe, phase unknown"


def test_of_another_size_it_is_none_of_the_line():
    (line,), notes = put_beside((NORM,), {("all-reduce", ("pipe",), "", "f32"): 8}, "gpu")
    assert line.emitted == 0 and len(notes) == 1
