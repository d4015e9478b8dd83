"""`max`: the largest workload that fits, by closed form, and by less when a compile has found that too hopeful."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest

import jaxllm.check as pipeline
from jaxllm.report.compare import Comparison, compare
from jaxllm.spec.errors import SpecError
from jaxllm.spec.layout import Layout
from jaxllm.spec.machine import Machine
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.workload import Workload
from jaxllm.theory import predict

MODEL, LAYOUT, MESH = ModelConfig.load("llama-3.2-1b"), Layout.parse("data=8,remat=full"), Machine.load("h100:8")


def compiled_at(factor: float, workload: Workload) -> Comparison:
    """As if a compiler took `factor` times what the closed form has beside state and gradients."""
    ledger = predict(MODEL, LAYOUT, workload)
    held = sum(ledger.line(name).value for name in ("parameters", "optimizer", "gradients"))
    peak = held + int(factor * (ledger.peak - held))
    return compare(ledger, dataclasses.replace(ledger, author="XLA:GPU", peak=peak), capacity=MESH.capacity)


@pytest.mark.parametrize(("factor", "compiles"), [(1.0, 1), (0.8, 1), (1.3, 2)])
def test_the_next_larger_one_does_not_fit(monkeypatch, factor, compiles):
    asked = []

    def check(model, layout, mesh, workload, **_):
        asked.append(workload)
        return compiled_at(factor, workload)

    monkeypatch.setattr(pipeline, "check", check)
    resolved = lambda factor: pipeline.resolve(MODEL, LAYOUT, MESH, "max", 2048, "bf16-f32", factor=factor)  # noqa: E731
    workload, comparison = pipeline.check_largest(MODEL, LAYOUT, MESH, resolved)
    assert (workload, len(asked)) == (asked[-1], compiles)
    assert comparison.fits and workload.batch > 8
    larger = dataclasses.replace(workload, batch=workload.batch + 8)
    assert not compiled_at(max(factor, 1.0), larger).fits
    assert len(comparison.notes) == compiles - 1


def test_max_of_the_sequence_and_of_what_has_no_limit():
    resolve = partial(pipeline.resolve, MODEL, LAYOUT)
    found = resolve(MESH, 8, "max", "bf16-f32")
    assert found.sequence % pipeline.SEQUENCE_STEP == 0
    assert predict(MODEL, LAYOUT, found).peak <= MESH.capacity
    longer = dataclasses.replace(found, sequence=found.sequence + pipeline.SEQUENCE_STEP)
    assert predict(MODEL, LAYOUT, longer).peak > MESH.capacity
    with pytest.raises(SpecError, match="cpu has no memory limit"):
        resolve(Machine.load("cpu:8"), "max", None, "f32")
    with pytest.raises(SpecError, match="remat=jax has no closed form"):
        pipeline.resolve(MODEL, Layout.parse("data=8,remat=jax"), MESH, "max", None, "bf16-f32")
