"""The plan of a schedule, run: every buffer holds what the cell that reads it expects, and none is needed in vain."""

import pytest

from jaxllm.schedules import make, names
from jaxllm.schedules.counts import plan, slots, traffic, transfers
from jaxllm.schedules.order import lay_out
from jaxllm.schedules.validity import validate
from tests.schedules.sizes import at_random, every, sizes


def run(schedule):
    """An interpreter that moves names of values: what a program does with arrays."""
    p, last = schedule.stages, schedule.parts - 1
    bound = slots(schedule)
    inputs = [[None] * bound.inputs for _ in range(p)]
    stash = [[None] * bound.stash for _ in range(p)]
    weights = [[None] * bound.weights for _ in range(p)]
    done = []
    for row in plan(schedule):
        up, down, own = [None] * p, [None] * p, [None] * p
        for s, step in enumerate(row):
            if not step.kind:
                continue
            part, mb = schedule.part(s, step.chunk), step.microbatch
            assert (step.first, step.last) == (part == 0, part == last)
            done.append((step.kind, mb, part))
            if step.kind == "F":
                if not step.first:
                    assert inputs[s][step.input_slot] == ("activation", mb, part)
                assert (step.input_slot == -1) == step.first
                stash[s][step.stash_slot] = (mb, part)
                sent = ("cotangent", mb, part) if step.last else ("activation", mb, part + 1)
                to = (s, part) if step.last else (schedule.owner(part + 1)[0], part + 1)
            elif step.kind == "W":
                assert weights[s][step.weight_slot] == (mb, part)
                assert step.input_slot == step.stash_slot == -1
                continue
            else:
                assert inputs[s][step.input_slot] == ("cotangent", mb, part)
                assert stash[s][step.stash_slot] == (mb, part)
                assert (step.weight_slot == -1) == (step.kind == "BW")
                if step.kind == "B":
                    weights[s][step.weight_slot] = (mb, part)
                if not part:
                    continue
                sent, to = ("cotangent", mb, part - 1), (schedule.owner(part - 1)[0], part - 1)
            if to[0] == s:
                own[s] = sent
            else:
                forward = step.kind == "F"
                goes_up = forward if schedule.placement == "ring" or step.chunk == 0 else not forward
                assert to[0] == (s + (1 if goes_up else -1)) % p
                (up if goes_up else down)[s] = sent
        for s, step in enumerate(row):
            for slot, value in (
                (step.from_left, up[(s - 1) % p]), (step.from_right, down[(s + 1) % p]), (step.from_self, own[s])
            ):  # fmt: skip
                assert (slot == -1) == (value is None)
                if value is not None:
                    inputs[s][slot] = value
    return done


def check(schedule):
    """Runs it, and looks whether everything is done, once."""
    done = run(schedule)
    works = {(kind, mb, part) for kinds, mb, part in done for kind in kinds}
    assert len(works) == sum(len(kind) for kind, _, _ in done)
    assert works == {
        (kind, mb, part) for kind in "FBW" for mb in range(schedule.microbatches) for part in range(schedule.parts)
    }


@pytest.mark.parametrize("name", names())
def test_every_buffer_holds_what_is_read(name):
    for size in sizes(name):
        check(make(name, *size))


def test_of_any_schedule_that_can_run():
    for seed in range(150):
        schedule = at_random(seed)
        validate(schedule)
        check(schedule)


def test_of_the_forwards_alone():
    """What an evaluation runs: nothing is kept for a backward, and the loss's cotangent goes nowhere."""
    for schedule in map(at_random, range(40)):
        orders = [[cell for cell in order if cell.kind == "F"] for order in schedule.orders]
        v, placement = schedule.chunks, schedule.placement
        forwards = lay_out("forwards", schedule.stages, schedule.microbatches, v, orders, placement)
        assert (slots(forwards).stash, slots(forwards).weights) == (0, 0)
        steps = [step for row in plan(forwards) for step in row]
        assert sum(step.kind == "F" for step in steps) == schedule.parts * schedule.microbatches
        arrivals = sum(slot != -1 for step in steps for slot in (step.from_left, step.from_right, step.from_self))
        assert arrivals == (schedule.parts - 1) * schedule.microbatches
        assert all(step.stash_slot == step.weight_slot == -1 for step in steps)


def live(schedule, stage):
    """The most buffers of each kind that are taken at once, counted tick by tick from the definition."""
    t = schedule.ticks_of
    inputs, stash, weights = [], [], []
    for tick, cell in zip(schedule.starts[stage], schedule.orders[stage], strict=True):
        part, mb = schedule.part(stage, cell.chunk), cell.microbatch
        if cell.kind == "F":
            if part:
                inputs.append((t["F", mb, part - 1] + 1, tick))
            continue
        if cell.kind == "W":
            weights.append((t["B", mb, part], tick))
            continue
        stash.append((t["F", mb, part], tick))
        made = t["F", mb, part] if part == schedule.parts - 1 else t["B", mb, part + 1]
        inputs.append((made + 1, tick))
    return tuple(
        max((sum(a <= now <= b for a, b in kept) for now in range(schedule.ticks)), default=0)
        for kept in (inputs, stash, weights)
    )


def test_no_more_slots_than_are_taken_at_once():
    for schedule in (*every((2, 3, 4)), *map(at_random, range(60))):
        given = slots(schedule)
        for stage, peak in enumerate(given.stages):
            assert (peak.inputs, peak.stash, peak.weights) == live(schedule, stage)
        for kind in ("inputs", "stash", "weights"):
            assert getattr(given, kind) == max(getattr(peak, kind) for peak in given.stages)


def test_what_is_sent():
    p, m = 4, 8
    for name, chunks, edges in (("1f1b", 1, p - 1), ("interleaved", 3, 3 * p - 1), ("zb-v", 2, 2 * (p - 1))):
        sent = transfers(make(name, p, m, chunks))
        assert sum(one.total for one in sent) == 2 * m * edges
        assert traffic(sent, p, m) == pytest.approx(edges / (p - 1))
    up_down = [(s.activations_up, s.activations_down, s.cotangents_up, s.cotangents_down) for s in sent]
    assert up_down == [(m, 0, m, 0), (m, m, m, m), (m, m, m, m), (0, m, 0, m)]


def test_two_stages_are_on_both_sides_of_each_other():
    """What goes up comes from the left and what goes down from the right, also where left and right are one stage."""
    for name in ("1f1b", "interleaved", "zb-v"):
        rows = plan(make(name, 2, 4))
        left = sum(step.from_left != -1 for row in rows for step in row)
        right = sum(step.from_right != -1 for row in rows for step in row)
        assert left == right == {"1f1b": 4, "interleaved": 12, "zb-v": 8}[name]
