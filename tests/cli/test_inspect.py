"""`jaxllm inspect`: what it prints, what it writes, how it ends."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxllm.cli import main
from tests.hlo.compilers import PASSES, array, mesh_of


@pytest.fixture(scope="module")
def dumps(tmp_path_factory):
    """A program as proto and as text, and one that does more."""
    folder = tmp_path_factory.mktemp("dumps")
    mesh = mesh_of("gpu", {"data": 4, "tensor": 2}, AxisType.Auto)
    arguments = array(mesh, (64, 128), P("data")), array(mesh, (128, 128), P(None, "tensor"))
    for name, layers in (("before", 2), ("after", 3)):

        def step(x, w, layers=layers):
            return lax.scan(lambda x, _: (jnp.sin(x @ w), None), x, length=layers)[0].sum()

        with jax.set_mesh(mesh):
            options = {"xla_dump_to": str(folder / name), "xla_dump_hlo_as_proto": True, "xla_dump_hlo_as_text": True}
            options["xla_dump_hlo_pass_re"] = PASSES["gpu"]
            jax.jit(step).lower(*arguments).compile(compiler_options=options)
        for suffix in ("hlo.pb", "txt"):
            (found,) = (folder / name).glob(f"*gpu_after_optimizations.{suffix}")
            found.rename(folder / f"{name}.{suffix}")
        (given,) = (folder / name).glob("*before_optimizations.hlo.pb")
        given.rename(folder / f"{name}.given.hlo.pb")
    return folder


def run(capsys, *arguments):
    code = main(["inspect", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_table(dumps, capsys):
    code, out, _ = run(capsys, dumps / "before.hlo.pb", "--mesh", "data=4,tensor=2")
    assert code == 0
    for text in ("jit_step", "XLA:GPU", "all-gather/tensor/f32", "peak", "test_inspect.py"):
        assert text in out
    assert max(map(len, out.splitlines())) <= 80


def test_json_of_text_and_proto(dumps, capsys):
    documents = []
    for suffix in ("hlo.pb", "txt"):
        code, out, _ = run(capsys, dumps / f"before.{suffix}", "--json", "--machine", "h100")
        assert code == 0
        documents.append(json.loads(out))
    proto, text = documents
    for key in ("matmul_flops", "collectives", "bytes", "not_understood", "flops"):
        assert proto[key] == text[key], key
    assert proto["matmul_flops"] == 2 * 2 * 16 * 128 * 64
    assert sum(proto["peak_classes"].values()) == proto["peak_bytes"] >= text["peak_bytes"]
    assert proto["memory"]["exact"] and not text["memory"]["exact"]
    kinds = {(line["kind"], tuple(line["axes"])) for line in proto["collectives"]}
    assert ("all-gather", ("axis1",)) in kinds


def test_pictures_and_traces(dumps, tmp_path, capsys):
    picture, trace = tmp_path / "m.png", tmp_path / "t.json"
    code, _, err = run(capsys, dumps / "before.hlo.pb", "--plot", picture, "--trace", trace)
    assert code == 0 and str(picture) in err and str(trace) in err
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(trace.read_text())["traceEvents"]


def test_difference(dumps, capsys):
    code, out, _ = run(capsys, dumps / "before.hlo.pb", "--against", dumps / "after.hlo.pb")
    assert code == 1 and "FLOPs" in out and "+50 %" in out
    code, out, _ = run(capsys, dumps / "before.hlo.pb", "--against", dumps / "before.hlo.pb")
    assert code == 0
    code, out, _ = run(capsys, dumps / "before.hlo.pb", "--against", dumps / "after.hlo.pb", "--json")
    assert code == 1 and json.loads(out)


BAD = {
    "no file": (["nowhere.pb"], "no such file"),
    "a folder": (["."], "folder"),
    "a device": (["/dev/zero"], "no file"),
    "not scheduled": (["{dumps}/before.given.hlo.pb"], "no schedule"),
    "another mesh": (["{dumps}/before.hlo.pb", "--mesh", "data=3"], "3 devices"),
    "a mesh in another order": (["{dumps}/before.hlo.pb", "--mesh", "tensor=8"], "no collective"),
    "no axes": (["{dumps}/before.hlo.pb", "--mesh", "data"], "not axis=degree"),
    "an axis of none": (["{dumps}/before.hlo.pb", "--mesh", "data=0"], "not a whole number"),
    "an axis twice": (["{dumps}/before.hlo.pb", "--mesh", "data=4,data=2"], "twice"),
    "far too many": (["{dumps}/before.hlo.pb", "--mesh", "a=999999,b=999999"], "more than"),
    "no machine": (["{dumps}/before.hlo.pb", "--machine", "h1000"], "did you mean"),
    "no picture": (["{dumps}/before.hlo.pb", "--plot", "x.txt"], "not a picture"),
    "no trace": (["{dumps}/before.hlo.pb", "--trace", "x.pb"], "not a trace"),
    "a picture of two": (["{dumps}/before.hlo.pb", "--against", "{dumps}/after.hlo.pb", "--plot", "x.png"], "one program"),
    "against nothing": (["{dumps}/before.hlo.pb", "--against", "nowhere"], "no such file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case, dumps, capsys):
    arguments, said = BAD[case]
    code, out, err = run(capsys, *(argument.format(dumps=dumps) for argument in arguments))
    last = err.strip().splitlines()[-1]
    assert code == 2 and out == "" and said in last and last.startswith("jaxllm: ")
    assert "Traceback" not in err


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00\x01\x02", b"HloModule", b"\x0a\x04\x0a\x02ab"])
def test_files_that_hold_no_program(content, tmp_path, capsys):
    path = tmp_path / "x.hlo.pb"
    path.write_bytes(content)
    code, out, err = run(capsys, path)
    assert code == 2 and out == "" and "byte " in err.strip().splitlines()[-1]


def test_a_cut_dump_says_where(dumps, tmp_path, capsys):
    for suffix in ("hlo.pb", "txt"):
        data = (dumps / f"before.{suffix}").read_bytes()
        path = tmp_path / f"cut.{suffix}"
        path.write_bytes(data[: len(data) // 2])
        code, _, err = run(capsys, path)
        assert code == 2 and "byte " in err


def test_jax_is_not_started(dumps):
    code = f"""
import sys
sys.modules["jax"] = sys.modules["numpy"] = None
from jaxllm.cli import main
sys.exit(main(["inspect", {str(dumps / "before.hlo.pb")!r}, "--machine", "h100"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
