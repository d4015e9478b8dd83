"""What becomes of a comparison on the command line: streams, exit codes, files. The pipeline is a stand-in."""

import contextlib
import json
import sys
from dataclasses import replace
from types import ModuleType

import pytest

from jaxllm import targets
from jaxllm.cli import main
from jaxllm.report.compare import compare
from jaxllm.spec.errors import SpecError, TargetError
from jaxllm.spec.workload import Workload
from tests.report.ledgers import COMPILED, PREDICTED, ran

ARGUMENTS = [
    "check", "llama-2-7b", "--mesh", "h100:8", "--layout", "data=4,tensor=2,zero=3,remat=full", "--seq", "4096",
]  # fmt: skip
AGREES = compare(PREDICTED, COMPILED, capacity=76_700_000_000)


@pytest.fixture
def pipeline(monkeypatch):
    """A pipeline that answers `pipeline.answer`, or raises it, and remembers what it was asked."""
    module = ModuleType("jaxllm.check")
    module.answer, module.asked = AGREES, {}

    def resolve(model, layout, mesh, batch, sequence, precision, optimizer, gradient_dtype, *, target, factor):
        module.asked.update(batch=batch, sequence=sequence, precision=precision, optimizer=optimizer)
        sizes = [64 if size == "max" else size or 8 for size in (batch, sequence)]
        return Workload(*sizes, precision, optimizer, gradient_dtype)

    def check(model, layout, mesh, workload, *, target, run, progress, bundle):
        module.asked.update(model=model.name, target=target, run=run, workload=workload)
        progress("compiling")
        if isinstance(module.answer, BaseException):
            raise module.answer
        return module.answer

    def check_largest(model, layout, mesh, resolved, **options):
        workload = resolved(1.0)
        return workload, check(model, layout, mesh, workload, **options)

    module.resolve, module.check, module.check_largest = resolve, check, check_largest
    start = ModuleType("jaxllm.targets.start")
    start.quiet = contextlib.nullcontext
    start.prepare = lambda target, devices: module.asked.update(prepared=(target, devices))
    monkeypatch.setitem(sys.modules, "jaxllm.check", module)
    monkeypatch.setattr("jaxllm.check", module, raising=False)
    monkeypatch.setitem(sys.modules, "jaxllm.targets.start", start)
    monkeypatch.setattr(targets, "start", start, raising=False)
    return module


def test_results_and_progress_go_to_different_streams(pipeline, capsys):
    assert main(ARGUMENTS) == 0
    shown = capsys.readouterr()
    assert "equal line by line: 14 of 14" in shown.out and "compiling" not in shown.out
    assert shown.err == "jaxllm: starting JAX\njaxllm: compiling\n"
    assert pipeline.asked["prepared"] == ("gpu", 8)
    assert pipeline.asked["target"] == "gpu" and pipeline.asked["precision"] == "bf16-f32"


def test_json_is_alone_on_standard_output(pipeline, capsys):
    assert main([*ARGUMENTS, "--json", "--explain", "param"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["agrees"] is True and data["mesh"]["devices"] == 8 and data["model"]["parameters"] == 6_738_415_616
    assert data["explain"]["line"] == "parameters"


@pytest.mark.parametrize(
    ("answer", "options", "code"),
    [
        (replace(AGREES, peak=replace(AGREES.peak, capacity=10**9)), [], 4),
        (compare(PREDICTED, replace(COMPILED, lines=COMPILED.lines[1:]), capacity=10**9), [], 1),
        (replace(AGREES, run=ran(0.5)), [], 1),
        (compare(PREDICTED, replace(COMPILED, peak=None)), [], 0),
        (compare(PREDICTED, replace(COMPILED, peak=None)), ["--strict"], 1),
    ],
)
def test_exit_codes(pipeline, answer, options, code):
    pipeline.answer = answer
    assert main([*ARGUMENTS, *options]) == code


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (SpecError("batch 3 is odd; take 4."), 2, "batch 3 is odd; take 4."),
        (TargetError("no libtpu here;\ninstall jaxllm[tpu-target]."), 3, "no libtpu here; install jaxllm[tpu-target]."),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ValueError("odd"), 70, "this is an error of jaxllm itself, ValueError: odd; JAXLLM_TRACEBACK=1 shows where."),
    ],
)
def test_errors_of_the_pipeline_are_one_sentence(pipeline, capsys, error, code, sentence):
    pipeline.answer = error
    assert main(ARGUMENTS) == code
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.splitlines()[-1] == f"jaxllm: {sentence}"


def test_a_traceback_can_be_had(pipeline, monkeypatch):
    monkeypatch.setenv("JAXLLM_TRACEBACK", "1")
    pipeline.answer = ValueError("odd")
    with pytest.raises(ValueError, match="odd"):
        main(ARGUMENTS)


def test_max_and_defaults_reach_the_pipeline_as_they_are(pipeline):
    assert main([*ARGUMENTS, "--batch", "max"]) == 0
    assert (pipeline.asked["batch"], pipeline.asked["sequence"]) == ("max", 4096)
    assert main([*ARGUMENTS[:-2], "--seq", "max", "--target", "cpu"]) == 0
    assert (pipeline.asked["batch"], pipeline.asked["sequence"]) == (None, "max")
    assert pipeline.asked["precision"] == "f32"  # the default on target cpu


def test_explain_follows_the_table_and_an_unknown_line_replaces_it(pipeline, capsys):
    assert main([*ARGUMENTS, "--explain", "parameters"]) == 0
    out = capsys.readouterr().out
    assert out.index("equal line by line") < out.index("symbols")
    assert main([*ARGUMENTS, "--explain", "all-gather"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "2 lines begin so" in shown.err


@pytest.mark.parametrize("by", ["layer", "module"])
def test_parts_follow_the_table_and_are_in_the_document(pipeline, capsys, by):
    assert main([*ARGUMENTS, "--by", by]) == 0
    text = capsys.readouterr().out
    assert text.index("equal line by line") < text.index(f"By {by}, closed form") and "each of 32" in text
    assert main([*ARGUMENTS, "--by", by, "--json"]) == 0
    names = [part["name"] for part in json.loads(capsys.readouterr().out)["parts"]]
    assert names == ["embedding", *(["block"] if by == "layer" else ["block.attention", "block.mlp"]), "head", "step"]
    assert main([*ARGUMENTS, "--by", "layers"]) == 2
    assert "did you mean 'layer'" in capsys.readouterr().err and pipeline.asked["model"] == "llama-2-7b"


def test_the_default_sequence_is_one_that_the_layout_cuts(pipeline, capsys):
    assert main(["check", "gpt2", "--mesh", "h100:3", "--layout", "tensor=3,sequence=true"]) == 0
    assert main(["check", "gpt2", "--mesh", "h100:3", "--layout", "tensor=3,sequence=true", "--seq", "1024"]) == 2
    assert "--seq 1023 would do" in capsys.readouterr().err


def test_plot_is_written_and_told(pipeline, capsys, tmp_path):
    path = tmp_path / "picture.png"
    assert main([*ARGUMENTS, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert f"wrote {path}" in capsys.readouterr().err


def test_listings(capsys):
    assert main(["models"]) == 0 and main(["meshes"]) == 0
    out = capsys.readouterr().out
    assert "8,030,261,248" in out and "NVIDIA H100 80GB HBM3" in out
    assert max(map(len, out.splitlines())) <= 100
    assert main(["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["llama-2-7b"]["parameters"] == 6_738_415_616
    assert main(["meshes", "h100:16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"] == 16
    assert main(["meshes", "h100"]) == 0
    assert "memory.capacity" in capsys.readouterr().out
