"""How layers are shared out among the parts of a pipeline."""

import itertools

import pytest

from jaxllm.schedules import make
from jaxllm.spec.errors import SpecError
from jaxllm.spec.layout import Layout
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.workload import Workload
from jaxllm.theory.partition import runs, stages_of
from jaxllm.theory.stages import even

TINY = ModelConfig.load("llama-tiny")


def owners(name: str, stages: int) -> list[int]:
    schedule = make(name, stages, 2 * stages)
    return [schedule.owner(part)[0] for part in range(schedule.parts)]


def test_llama_405b_has_a_layer_fewer_at_both_ends():
    assert even(126, owners("1f1b", 16)) == (7, *[8] * 14, 7)


@pytest.mark.parametrize(("name", "stages"), list(itertools.product(("1f1b", "interleaved", "zb-v", "dualpipev"), (2, 3, 4, 8))))
def test_even_is_even_by_part_and_by_stage(name, stages):
    owner = owners(name, stages)
    for layers in range(len(owner), 5 * len(owner)):
        sizes = even(layers, owner)
        held = [sum(size for size, of in zip(sizes, owner, strict=True) if of == stage) for stage in range(stages)]
        assert sum(sizes) == layers
        assert max(sizes) - min(sizes) <= 1 and max(held) - min(held) <= 1


def test_runs_are_put_together():
    assert runs((7, *[8] * 14, 7)) == "7, 14 x 8, 7"
    assert runs((1, 1, 2)) == "1, 1, 2"


@pytest.mark.parametrize("virtual", [0, 2])
def test_chunks_of_a_ring_divide_the_layers_or_are_shared_out(virtual):
    layout, work = Layout(pipe=3, schedule="interleaved", microbatches=3, virtual=virtual), Workload(3, 8, "f32")
    with pytest.raises(SpecError, match="virtual=2 does not divide the 16 layers of llama-tiny over pipe=3 .* or partition=time"):
        stages_of(TINY, layout, work)
    shared = Layout(pipe=3, schedule="interleaved", microbatches=3, virtual=virtual, partition="time")
    assert sum(stages_of(TINY, shared, work).sizes) == 16


def test_fewer_chunks_are_a_way_out_of_too_many_parts():
    layout = Layout(pipe=8, schedule="interleaved", microbatches=8, virtual=4)
    with pytest.raises(SpecError, match="take 4 stages or fewer, or virtual=2"):
        stages_of(TINY, layout, Workload(8, 8, "f32"))


def test_equal_numbers_in_a_row_are_put_together_from_three_on():
    assert runs([7, 8, 8, 8, 7]) == "7, 3 x 8, 7"
    assert runs([7, 8, 8, 7]) == "7, 8, 8, 7"
