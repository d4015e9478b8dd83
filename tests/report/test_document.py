import json
from dataclasses import replace

from jaxllm.report.compare import compare
from jaxllm.report.document import document, versions
from tests.report.ledgers import COMPILED, PREDICTED, SETUP, WINDOWED, memory, ran

FULL = replace(
    compare(PREDICTED, COMPILED, capacity=76_700_000_000),
    run=ran(1.25e-7),
    seconds={"lower": 0.5, "compile": 6.9, "measure": 0.25},
)


def test_the_keys_are_those_of_the_schema():
    data = document(FULL, SETUP)
    assert list(data) == [
        "schema", "versions", "model", "mesh", "layout", "workload", "target", "memory", "pipeline", "stages", "flops", "collectives",
        "transfers", "unexplained", "notes", "peak", "run", "seconds", "cached", "agrees",
    ]  # fmt: skip
    assert data["schema"] == 1 and data["target"] == "gpu" and data["agrees"] is True
    assert data["model"]["name"] == "llama-2-7b" and data["model"]["parameters"] == 6_738_415_616
    assert data["layout"] == {
        "pipe": 1, "replica": 1, "data": 4, "context": 1, "tensor": 2, "zero": 3, "remat": "full", "save": "", "offload": "none",
        "sequence": False, "attention": "xla", "exchange": "ring", "microbatches": 1, "schedule": "",
        "virtual": 0, "partition": "even",
    }  # fmt: skip
    assert data["workload"]["batch"] == 8 and data["workload"]["sequence"] == 4096
    assert data["memory"][0] == {
        "line": "parameters", "predicted": 3_369_209_856, "compiled": 3_369_209_856, "status": "equal", "rules": [],
    }  # fmt: skip
    assert data["flops"][0] == {
        "line": "matmul", "phase": "forward", "predicted": 56_444_829_040_640, "compiled": 56_444_829_040_640,
        "status": "equal",
    }  # fmt: skip
    assert data["collectives"][0] == {
        "kind": "all-gather", "axes": ["data"], "phase": "forward", "dtype": "bf16", "predicted": 6_738_415_616,
        "compiled": 6_738_415_616, "wire_predicted": 5_053_811_712, "wire_compiled": 5_053_811_712, "emitted": None,
        "count": 291, "status": "equal", "rules": [],
    }  # fmt: skip
    assert data["peak"] == {
        "predicted": 20_100_000_000, "compiled": 20_900_000_000, "capacity": 76_700_000_000, "fits": True,
        "tolerance": 0.1, "within_tolerance": True, "refused": "",
    }  # fmt: skip
    run = data["run"]
    assert (run["steps"], run["max_relative_error"], run["losses"]) == (3, 1.25e-7, [6.25, 6.0, 5.75])
    assert (run["tolerance"], run["agrees"]) == (1e-5, True) and run["worst"]
    assert data["notes"] == [] and data["cached"] is False
    assert data["seconds"] == {"lower": 0.5, "compile": 6.9, "measure": 0.25}


def test_it_is_strict_json():
    broken = replace(FULL, run=ran(float("nan"), (6.0, float("inf"), float("nan"))))
    data = json.loads(json.dumps(document(broken, SETUP), allow_nan=False))
    assert (data["run"]["max_relative_error"], data["run"]["losses"]) == (None, [6.0, None, None])
    assert data["agrees"] is False


def test_rules_reasons_and_what_is_unknown():
    lines = list(COMPILED.lines)
    lines[4] = memory("residuals", None, reason="plain autodiff chooses")
    lines[9] = replace(lines[9], rules=(WINDOWED, WINDOWED))
    data = document(compare(PREDICTED, replace(COMPILED, lines=tuple(lines), peak=None)), SETUP)
    residuals = next(line for line in data["memory"] if line["line"] == "residuals")
    assert residuals["compiled"] is None
    assert (residuals["status"], residuals["reason"]) == ("not comparable", "plain autodiff chooses")
    assert data["collectives"][0]["rules"] == [{"name": "windowed-einsum", "bytes": 2_800, "why": WINDOWED.why}]
    assert data["peak"]["compiled"] is None and data["run"] is None


def test_versions_name_the_compiler_of_the_target():
    assert {"jax", "flax", "numpy"} <= set(versions("cpu"))
    assert "libtpu" not in versions("cpu") and "libtpu" not in versions("gpu")
