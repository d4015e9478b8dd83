"""The time of a step as text and as JSON: parts that add up, the interval, what it stands on."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from jaxllm import Layout, Machine, ModelConfig, Workload, predict
from jaxllm.report.time import Timed, document, parts, print_time
from jaxllm.theory.time import step_time


def timed(mesh: str = "a100-80:8", layout: str = "data=2,tensor=4,zero=3,remat=full") -> Timed:
    nouns = ModelConfig.load("llama-2-7b"), Layout.parse(layout), Machine.load(mesh), Workload(2, 4096, "bf16-f32")
    model, split, _, work = nouns
    return Timed(*nouns, step_time(*nouns), predict(model, split, work).peak)


def test_parts_add_up_to_the_step_and_come_in_their_order():
    one = timed()
    found = parts(one.time)
    assert sum(waited for _, waited, _ in found) == pytest.approx(float(one.time.seconds), abs=1e-8)
    assert [waited for _, waited, _ in found] == sorted((waited for _, waited, _ in found), reverse=True)
    assert found[0][0] == "matmuls" and "collectives over tensor" in [what for what, *_ in found]
    assert dict((what, hidden) for what, _, hidden in found)["collectives over data"] > 0


def test_json_has_all_of_it():
    one = timed()
    data = json.loads(json.dumps(document(one)))
    assert data["interval"]["low"] < data["seconds"] < data["interval"]["high"] and data["interval"]["level"] == 0.8
    assert data["measured"] is True and data["layout"] == f"{one.layout}" and data["mesh"] == "a100-80:8"
    assert data["tokens_per_second"] * data["seconds"] == pytest.approx(2 * 4096)
    assert data["mfu"] * data["seconds"] * 312e12 == pytest.approx(data["model_flops"])
    assert sum(part["seconds"] for part in data["parts"]) == pytest.approx(data["seconds"], abs=1e-8)


def test_what_does_not_fit_is_said():
    assert document(timed())["fits"] is True
    out = Console(width=80, record=True, force_terminal=False)
    print_time(timed("a100-80:1", "microbatches=2"), out)
    assert "1 device of 312" in (text := " ".join(out.export_text().split())) and "does not fit" in text


def test_text_says_what_it_stands_on():
    out = Console(width=80, record=True, force_terminal=False)
    print_time(timed("h100:8"), out)
    text = " ".join(out.export_text().split())
    assert "h100 has figures of a data sheet alone" in text and "the interval is 2 times as wide" in text
    print_time(timed(), out)
    assert "efficiencies and latencies of a100-80: fitted by experiments/fit_a100.py on 190 measured steps" in " ".join(out.export_text().split())
