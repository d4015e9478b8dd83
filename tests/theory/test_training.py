"""FLOPs of a token against figures of others and against predict; days against what is published."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jaxllm.spec.errors import SpecError
from jaxllm.spec.layout import Layout
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.workload import Workload
from jaxllm.theory import flops_per_token, predict, training_days
from jaxllm.theory.training import counts

LLAMA, GPT = ModelConfig.load("llama-3.1-8b"), ModelConfig.load("gpt3-175b")


def test_llama_in_both_conventions():
    """Without the embedding 6 FLOPs a parameter, and 12 L N H T for attention over the square (scaling book, chapter 4)."""
    dense = 6 * (LLAMA.parameters - LLAMA.vocab * LLAMA.d_model - (2 * LLAMA.layers + 1) * LLAMA.d_model)
    square = 12 * LLAMA.layers * LLAMA.heads * LLAMA.head_dim
    assert flops_per_token(LLAMA, 8192) == dense + square * 8192 == 57_912_852_480
    assert flops_per_token(LLAMA, 8192, causal=True) == dense + square * 8193 // 2 == 51_471_187_968


def test_narayanan_equation_3():
    """F = 96 B s l h^2 (1 + s/(6h) + V/(16 l h)), with one recomputation; that of the exact count leaves out the last
    matmul of each block, 2 x 4 h^2 a token."""
    s, l, h, V = 2048, GPT.layers, GPT.d_model, GPT.vocab
    paper = 96 * l * h**2 * (1 + s / (6 * h) + V / (16 * l * h))
    assert flops_per_token(GPT, s, remat="full") == pytest.approx(paper - 8 * l * h**2, rel=1e-12)
    assert flops_per_token(GPT, s) == pytest.approx(paper - 24 * l * h**2 - 4 * l * h * s, rel=1e-12)


@pytest.mark.parametrize("name", ["llama-tiny", "gpt-tiny", "llama-3.2-1b"])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_it_is_the_matmuls_of_predict(name, remat):
    model = ModelConfig.load(name)
    ledger = predict(model, Layout(remat=remat), Workload(batch=3, sequence=64))
    assert flops_per_token(model, 64, remat=remat) * 3 * 64 == sum(line.value for line in ledger.section("flops"))


def test_a_token_alone_attends_to_itself():
    assert flops_per_token(LLAMA, 1, causal=True) == flops_per_token(LLAMA, 1)
    odd = replace(LLAMA, heads=3, kv_heads=3, head_dim=2, layers=1)
    assert flops_per_token(odd, 5) - flops_per_token(odd, 5, causal=True) == 12 * 6 * 2  # of 5 positions 3 in the mean


def test_counts_of_a_model():
    rule, exact, causal = counts(LLAMA, 8192, "full")
    assert (rule.name, rule.model, rule.hardware) == ("8 P", 6 * LLAMA.parameters, 8 * LLAMA.parameters)
    assert (exact.model, exact.hardware) == (flops_per_token(LLAMA, 8192), flops_per_token(LLAMA, 8192, remat="full"))
    assert causal.model < exact.model < exact.hardware and causal.hardware < exact.hardware
    assert all(count.model == count.hardware for count in counts(LLAMA, 8192, "none"))
    assert counts(LLAMA, 8192, "none")[0].name == "6 P"


def test_published_days():
    """Narayanan et al. 2021, section 5.1: 34 and 84 days by 8TP/(nX)."""
    assert training_days(8 * 175e9, 300e9, 1024, 140e12) == pytest.approx(33.91, abs=0.005)
    assert training_days(8 * 1e12, 450e9, 3072, 163e12) == pytest.approx(83.21, abs=0.005)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_days_of_nothing_are_refused(place, value) -> None:
    given = [1.0, 1.0, 1, 1.0]
    given[place] = value
    with pytest.raises(SpecError, match=f"={value} is not above 0"):
        training_days(*given)


def test_what_does_not_go_together():
    with pytest.raises(SpecError, match="33,554,432 is longer than"):
        flops_per_token(LLAMA, 2**25)
    with pytest.raises(SpecError, match="remat='half' is unknown"):
        flops_per_token(LLAMA, 8, remat="half")
