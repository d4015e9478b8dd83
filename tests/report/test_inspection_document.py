import copy
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator, ValidationError

from jaxllm.report.difference import difference
from jaxllm.report.inspection import Buffer, Finding, Place
from jaxllm.report.inspection_document import SCHEMA
from tests.report.inspections import CLASSES, HOSTILE, HUGE, NOTHING, STEP, place, product

FILE = Path(__file__).parents[2] / "docs" / "inspect.schema.json"
DESCRIBED = json.loads(FILE.read_text())
VALID = Draft202012Validator(DESCRIBED)


def written(report):
    """As it is read back from a file."""
    return json.loads(json.dumps(report.to_json(), allow_nan=False))


def test_the_schema_is_one():
    Draft202012Validator.check_schema(DESCRIBED)


def test_the_schema_closes_every_object_and_describes_every_key():
    def objects(node, where):
        if isinstance(node, dict):
            if "properties" in node and where[-1] not in ("place", "figures", "if", "#"):
                closed = node.get("additionalProperties", node.get("unevaluatedProperties"))
                assert closed is False, where
                assert set(node.get("required", ())) <= set(node["properties"]), where
            for key, value in node.items():
                objects(value, (*where, key))
        elif isinstance(node, list):
            for index, value in enumerate(node):
                objects(value, (*where, index))

    objects(DESCRIBED, ("#",))


@pytest.mark.parametrize(
    "report", [STEP, NOTHING, HOSTILE, replace(STEP, machine=None)], ids=["step", "nothing", "hostile", "bare"]
)
def test_documents_are_as_the_schema_has_them(report):
    VALID.validate(written(report))


@pytest.mark.parametrize("before", [STEP, NOTHING, HOSTILE], ids=["step", "nothing", "hostile"])
@pytest.mark.parametrize("after", [STEP, NOTHING, HOSTILE], ids=["step", "nothing", "hostile"])
def test_differences_are_as_the_schema_has_them(before, after):
    VALID.validate(written(difference(before, after)))


@pytest.mark.parametrize(
    "path",
    [
        (), ("bytes",), ("roofline",), ("memory",), ("memory", "where"), ("memory", "live", 0), ("flops", 0),
        ("flops", 0, "instances", 0), ("operations", 0), ("collectives", 0), ("collectives", 0, "instances", 0),
        ("warnings", 0), ("versions",),
    ],
)  # fmt: skip
def test_a_key_too_many_or_too_few_is_refused_everywhere(path):
    document = written(STEP)
    node = document
    for key in path:
        node = node[key]
    for name in list(node):
        fewer = copy.deepcopy(document)
        place_ = fewer
        for key in path:
            place_ = place_[key]
        del place_[name]
        with pytest.raises(ValidationError):
            VALID.validate(fewer)
    node["surprise"] = 1
    with pytest.raises(ValidationError):
        VALID.validate(document)


def test_bytes_that_are_no_integers_are_refused():
    for name, value in (
        ("peak_bytes", 1.5),
        ("matmul_flops", "1"),
        ("devices", -1),
        ("target", "rocm"),
        ("document", "x"),
    ):
        with pytest.raises(ValidationError):
            VALID.validate(written(STEP) | {name: value})


def test_the_figures_of_the_issue():
    data = written(STEP)
    assert (data["schema"], data["document"], data["versions"]["jaxllm"]) == (SCHEMA, "report", "0.1.0")
    assert (data["name"], data["target"], data["devices"], data["mesh"]) == (
        "jit_step",
        "gpu",
        8,
        {"data": 4, "tensor": 2},
    )
    assert data["matmul_flops"] == data["matmul_flops_least"] == 17_180_869_184
    assert data["declared_flops"] == 2_464_000_000
    assert data["phase_flops"] == {"forward": 8_590_934_592, "backward": 8_589_934_592}
    assert data["peak_bytes"] == 11_001_012_346 == sum(data["peak_classes"].values())
    assert data["peak_classes"] == CLASSES
    assert data["bytes"] == {"read": STEP.bytes[0], "written": STEP.bytes[1]}
    assert data["not_understood"] == list(STEP.not_understood) and data["assumed"] == list(STEP.assumed)
    assert data["seconds"] == {"read": 0.21, "measure": 0.05}


def test_collectives_have_the_keys_of_check():
    gather, reduce = written(STEP)["collectives"]
    assert {key: gather[key] for key in list(gather)[:-1]} == {
        "kind": "all-gather", "axes": ["data"], "phase": "forward", "dtype": "bf16", "compiled": 134_217_728,
        "wire_compiled": 100_663_296, "count": 32, "ranks": [4], "depth": 2, "sources": ["model.py:31 < step.py:12"],
        "overlapped": 32, "disguise": "",
    }  # fmt: skip
    (instance,) = gather["instances"]
    assert instance == {
        "name": "all-gather-start.1", "op_name": "jit(step)/forward/all-gather-start",
        "source": "model.py:31 < step.py:12", "phase": "forward", "count": 32, "trips": [2, 16],
        "conditional": False, "ranks": 4, "payload": 4_194_304,
        "wire": 3_145_728, "asynchronous": True, "overlapped": ["dot.2"], "disguise": "",
    }  # fmt: skip
    assert (reduce["axes"], reduce["disguise"], reduce["overlapped"]) == (["data", "tensor"], "reduce-scatter", 0)


def test_flops_name_their_instructions():
    line = written(STEP)["flops"][0]
    assert (line["flops"], line["count"], line["kind"], line["dtype"]) == (8_589_934_592, 64, "dot", "bf16")
    assert sum(one["flops"] * one["count"] for one in line["instances"]) == line["flops"]


def test_memory_is_whole():
    memory = written(STEP)["memory"]
    assert (memory["exact"], memory["at"], memory["steps"]) == (True, 42, 100)
    assert len(memory["live"]) == len(STEP.memory.live) and memory["live"][2]["class"] == "residual"
    assert sum(one["bytes"] for one in memory["live"]) + CLASSES["fragmentation"] == STEP.peak_bytes
    assert memory["timeline"][7] == [41, 11_001_000_001]
    assert memory["where"]["source"] == "model.py:44 < step.py:12"


def test_nothing_of_what_a_report_holds_is_lost():
    data = written(STEP)
    renamed = {"kind": "class"}
    for kind, document in (
        (Place, data["memory"]["where"]),
        (Buffer, data["memory"]["live"][0]),
        (Finding, data["warnings"][0]),
    ):
        names = {field.name for field in fields(kind)}
        if kind is Buffer:
            names = {renamed.get(name, name) for name in names}
        assert names == set(document)
    assert [one["name"] for one in data["operations"]] == [one.place.name for one in STEP.operations]
    assert [one["step"] for one in data["operations"]] == [5, 12, 20, 42, 60, 90]


def test_the_roofline_is_there_with_a_machine_only():
    bound = written(STEP)["roofline"]
    assert (bound["machine"], bound["capacity"], bound["unknown"]) == ("h100", STEP.machine.capacity, 0)
    assert bound["seconds"] < bound["serial_seconds"] == pytest.approx(sum(bound["bounds"].values()))
    assert written(NOTHING)["roofline"] is None


def test_strange_names_and_huge_figures_survive_the_round_trip():
    data = written(HOSTILE)
    assert data["name"] == HOSTILE.name and data["mesh"] == HOSTILE.mesh
    assert data["matmul_flops"] == HUGE and data["collectives"][0]["compiled"] == HUGE * 32
    assert data["warnings"][0]["message"] == HOSTILE.warnings[0].message


def test_what_is_no_number_is_null():
    strange = replace(
        STEP, operations=(replace(STEP.operations[0], seconds=float("inf")),), seconds={"read": float("nan")}
    )
    data = written(strange)
    assert data["operations"][0]["seconds"] is None and data["seconds"] == {"read": None}
    VALID.validate(data)


def test_the_range_that_conditionals_leave():
    taken = product("dot.1", 5, "", (), conditional=True)
    data = written(replace(NOTHING, products=(taken,), matmul_flops_range=(0, 5)))
    assert (data["matmul_flops_least"], data["matmul_flops"]) == (0, 5)
    assert data["flops"][0]["instances"][0]["conditional"] is True
    assert place("x", conditional=True).conditional
