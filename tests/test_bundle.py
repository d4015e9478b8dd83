"""The bundle of a check holds what another machine needs to see the same disagreement."""

from __future__ import annotations

import json

import pytest

from jaxllm.cli import main
from jaxllm.hlo import Dump, measure

CHECK = "check docs/examples/config.json --mesh cpu:8 --layout data=4,tensor=2,zero=3".split()


def test_a_bundle_is_measured_again_elsewhere(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))  # a bundle does not come from there
    folder = tmp_path / "bundle"
    for _ in range(2):
        assert main([*CHECK, "--bundle", str(folder)]) == 0
        names = {path.name for path in folder.iterdir()}
        assert names == {
            "README.txt", "check.json", "predicted.json", "compiled.json", "step.mlir", "partitioned.hlo.pb",
            "optimized.hlo.pb",
        }  # fmt: skip
        folder = tmp_path / "again"
    assert f"wrote {tmp_path / 'bundle'}" in capsys.readouterr().err

    said = json.loads((folder / "check.json").read_text())
    assert said["agrees"] and said["versions"]["jax"] and not said["cached"]
    predicted, compiled = (json.loads((folder / f"{name}.json").read_text()) for name in ("predicted", "compiled"))
    assert predicted["author"] == "closed form" and predicted["lines"][0]["terms"]
    # Whoever gets it measures the protos again, without the compiler.
    dump = Dump(folder / "partitioned.hlo.pb", folder / "optimized.hlo.pb", "cpu")
    again = measure(dump, {"data": 4, "tensor": 2})
    values = {tuple(line.key): (line.value, line.wire) for line in again.lines if line.name != "padding"}
    for line in compiled["lines"]:
        if line["name"] in ("padding", "parameters", "optimizer"):  # needs the sizes without padding
            continue
        key = (line["section"], line["name"], line["phase"], tuple(line["axes"]), line["dtype"])
        assert values[key] == (line["value"], line["wire"])
    readme = (folder / "README.txt").read_text()
    assert readme.startswith("jaxllm check docs/examples/config.json --mesh cpu:8 --layout data=4,tensor=2,zero=3 --batch 4 --seq 256 ")
    assert "StableHLO" in readme and "train_step" in (folder / "step.mlir").read_text()


@pytest.mark.parametrize(("place", "sentence"), [("full", "is not empty"), ("/proc/bundle", "cannot be written")])
def test_a_bundle_needs_a_folder_of_its_own(tmp_path, capsys, place, sentence) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("do not lose")
    assert main([*CHECK, "--bundle", str(tmp_path / place)]) == 2
    assert sentence in capsys.readouterr().err
