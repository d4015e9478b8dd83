"""The schedules that have a name: that each can run, and is the one of its paper."""

import pytest

from jaxllm.schedules import Cell, default_chunks, make, named, names, source
from jaxllm.schedules.counts import slots
from jaxllm.schedules.order import lay_out
from jaxllm.schedules.table import Schedule
from jaxllm.schedules.validity import validate
from jaxllm.spec.errors import SpecError
from tests.schedules.sizes import every


def lines(schedule):
    """A line for each stage."""
    return [" ".join(str(row[s] or ".") for row in schedule.table) for s in range(schedule.stages)]


def test_names():
    assert names() == ("1f1b", "circular", "dualpipev", "gpipe", "interleaved", "zb-h1", "zb-h2", "zb-v")
    assert {name: default_chunks(name) for name in names()} == {
        "1f1b": 1, "circular": 2, "dualpipev": 2, "gpipe": 1, "interleaved": 2, "zb-h1": 1, "zb-h2": 1, "zb-v": 2
    }  # fmt: skip
    assert all(source(name) for name in names())


def test_every_one_is_valid():
    for schedule in every():
        validate(schedule)


def test_the_same_one_is_made_once():
    assert make("zb-v", 4, 8) is make("zb-v", 4, 8)


def test_a_new_module_is_found(tmp_path, monkeypatch):
    (tmp_path / "serial.py").write_text(
        "from jaxllm.schedules import Cell\n"
        "from jaxllm.schedules.named import Named\n"
        "from jaxllm.schedules.order import lay_out\n"
        "def serial(p, m, v):\n"
        "    return lay_out('serial', p, m, v, [[Cell(k, i) for i in range(m) for k in ('F', 'BW')]] * p)\n"
        "SERIAL = Named('serial', serial, 'nowhere')\n"
    )
    monkeypatch.setattr(named, "__path__", [*named.__path__, str(tmp_path)])
    named.registry.cache_clear()
    try:
        assert "serial" in names()
        assert make("serial", 3, 2).ticks == 12
    finally:
        named.registry.cache_clear()


def test_gpipe():
    assert lines(make("gpipe", 2, 3)) == ["F0 F1 F2 . . BW2 BW1 BW0", ". F0 F1 F2 BW2 BW1 BW0 ."]


def test_one_f_one_b():
    assert lines(make("1f1b", 3, 4)) == [
        "F0 F1 F2 . . BW0 F3 BW1 . BW2 . BW3",
        ". F0 F1 . BW0 F2 BW1 F3 BW2 . BW3 .",
        ". . F0 BW0 F1 BW1 F2 BW2 F3 BW3 . .",
    ]


def test_zb_h1():
    assert lines(make("zb-h1", 3, 4)) == [
        "F0 F1 F2 . . B0 W0 F3 B1 W1 B2 W2 B3 W3",
        ". F0 F1 . B0 F2 B1 W0 F3 B2 W1 B3 W2 W3",
        ". . F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3",
    ]


def test_zb_h2():
    assert lines(make("zb-h2", 2, 4)) == [
        "F0 F1 F2 B0 W0 F3 B1 W1 B2 W2 B3 W3 .",
        ". F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3",
    ]


def test_interleaved_as_in_megatron():
    """Figure 4 of Narayanan et al. 2021: 4 stages, 8 microbatches, 2 chunks."""
    schedule = make("interleaved", 4, 8, 2)
    assert " ".join(map(str, schedule.orders[3][:12])) == "F0 F1 F2 F3 F0.1 BW0.1 F1.1 BW1.1 F2.1 BW2.1 F3.1 BW3.1"
    assert " ".join(map(str, schedule.orders[0][:14])) == "F0 F1 F2 F3 F0.1 F1.1 F2.1 F3.1 F4 F5 F6 BW0.1 F7 BW1.1"


def test_circular_is_a_loop_over_ticks_and_its_mirror_image():
    for p, m, v in ((2, 2, 2), (3, 4, 2), (4, 4, 3), (4, 9, 2)):
        schedule = make("circular", p, m, v)
        half = v * m + p - 1
        assert schedule.ticks == 2 * half
        for tick, stage, cell in schedule.cells():
            forward = cell.chunk * m + cell.microbatch + stage
            assert tick == (forward if cell.kind == "F" else 2 * half - 1 - forward)


def test_zb_v():
    assert lines(make("zb-v", 2, 3)) == [
        "F0 F1 F2 F0.1 B0.1 W0.1 F1.1 B1.1 W1.1 B0 W0 F2.1 B2.1 B1 W2.1 B2 W1 W2 .",
        ". F0 F0.1 F1 F1.1 B0.1 W0.1 F2 B0 W0 F2.1 B1.1 B1 B2.1 B2 W1.1 W1 W2.1 W2",
    ]


def test_dualpipev_in_its_eight_steps():
    """The first and last stage of the picture in DeepSeek's repository: 4 stages, 10 microbatches."""
    orders = [" ".join(map(str, order)) for order in make("dualpipev", 4, 10).orders]
    assert orders[0] == (
        "F0 F1 F2 F3 F4 F5 F6 F0.1 B0.1 W0.1 F1.1 B1.1 W1.1 F2.1 B2.1 W2.1 F3.1 F7 BW3.1 F4.1 BW0 F8 BW4.1 F5.1 BW1 "
        "F9 BW5.1 F6.1 BW2 BW6.1 F7.1 BW3 BW7.1 F8.1 BW4 BW8.1 F9.1 BW5 BW9.1 B6 W6 B7 W7 B8 W8 B9 W9"
    )
    assert orders[3].startswith("F0 F0.1 F1 F1.1 F2 F2.1 F3 F3.1 F4 BW0.1 F4.1 BW0 F5 BW1.1")
    assert orders[3].endswith("F9.1 BW5 BW6.1 BW6 BW7.1 BW7 B8.1 B8 B9.1 B9 W8.1 W8 W9.1 W9")


def test_published_for_more_microbatches_and_cut():
    """A schedule that is made for a multiple is the order of that multiple without the rest."""
    for name, p, m, whole in (("interleaved", 4, 6, 8), ("dualpipev", 4, 5, 8)):
        kept = [[cell for cell in order if cell.microbatch < m] for order in make(name, p, whole).orders]
        assert [list(order) for order in make(name, p, m).orders] == kept


def test_activations_that_are_kept():
    """The peaks of the papers, for each stage, in activations of a chunk."""
    for p in (2, 3, 4, 8):
        for m in (p, 2 * p, 4 * p):
            def stash(name, v=1, p=p, m=m):
                return [peak.stash for peak in slots(make(name, p, m, v)).stages]

            def weights(name, p=p, m=m):
                return [peak.weights for peak in slots(make(name, p, m)).stages]

            stages = range(p)
            assert stash("gpipe") == [m] * p
            assert stash("1f1b") == stash("zb-h1") == [p - s for s in stages]
            # Korthikanti et al. 2022, 2205.05198, section 4.2.3: p (1 + (p - 1) / (p v)) whole stages on the first
            assert stash("interleaved", 3) == [min(3 * m, 2 * (p - 1 - s) + 2 * p + 1) for s in stages]
            assert stash("circular", 2) == [2 * m] * p
            assert max(stash("zb-v", 2)) == 2 * p
            # Qi et al. 2023, 2401.10241, section 2.3, with the stages from 0
            assert weights("zb-h1") == [min(m, s + 1) for s in stages]
            if m >= 2 * p:
                assert stash("zb-h2") == [2 * (p - s) - 1 for s in stages]
                assert weights("zb-h2") == [min(m, 2 * s + 1) for s in stages]
                # DeepSeek-AI, repository DualPipe: one more than there are parts
                assert stash("dualpipev", 2) == [2 * p + 1] * p


def test_parts_that_follow_each_other_are_on_one_stage_or_on_neighbours():
    for p in (2, 3, 5):
        for placement, v in (("ring", 1), ("ring", 3), ("v", 2)):
            shape = Schedule("shape", p, 1, v, placement, ())
            for part in range(shape.parts):
                assert shape.part(*shape.owner(part)) == part
                if part:
                    assert (shape.owner(part)[0] - shape.owner(part - 1)[0]) % p in (0, 1, p - 1)


@pytest.mark.parametrize(
    "arguments, way_out",
    [
        (("1f1c", 4, 8), "did you mean '1f1b'"),
        (("zero", 4, 8), "known: 1f1b, circular"),
        (("1f1b", 1, 8), "stages=1 is out of range; choose a whole number from 2 to 1,024"),
        (("1f1b", 0, 8), "stages=0"),
        (("1f1b", -4, 8), "stages=-4"),
        (("1f1b", 2.5, 8), "stages=2.5"),
        (("1f1b", True, 8), "stages=True"),
        (("1f1b", "4", 8), "stages='4'"),
        (("1f1b", 1025, 8), "stages=1025"),
        (("1f1b", 4, 0), "microbatches=0"),
        (("1f1b", 4, 100_001), "100,000"),
        (("1f1b", 4, 8, 0), "chunks=0"),
        (("1f1b", 4, 8, 2), "take 1, or interleaved"),
        (("zb-v", 4, 8, 3), "take 2, or interleaved"),
        (("zb-v", 4, 8, 1), "take 2, or 1f1b"),
        (("interleaved", 4, 8, 1), "take 2, or 1f1b"),
        (("interleaved", 1024, 1024, 5), "take 4 chunks or fewer"),
        (("gpipe", 1000, 1000), "333 microbatches or fewer"),
        (("interleaved", 4, 3), "take 4 microbatches or more, or 1f1b"),
        (("circular", 4, 3), "take 4 microbatches or more"),
        (("zb-v", 4, 3), "take 4 microbatches or more"),
        (("dualpipev", 4, 3), "take 4 microbatches or more"),
    ],
)
def test_what_cannot_be_made(arguments, way_out):
    with pytest.raises(SpecError) as error:
        make(*arguments)
    assert way_out in str(error.value) and str(error.value).startswith("schedule")


def test_orders_that_wait_for_each_other():
    with pytest.raises(SpecError) as error:
        lay_out("mine", 2, 2, 1, [[Cell("F", 0), Cell("BW", 0), Cell("F", 1), Cell("BW", 1)],
                                  [Cell("F", 0), Cell("F", 1), Cell("BW", 0), Cell("BW", 1)]])  # fmt: skip
    assert str(error.value) == (
        "schedule mine: these wait for each other: BW0 on stage 0 waits for BW0 on stage 1, which comes after F1 there"
        "; F1 on stage 1 waits for F1 on stage 0, which comes after BW0 there; change the order of one of them."
    )


def test_orders_that_wait_for_nothing_there():
    with pytest.raises(SpecError, match="F0 on stage 1 waits for F0 on stage 0, which is nowhere in the table"):
        lay_out("mine", 2, 1, 1, [[], [Cell("F", 0)]])


def test_shapes_that_are_none():
    with pytest.raises(SpecError, match="did you mean 'ring'"):
        Schedule("mine", 2, 1, 1, "rings", ())
    with pytest.raises(SpecError, match="has 2 chunks on a stage"):
        Schedule("mine", 2, 1, 3, "v", ())
    with pytest.raises(SpecError, match="tick 1 has 1 cells for 2 stages"):
        Schedule("mine", 2, 1, 1, "ring", ((None, None), (None,)))
