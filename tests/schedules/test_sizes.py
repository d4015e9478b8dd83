"""Closed forms of ticks and buffers, against the tables."""

from dataclasses import astuple

import numpy as np
import pytest

from jaxllm.schedules import default_chunks, make, names
from jaxllm.schedules.counts import slots
from jaxllm.schedules.named import registry
from jaxllm.schedules.sizes import Sizes, known, sizes
from jaxllm.spec.errors import SpecError

STAGES = (2, 3, 4, 5)
# Beyond small ones: where the patterns change, and those whose inputs pile up where the last group is not full.
LARGER = {
    "1f1b": [(11, 10, 1), (16, 40, 1)],
    "gpipe": [(11, 10, 1), (16, 20, 1)],
    "zb-h1": [(11, 10, 1), (16, 17, 1), (16, 40, 1)],
    "zb-h2": [(11, 20, 1), (11, 21, 1), (16, 31, 1), (16, 40, 1)],
    "zb-v": [(9, 9, 2), (9, 17, 2), (11, 30, 2), (16, 16, 2), (16, 31, 2)],
    "dualpipev": [(9, 13, 2), (11, 20, 2), (11, 22, 2), (16, 25, 2), (16, 32, 2)],
    "circular": [(9, 9, 2), (9, 13, 3), (16, 20, 2)],
    "interleaved": [(8, 16, 2), (9, 9, 4), (11, 21, 2), (12, 23, 2), (14, 27, 6), (16, 30, 2), (16, 32, 2), (20, 37, 3)],
}


def counted(p, m, v, name):
    schedule = make.__wrapped__(name, p, m, v)  # no table is needed twice
    needs = slots.__wrapped__(schedule)
    return Sizes(schedule.ticks, needs.stash, needs.weights, needs.inputs)


def some(name):
    """Sizes that the schedule can have."""
    least, most = registry()[name].chunks
    for p in STAGES:
        for v in {least, most or least + (1 if p > 3 else 2)}:
            for m in range(p if registry()[name].fills else 1, 3 * p + 2):
                yield p, m, v
    yield from LARGER[name]


@pytest.mark.parametrize("name", names())
def test_they_are_those_of_the_table(name):
    held = 0
    for size in some(name):
        if known(name, *size):
            assert sizes(name, *size) == counted(*size, name), size
            held += 1
    assert held > 25
    assert all(known(name, *size) for size in LARGER[name])


def test_interleaved_is_known_wherever_stages_divide_the_microbatches_and_with_two_chunks():
    p, m, v = np.meshgrid(np.arange(2, 65), np.arange(1, 400), np.arange(2, 7))
    holds = known("interleaved", p, m, v)
    assert holds[(m >= p) & ((m % p == 0) | (v == 2))].all()
    assert not holds[m < p].any() and not holds.all()


def test_zb_v_is_not_known_in_between():
    assert [m for m in range(1, 20) if not known("zb-v", 6, m, 2)] == [1, 2, 3, 4, 5, 7, 8, 9, 10]
    assert all(sizes("zb-v", 6, m, 2).stash == counted(6, m, 2, "zb-v").stash for m in range(6, 12))


@pytest.mark.parametrize("name", names())
def test_arrays_are_what_integers_are(name):
    p, m, v = (each.ravel() for each in np.meshgrid(np.arange(2, 13), np.arange(1, 40), np.arange(1, 4)))
    many, holds = sizes(name, p, m, v), known(name, p, m, v)
    cases = list(zip(p.tolist(), m.tolist(), v.tolist(), strict=True))
    assert [tuple(row) for row in np.stack(astuple(many), axis=1).tolist()] == [astuple(sizes(name, *case)) for case in cases]
    assert holds.tolist() == [known(name, *case) for case in cases]
    assert all(type(value) is int for value in astuple(sizes(name, *cases[0]))) and type(known(name, *cases[0])) is bool


def test_one_count_that_varies_is_enough():
    m = np.array([4, 8, 12])
    found = sizes("dualpipev", 4, m, 2)
    assert found.inputs.tolist() == [2, 2, 2] and found.ticks.tolist() == [make("dualpipev", 4, k).ticks for k in (4, 8, 12)]
    assert known("dualpipev", 4, m, 2).tolist() == [True] * 3 and known("1f1b", 4, m, default_chunks("1f1b")).all()


def test_what_a_schedule_cannot_have_is_not_known():
    assert not known("1f1b", 1, 8, 1) and not known("1f1b", 4, 0, 1) and not known("1f1b", 4, 8, 2)
    assert not known("circular", 4, 3, 2) and not known("circular", 4, 8, 1) and known("circular", 4, 8, 7)
    with pytest.raises(SpecError, match="did you mean 'zb-v'"):
        sizes("zb-w", 4, 8, 2)
