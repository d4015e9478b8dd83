"""Every bad input is one sentence on standard error and exit code 2, long before JAX is imported."""

import subprocess
import sys

import pytest

from jaxllm.cli import main

GOOD = {"--mesh": "h100:8", "--layout": "data=8"}


def check(model="llama-3-8b", **options):
    given = {**GOOD, **{f"--{name.replace('_', '-')}": value for name, value in options.items()}}
    flat = [part for name, value in given.items() for part in ([name] if value is True else [name, value])]
    return ["check", model, *flat]


def train(*more, layout="data=2,tensor=4", mesh="cpu:8", text="docs/examples/harbour.txt"):
    return ["train", "llama-tiny", "--mesh", mesh, "--layout", layout, "--text", text, "--out", "runs/never", *more]


BAD = {
    "no command": ([], "name a command"),
    "unknown command": (["chekc"], "chekc"),
    "no model": (["check"], "MODEL"),
    "no mesh": (["check", "llama-tiny", "--layout", "data=8"], "--mesh"),
    "no layout": (["check", "llama-tiny", "--mesh", "cpu:8"], "--layout"),
    "unknown option": ([*check(), "--fast"], "--fast"),
    "option without value": (["check", "llama-tiny", "--mesh"], "--mesh"),
    "too many arguments": ([*check(), "more"], "more"),
    "unknown model": (check("llama-3-8c"), "did you mean 'llama-3-8b'"),
    "unknown machine": (check(mesh="h10:8"), "did you mean 'h100'"),
    "no size": (check(mesh="h100"), "h100:8"),
    "unknown key": (check(layout="dta=8"), "did you mean 'data'"),
    "too few devices": (check(layout="data=4"), "data=8 would fill it"),
    "batch is no number": (check(batch="many"), "write it like --batch 8"),
    "batch of zero": (check(batch="0"), "1 to 10^9"),
    "negative batch": (check(batch="-8"), "-8"),
    "huge batch": (check(batch="9" * 5000), "--batch 8"),
    "digits of another script": (check(batch="٨"), "--batch 8"),
    "batch that does not divide": (check(batch="12"), "8 would do"),
    "long sequence": (check(seq="16777217"), "--seq 16777216 or less"),
    "long sequence of learned positions": (check(model="gpt2", seq="1025"), "--seq 1024 or less"),
    "a ring of odd parts": (check(layout="context=8,attention=blockwise", seq="4095"), "--seq 4080 would do"),
    "a ring without blocks": (check(layout="context=8"), "set attention=blockwise"),
    "unknown precision": (check(precision="int4"), "bf16-f32"),
    "unknown optimizer": (check(optimizer="rmsprop"), "known: ada"),
    "unknown gradient dtype": (check(gradient_dtype="f16"), "choose f32 or bf16"),
    "unknown target": (check(target="npu"), "unknown target"),
    "gpu for a tpu mesh": (check(mesh="v5e:2x4", target="gpu"), "--target cpu"),
    "tpu for a gpu mesh": (check(target="tpu"), "--target cpu"),
    "gpu for a cpu mesh": (check(mesh="cpu:8", target="gpu"), "whose compiler is cpu"),
    "too many to emulate": (check(mesh="h100:2048x8", layout="data=2048,tensor=8", target="cpu"), "2,048"),
    "run without devices": (check(run=True), "--target cpu or local"),
    "unknown line": (check(explain="speed"), "no line has such a name"),
    "picture of an unknown kind": (check(plot="x.gif"), ".png, .svg or .pdf"),
    "picture in no folder": (check(plot="/no/such/folder/x.png"), "no folder"),
    "bundle in a folder that is not empty": (check(bundle="docs"), "is not empty"),
    "unknown model to list": (["models", "llama"], "llama"),
    "unknown machine to list": (["meshes", "h10"], "did you mean 'h100'"),
}


TRAINING = {
    "nothing to resume": (["train", "llama-tiny", "--mesh", "cpu:8", "--layout", "data=8", "--resume"], "--out is missing"),
    "no text": (["train", "llama-tiny", "--mesh", "cpu:8", "--layout", "data=8", "--out", "runs/never"], "--text is missing"),
    "no such text": (train(text="no/such/text"), "cannot be read"),
    "a picture for a text": (train(text="docs/images/check.png"), "not a UTF-8 text"),
    "no such tokenizer": (train("--tokenizer", "no/such.json"), "cannot be read"),
    "blank tokenizer": (train("--tokenizer", " "), "leave it out"),
    "no steps": (train("--steps", "0"), "--steps 8"),
    "half a step": (train("--steps", "1.5"), "--steps 8"),
    "unknown optimizer to train with": (train("--optimizer", "adamv"), "did you mean 'adam'"),
    "negative rate": (train("--lr", "-1"), "--lr 0.001"),
    "rate that is no number": (train("--lr", "nan"), "--lr 0.001"),
    "negative seed": (train("--seed", "-1"), "--seed 8"),
    "batch that does not divide": (train("--batch", "3"), "2 would do"),
    "sequence that is too long": (train("--seq", "99999999"), "or less"),
    "layout of another size": (train(layout="data=2"), "data=8 would fill it"),
    "three processes of eight devices": (train("--processes", "3"), "1, 2, 4, 8"),
    "a process without a coordinator": (train("--processes", "2", "--process", "1"), "go together"),
    "a compiler alone": (train("--target", "gpu", mesh="h100:8"), "cpu or local"),
    "nothing to resume": (train("--resume"), "holds no run"),
    "a folder in use": ([*train()[:-1], "docs"], "is not empty"),
}


@pytest.mark.parametrize("name", [*BAD, *TRAINING])
def test_one_sentence(name, capsys):
    arguments, way_out = (BAD | TRAINING)[name]
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("jaxllm: ") and shown.err.count("\n") == 1 and shown.err.endswith("\n")
    assert way_out in shown.err


def test_none_of_it_needs_jax():
    code = f"""
import sys
from jaxllm.cli import main
for arguments in {[arguments for arguments, _ in BAD.values()]!r}:
    assert main(arguments) == 2
assert not {{"numpy", "jax"}} & set(sys.modules)
for arguments in {[arguments for arguments, _ in TRAINING.values()]!r}:
    assert main(arguments) == 2
assert "jax" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def shell(command):
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True)


def test_a_reader_that_leaves_early_is_no_error():
    done = shell(f"{sys.executable} -m jaxllm models llama-3-8b --json | true; echo ${{PIPESTATUS[0]}}")
    assert done.stderr == ""
    assert done.stdout.strip() in ("141", "0")  # 0 when all was written before the reader left


def test_a_full_disk_is_one_sentence():
    done = shell(f"{sys.executable} -m jaxllm models > /dev/full")
    assert done.returncode == 2
    assert done.stderr == "jaxllm: the result cannot be written: the disk is full; make room or write elsewhere.\n"


def test_an_option_given_twice_is_refused(capsys):
    assert main("check llama-tiny --mesh cpu:8 --layout data=8 --batch=8 --batch 16".split()) == 2
    assert capsys.readouterr().err == "jaxllm: --batch is given twice; keep one of them.\n"


def test_what_a_terminal_would_obey_is_written_out(capsys):
    assert main(["check", "llama-tiny", "--mesh", "cpu:8", "--layout", "data=8,\u202etensor=1"]) == 2
    assert "\\u202etensor" in capsys.readouterr().err
