"""`jaxllm plan`: what it prints, how it ends, and that it needs no JAX."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from jaxllm.cli import main

ROOT = Path(__file__).parent.parent.parent
SCHEMA = Draft202012Validator(json.loads((ROOT / "docs" / "plan.schema.json").read_text()))
SMALL = {"--mesh": "rtx4090:8", "--batch": "64", "--seq": "4096", "--fix": "attention=cudnn,pipe<=2,context=1"}


def run(capsys, options, *flags, model="llama-2-7b"):
    code = main(["plan", model, *(text for option in options.items() for text in option), *flags])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_table(capsys):
    code, out, err = run(capsys, SMALL)
    assert code == 0 and err == "jaxllm: scoring layouts\n"
    before, _, after = out.partition("\ncheck\n")
    assert max(map(len, before.splitlines())) <= 80
    for text in ("layouts, memory and time", "rank", "1 =", "nothing is both faster and smaller", "choice", "simulated"):
        assert text in before, text
    assert after.startswith("  jaxllm check llama-2-7b --mesh rtx4090:8 --layout ") and "Layout.parse(" in after


def test_json_has_its_schema_and_what_python_finds(capsys):
    from jaxllm import Machine, ModelConfig, Workload
    from jaxllm.plan.conditions import parse
    from jaxllm.plan.plan import plan

    code, out, _ = run(capsys, SMALL | {"--price": "0.5"}, "--json")
    data = json.loads(out)
    SCHEMA.validate(data)
    assert code == 0
    found = plan(
        ModelConfig.load("llama-2-7b"), Machine.load("rtx4090:8"), Workload(64, 4096, "bf16-f32"), conditions=parse(SMALL["--fix"])
    )
    assert [each["layout"] for each in data["layouts"]] == [f"{scored.layout}" for scored in found.best]
    assert (data["scored"], data["fits"], data["near"]) == (found.found.scored, found.found.fits, found.near)
    assert data["costs"][1]["mesh"] == "rtx4090:4" and data["layouts"][0]["tokens_per_dollar"] > 0
    # The closed form has every stage as slow as the one with the head, 1 % of a stage here, and the simulation each as it is.
    assert data["simulated"] == pytest.approx(data["layouts"][0]["seconds"], rel=0.02)


def test_what_to_type_next_is_what_was_planned(capsys):
    _, out, _ = run(capsys, SMALL | {"--top": "1"}, "--json")
    data = json.loads(out)
    command, *arguments = shlex.split(data["next"]["check"])
    assert command == "jaxllm" and data["layouts"][0]["layout"] in arguments
    shown = subprocess.run([sys.executable, "-c", data["next"]["python"]], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    peak, seconds = shown.split()
    assert int(peak) == data["layouts"][0]["peak"] and float(seconds) == pytest.approx(data["layouts"][0]["seconds"], rel=1e-12)


def test_why(capsys):
    code, out, _ = run(capsys, SMALL, "--why", "data=8,zero=0,attention=cudnn")
    assert code == 0 and "GB of the 23.2 GB of a device, " in out
    assert "with this changed" in out and "residuals" in out and "collectives over data" in out
    code, out, _ = run(capsys, SMALL, "--why", "data=8,zero=0,attention=cudnn", "--json")
    data = json.loads(out)
    assert code == 0 and not data["fits"] and data["asked"]["peak"] > data["capacity"] and data["changes"]
    code, out, _ = run(capsys, SMALL, "--why", "data=16")
    assert code == 0 and "needs 16 devices" in out


def test_nothing_fits(capsys):
    options = SMALL | {"--mesh": "rtx4090:2", "--fix": "zero=0,offload=none"}
    code, out, _ = run(capsys, options)
    assert code == 4 and "nothing fits" in out and "without --fix offload=none" in out and "on rtx4090:8" in out
    code, out, _ = run(capsys, options, "--json")
    data = json.loads(out)
    SCHEMA.validate(data)
    assert code == 4 and data["layouts"] == [] and len(data["would_fit"]) == 2 and data["next"] is None


def test_picture(capsys, tmp_path):
    code, _, err = run(capsys, SMALL, "--plot", str(tmp_path / "plan.png"))
    assert code == 0 and f"wrote {tmp_path / 'plan.png'}" in err
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_no_jax_is_imported():
    code = (
        "import sys; from jaxllm.cli import main; "
        "code = main(['plan', 'llama-3-8b', '--mesh', 'h100:8', '--batch', '64', '--fix', 'pipe=1']); "
        "sys.exit(code or any(name in sys.modules for name in ('jax', 'flax', 'optax', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT).returncode == 0


BAD = {
    "no batch": ({"--batch": "0"}, (), "1 to 10^9"),
    "a batch that nothing divides": ({"--mesh": "rtx4090:8", "--batch": "7", "--fix": "data=8"}, (), "--fix data=8 leaves no layout"),
    "no links": ({"--mesh": "rtx4090:16"}, (), "no figure links.between_nodes"),
    "no speed": ({"--mesh": "cpu:8"}, (), "cpu has no figure peak.bf16"),
    "what excludes everything": ({"--fix": "tensor=3"}, (), "--fix tensor=3 leaves no layout"),
    "what contradicts": ({"--fix": "tensor=4,tensor=2"}, (), "tensor=4 and tensor=2 exclude each other"),
    "what contradicts by bounds": ({"--fix": "zero>=2,zero<=1"}, (), "exclude each other"),
    "what cannot be together": ({"--fix": "pipe=8,tensor=8"}, (), "beside tensor=8"),
    "what is searched by nobody": ({"--fix": "speed=4"}, (), "nothing that a plan searches"),
    "a price too small to divide by": ({"--price": "1e-320"}, (), "is no number above 0, from 1e-09 up to 1e+06"),
    "a price of nothing": ({"--price": "0"}, (), "write it like --price 2.5"),
    "a price below": ({"--price": "-1"}, (), "write it like --price 2.5"),
    "cost without price": ({"--objective": "cost"}, (), "add --price"),
    "another objective": ({"--objective": "speed"}, (), "known: cost, memory, time"),
    "another picture": ({"--plot": "plan.gif"}, (), ".png, .svg or .pdf"),
    "two questions": ({"--why": "data=8", "--verify": "2"}, (), "--why explains one layout"),
    "no number to verify": ({"--verify": "some"}, (), "write it like --verify 8"),
    "a layout that is none": ({"--why": "dta=8"}, (), "did you mean 'data'?"),
    "a long sequence": ({"--seq": "99999999"}, (), "--seq 16777216 or less"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(capsys, case):
    options, flags, reason = BAD[case]
    code, out, err = run(capsys, SMALL | options, *flags)
    assert code == 2 and out == ""
    last = err.splitlines()[-1]
    assert last.startswith("jaxllm: ") and reason in last, err
    assert all(line.startswith("jaxllm: ") for line in err.splitlines())
