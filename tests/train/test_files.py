"""What a run leaves on disk: metrics to the bit, a record that a resumption is held to, folders that are not mixed up."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from jaxllm.spec.errors import DoesNotFit, SpecError
from jaxllm.spec.layout import Layout
from jaxllm.spec.machine import Machine
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.workload import Workload
from jaxllm.train import metrics, processes, record, request
from jaxllm.train.metrics import Step
from jaxllm.train.request import Asked

MODEL, LAYOUT, MESH = ModelConfig.load("llama-tiny"), Layout.parse("data=2,tensor=4"), Machine.load("cpu:8")
TEXT = str(Path(__file__).parents[2] / "docs" / "examples" / "harbour.txt")
STEPS = [Step(1, 1024, 0.1 + 0.2, 1e-30, None, 0.5), Step(2, 2048, 5.0, float("inf"), 1 / 3, 0.25)]


def resolved(folder: Path, *, resume: bool = False, leads: bool = True, model=MODEL, **asked):
    asked = {"text": TEXT} | asked
    return request.resolve(model, LAYOUT, MESH, "cpu", Asked(**asked), folder, resume=resume, leads=leads)


# ---------------------------------------------------------------- metrics


def test_metrics_come_back_to_the_bit(tmp_path) -> None:
    path = tmp_path / "metrics.csv"
    assert metrics.read(path) == []
    for step in STEPS:
        metrics.append(path, step)
    assert metrics.read(path) == STEPS
    assert path.read_text().splitlines()[0] == "step,tokens,loss,gradient_norm,held_out,seconds"


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_row_that_was_cut_short_is_left_out(tmp_path, cut) -> None:
    path = tmp_path / "metrics.csv"
    for step in STEPS:
        metrics.append(path, step)
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    assert metrics.read(path) == STEPS[:1]


def test_rows_behind_a_checkpoint_are_taken_back(tmp_path) -> None:
    path = tmp_path / "metrics.csv"
    for step in STEPS:
        metrics.append(path, step)
    assert metrics.keep(path, 1) == STEPS[:1] == metrics.read(path)
    metrics.append(path, STEPS[1])
    assert metrics.read(path) == STEPS
    assert metrics.keep(path, 0) == [] == metrics.read(path)
    metrics.append(path, STEPS[0])  # with the heads again
    assert metrics.read(path) == STEPS[:1]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.csv"]


# ---------------------------------------------------------------- what is asked


def test_defaults_of_a_run(tmp_path) -> None:
    found = resolved(tmp_path / "new")
    assert found.workload == Workload(8, 128, "f32")
    assert (found.record.learning_rate, found.record.warmup, found.record.seed) == (3e-4, 20, 0)
    assert not (tmp_path / "new").exists()  # nothing is written before all is checked
    assert request.training_batch(Layout.parse("data=3,tensor=2")) == 9
    assert request.training_batch(Layout.parse("data=8,microbatches=2")) == 16


def test_a_resumed_run_is_what_its_record_says(tmp_path) -> None:
    first = resolved(tmp_path / "run", batch=16, sequence=64, learning_rate=3e-4, seed=5, precision="bf16-f32")
    request.open_folder(first)
    again = resolved(tmp_path / "run", resume=True, text=None)
    assert again.record == first.record and again.workload == first.workload
    assert resolved(tmp_path / "run", resume=True, batch=16, seed=5).record == first.record


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"batch": 4}, "holds a run with --batch 8, and 4 is asked"),
        ({"sequence": 64}, "--seq 128, and 64"),
        ({"learning_rate": 1.0}, "--lr 0.0003, and 1.0"),
        ({"warmup": 0}, "--warmup 20, and 0"),
        ({"seed": 1}, "--seed 0, and 1"),
        ({"precision": "bf16-f32"}, "--precision f32, and bf16-f32"),
        ({"gradient_dtype": "bf16"}, "--gradient-dtype"),
        ({"text": __file__}, "another text"),
        ({"model": dataclasses.replace(MODEL, layers=2, name="small")}, "holds a run of llama-tiny, not of small"),
    ],
)
def test_a_resumption_of_something_else_is_refused(tmp_path, asked, sentence) -> None:
    request.open_folder(resolved(tmp_path / "run"))
    with pytest.raises(SpecError, match=sentence):
        resolved(tmp_path / "run", resume=True, **asked)


def test_the_source_of_a_model_is_not_its_identity(tmp_path) -> None:
    request.open_folder(resolved(tmp_path / "run"))
    resolved(tmp_path / "run", resume=True, model=dataclasses.replace(MODEL, source="elsewhere"))


def test_nothing_is_written_over(tmp_path) -> None:
    request.open_folder(resolved(tmp_path / "run"))
    metrics.append(tmp_path / "run" / "metrics.csv", STEPS[0])
    with pytest.raises(SpecError, match="holds a run of llama-tiny; add --resume"):
        resolved(tmp_path / "run")
    resolved(tmp_path / "run", leads=False)  # another process of the same run looks away
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("do not lose")
    with pytest.raises(SpecError, match="is not empty"):
        resolved(tmp_path / "other")
    with pytest.raises(SpecError, match="is a file"):
        resolved(tmp_path / "other" / "thesis.txt")
    with pytest.raises(SpecError, match="holds no run to resume"):
        resolved(tmp_path / "other", resume=True)


def test_a_folder_that_cannot_be_written(tmp_path) -> None:
    with pytest.raises(SpecError, match="cannot be written"):
        request.open_folder(resolved(Path("/proc/run")))


@pytest.mark.parametrize(
    "changed",
    [{"model": "x"}, {"model": {}}, {"learning_rate": "x"}, {"seed": -1}, {"text": 5}, {"batch": 0}, {"warmup": None}],
)
def test_a_record_of_odd_content_is_told(tmp_path, changed) -> None:
    request.open_folder(resolved(tmp_path / "run"))
    path = tmp_path / "run" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    for resume in (True, False):
        with pytest.raises(SpecError, match="not the record of a run"):
            resolved(tmp_path / "run", resume=resume)


def test_files_are_as_readable_as_others(tmp_path) -> None:
    request.open_folder(resolved(tmp_path / "run"))
    (tmp_path / "other").write_text("")
    metrics.append(tmp_path / "run" / "metrics.csv", STEPS[0])
    metrics.keep(tmp_path / "run" / "metrics.csv", 1)
    modes = {path.stat().st_mode & 0o777 for path in (*(tmp_path / "run").iterdir(), tmp_path / "other")}
    assert len(modes) == 1


def test_a_run_that_never_began_is_begun_anew(tmp_path) -> None:
    request.open_folder(resolved(tmp_path / "run"))
    assert resolved(tmp_path / "run", seed=3).record.seed == 3  # what kept it may have been corrected
    metrics.append(tmp_path / "run" / "metrics.csv", STEPS[0])
    with pytest.raises(SpecError, match="add --resume"):
        resolved(tmp_path / "run", seed=3)


def test_metrics_that_are_no_text_have_no_rows(tmp_path) -> None:
    (tmp_path / "metrics.csv").write_bytes(bytes(range(256)) * 9)
    assert metrics.read(tmp_path / "metrics.csv") == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 1}', '{"schema": 9, "model": {}}'])
def test_a_damaged_record_is_told(tmp_path, content) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(SpecError, match="not the record of a run|has schema 9"):
        record.read(tmp_path)


def test_a_record_comes_back(tmp_path) -> None:
    found = resolved(tmp_path / "run").record
    record.write(tmp_path, found)
    assert record.read(tmp_path) == found
    assert json.loads((tmp_path / "run.json").read_text())["schema"] == 1


def test_steps_that_are_there_already(tmp_path) -> None:
    for name in ("checkpoints/50", "checkpoints/100", "checkpoints/150.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "_CHECKPOINT_METADATA").write_text("{}")
    (tmp_path / "checkpoints" / "999").mkdir()  # nobody's checkpoint
    request.check_steps(tmp_path, 101)
    with pytest.raises(SpecError, match="has 100 steps already"):
        request.check_steps(tmp_path, 100)


def test_emulated_devices_share_the_memory_of_this_machine() -> None:
    request.check_memory(MODEL, LAYOUT, Workload(8, 128), 8)
    with pytest.raises(DoesNotFit, match="8 emulated devices need .* and this machine has"):
        request.check_memory(ModelConfig.load("llama-3-70b"), LAYOUT, Workload(8, 128), 8)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((3, None, None), "--processes 3 does not divide the 8 devices of cpu:8; it may be 1, 2, 4, 8"),
        ((2, 0, None), "go together"),
        ((2, None, "host:1"), "go together"),
        ((2, 2, "host:1"), "count from 0 to 1"),
        ((2, 1, "host"), "not host:port"),
        ((2, 1, ":5"), "not host:port"),
        ((2, 1, "host:99999"), "not host:port"),
    ],
)
def test_processes_that_do_not_go_together(options, sentence) -> None:
    with pytest.raises(SpecError, match=sentence):
        processes.validate(*options, 8, "cpu:8", "cpu")


def test_processes_are_launched_for_emulated_devices_only() -> None:
    with pytest.raises(SpecError, match="start each one yourself"):
        processes.validate(2, None, None, 8, "h100:8", "local")
    processes.validate(2, 1, "node-0:1234", 8, "h100:8", "local")
