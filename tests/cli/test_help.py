import subprocess
import sys

import pytest

NAMES = ("check", "train", "inspect", "schedule", "time", "days", "shapes", "calibrate", "models", "meshes")
COMMANDS = [["--help"], *([name, "--help"] for name in NAMES), ["--version"]]
PROBE = """
import sys
from jaxllm.cli import main
code = main({arguments!r})
heavy = sorted({{"numpy", "jax", "flax", "optax", "matplotlib"}} & set(sys.modules))
assert not heavy, heavy
sys.exit(code)
"""


def run(*arguments, **more):
    return subprocess.run([sys.executable, "-m", "jaxllm", *arguments], capture_output=True, text=True, **more)


@pytest.mark.parametrize(
    "arguments",
    [
        *COMMANDS, ["models"], ["meshes"], ["models", "llama-3-8b", "--json"], ["meshes", "h100"], ["check", "x"],
        ["schedule", "zb-v", "--stages", "4", "--microbatches", "8"],
    ],  # fmt: skip
    ids=" ".join,
)
def test_help_and_listings_import_neither_numpy_nor_jax(arguments):
    done = subprocess.run([sys.executable, "-c", PROBE.format(arguments=arguments)], capture_output=True, text=True)
    assert "AssertionError" not in done.stderr
    assert done.returncode == (2 if arguments == ["check", "x"] else 0)


def test_importing_the_package_imports_neither_numpy_nor_jax():
    code = "import jaxllm, jaxllm.report, jaxllm.spec.model, sys; sys.exit(bool({'numpy', 'jax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_help_lists_the_commands_and_options():
    assert all(word in run("--help").stdout for word in (*NAMES, "--version"))
    shown = run("check", "--help").stdout
    for option in (
        "--mesh", "--layout", "--batch", "--seq", "--precision", "--optimizer", "--target", "--run", "--explain",
        "--strict", "--json", "--plot", "--gradient-dtype", "--bundle",
    ):  # fmt: skip
        assert option in shown


def test_version():
    import jaxllm

    done = run("--version")
    assert (done.stdout, done.returncode) == (f"jaxllm {jaxllm.__version__}\n", 0)


def test_version_is_the_one_of_the_package_metadata():
    import tomllib
    from pathlib import Path

    import jaxllm

    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert tomllib.loads(text)["project"]["version"] == jaxllm.__version__


def test_names_of_the_package():
    import jaxllm

    assert {"ModelConfig", "Layout", "Machine", "Workload", "predict", "build", "compile", "measure", "compare"} <= set(
        dir(jaxllm)
    )
    assert jaxllm.Layout.parse("data=8").devices == 8
    with pytest.raises(AttributeError, match="nonsense"):
        jaxllm.nonsense  # noqa: B018
