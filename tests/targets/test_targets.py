"""The targets: what they need, what they say when it is missing, and that they keep quiet."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxllm import targets
from jaxllm.cache import kernels, recalled
from jaxllm.check import build, measure
from jaxllm.spec.errors import SpecError, TargetError
from jaxllm.spec.layout import Layout
from jaxllm.spec.ledger import Ledger, Line, Rule, Term
from jaxllm.spec.machine import Machine
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.workload import Workload
from jaxllm.targets import compiler, gpu, start

TINY = ModelConfig.load("llama-tiny")

CHECK = [sys.executable, "-m", "jaxllm", "check", "llama-tiny"]


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in packages else found(name, *rest))


def test_targets_are_discovered() -> None:
    assert targets.names() == ("cpu", "gpu", "local", "tpu")
    with pytest.raises(SpecError, match="'tpx'; choose cpu, gpu, local, tpu"):
        targets.module("tpx")


@pytest.mark.parametrize(("mesh", "packages", "extra"), [
    ("h100:8", ("jax_cuda12_plugin", "jax_cuda13_plugin"), "cuda12-local"),
    ("v5e:2x4", ("libtpu",), "tpu"),
])  # fmt: skip
def test_a_missing_compiler_is_told_with_the_line_that_installs_it(monkeypatch, mesh, packages, extra) -> None:
    without(monkeypatch, *packages)
    with pytest.raises(TargetError, match=rf"not installed: pip install 'jax\[{extra}\]'"):
        build(TINY, Layout.parse("data=8"), Machine.load(mesh), Workload(8, 64))


@pytest.mark.parametrize("mesh", ["h100:8", "v5e:2x4"])
def test_a_platform_without_a_wheel_is_told(monkeypatch, mesh) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    with pytest.raises(TargetError, match="no wheel for Darwin arm64"):
        build(TINY, Layout.parse("data=8"), Machine.load(mesh), Workload(8, 64))


def test_missing_ptxas_is_told(monkeypatch) -> None:
    monkeypatch.setattr(gpu, "_ptxas", lambda: None)
    with pytest.raises(TargetError, match="ptxas"):
        gpu.devices(Machine.load("h100:8"))


def test_too_many_emulated_devices_are_refused() -> None:
    with pytest.raises(SpecError, match="4096 virtual devices are more than XLA:CPU can hold"):
        start.prepare("cpu", 4096)


def test_devices_that_are_not_here_are_refused() -> None:
    mesh = Machine.load("cpu:16")
    for target in ("cpu", "local"):
        with pytest.raises(TargetError, match="16"):
            build(TINY, Layout.parse("data=16"), mesh, Workload(16, 64), target=target)


def test_local_is_the_program_on_the_devices_here() -> None:
    built = build(TINY, Layout.parse("data=8"), Machine.load("h100:8"), Workload(8, 64), target="local")
    assert {device.platform for device in built.mesh.devices.flat} == {"cpu"}


def test_the_card_is_described_with_its_memory_unbounded() -> None:
    machine = Machine.read("h100")
    text = gpu.target_config(machine)
    assert f"device_memory_size: {machine.compiler['device_memory_size'] * gpu.UNBOUNDED}" in text
    assert "cuda_compute_capability { major: 9 minor: 0 }" in text


def test_the_message_of_a_refusal_has_the_totals() -> None:
    text = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
        "Used 20.10G of 15.75G hbm. Exceeded hbm capacity by 4.35G.\n\nTotal hbm usage >= 20.35G:"
    )
    assert compiler.memory_message(text).startswith("Used 20.10G of 15.75G hbm") or "memory space hbm" in compiler.memory_message(text)


def test_native_noise_stays_out_of_standard_error(capfd) -> None:
    with start.quiet():
        os.write(2, b"I0000 noise of native code\n")
        print("a word of ours", file=sys.stderr)
    captured = capfd.readouterr()
    assert "noise" not in captured.err


def test_noise_is_attached_to_the_error_it_led_to() -> None:
    with pytest.raises(ValueError) as caught, start.quiet():
        os.write(2, b"F0000 the reason\n")
        raise ValueError("it failed")
    assert "the reason" in "".join(caught.value.__notes__)


def test_an_interrupt_need_not_wait_for_the_compiler() -> None:
    release = threading.Event()
    result: list[object] = []
    waiter = threading.Thread(target=lambda: result.append(compiler._interruptible(lambda: release.wait(10), print)))
    waiter.start()
    release.set()
    waiter.join(5)
    assert result == [True]
    with pytest.raises(ZeroDivisionError):
        compiler._interruptible(lambda: 1 // 0, print)


# ---------------------------------------------------------------- the cache


class _Stages:
    def __init__(self, text: str):
        self.text = text

    def as_text(self, debug_info: bool = False) -> str:
        return self.text


def _lowered(text: str, mesh: str = "cpu:8") -> compiler.Lowered:
    built = build(TINY, Layout.parse("data=8"), Machine.load(mesh), Workload(8, 64))
    return compiler.Lowered(built, _Stages(text), 0.0)


LEDGER = Ledger(
    "XLA:CPU",
    (Line("collectives", "all-gather", 8, "forward", ("data",), "f32", 7, 2, 8, (Term("a", 8, "b", "c.py:1"),), (Rule("r", 1, "w"),)),),
    peak=9,
    peak_terms=(Term("x", 9),),
    unexplained=("u",),
)  # fmt: skip


def test_a_cache_of_jaxs_own_does_not_swallow_the_dump(tmp_path) -> None:
    code = """
import jaxllm
from jaxllm import Layout, Machine, ModelConfig, Workload
built = jaxllm.build(ModelConfig.load("llama-tiny"), Layout(), Machine.load("cpu:1"), Workload(1, 8))
import jax
jax.jit(lambda x: x + 1)(1.0)  # jax asks once in a process whether it has a cache
for _ in range(2):
    print(jaxllm.measure(jaxllm.compile(built)).line("parameters").value)
assert jax.config.jax_enable_compilation_cache
"""
    own = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | own)
    assert done.stdout.split() == [str(TINY.parameters * 4)] * 2, done.stderr[-500:]


def test_a_ledger_is_recalled_by_program(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path))
    calls = []

    def measured():
        calls.append(1)
        return LEDGER, "", {"compile": 1.0}

    first, second, other = (recalled(_lowered(text), measured) for text in ("one", "one", "two"))
    assert len(calls) == 2
    assert first[0] == second[0] == other[0] == (LEDGER, "", {"compile": 1.0})
    assert second[1] and not first[1]


def test_a_program_for_other_hardware_is_another(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path))
    machine = (Path(__file__).parents[2] / "meshes" / "h100.toml").read_text()
    assert "core_count = 132" in machine
    (tmp_path / "small.toml").write_text(machine.replace("core_count = 132", "core_count = 13"))
    calls = []
    for mesh in ("h100:8", f"{tmp_path}/small.toml:8", "v5e:2x4", "h100:8"):
        recalled(_lowered("one", mesh), lambda mesh=mesh: calls.append(mesh) or (LEDGER, "", {}))
    assert len(calls) == 3


def test_a_damaged_cache_is_as_good_as_none(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path))
    recalled(_lowered("one"), lambda: (LEDGER, "", {}))
    for path in tmp_path.iterdir():
        path.write_text('{"ledger": {"author"')
    assert recalled(_lowered("one"), lambda: (LEDGER, "again", {}))[0][1] == "again"


def test_an_unwritable_cache_is_as_good_as_none(monkeypatch, tmp_path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("JAXLLM_CACHE", str(blocked / "below"))
    assert recalled(_lowered("one"), lambda: (LEDGER, "", {}))[0][0] == LEDGER


def _written(content: bytes, hardware: str = "a card") -> bytes:
    """What a compilation that writes `content` finds in its file of kernels before; - where there is none."""
    with kernels(hardware) as options:
        assert list(options) == ["xla_gpu_kernel_cache_file"]
        path = Path(options["xla_gpu_kernel_cache_file"])
        found = path.read_bytes() if path.exists() else b"-"
        path.write_bytes(content)
    assert not path.exists()
    return found


def test_kernels_are_kept_by_hardware(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path))
    assert _written(b"one") == b"-"
    assert _written(b"one and two") == b"one"
    assert _written(b"other", "another card") == b"-"
    assert _written(b"") == b"one and two"
    monkeypatch.setattr("jaxllm.cache.MOST_KERNELS", 8)
    assert _written(b"eight...") == b""
    assert _written(b"nine.....") == b"eight..."
    assert _written(b"") == b"-"
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_hlo_as_text")  # another compiler, as it were
    assert _written(b"") == b"-"


def test_kernels_of_a_compilation_that_failed_are_not_kept(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path))
    _written(b"whole")
    with pytest.raises(ZeroDivisionError), kernels("a card") as options:
        Path(options["xla_gpu_kernel_cache_file"]).write_bytes(b"ha")
        1 / 0
    with kernels("a card"):  # it wrote nothing new
        pass
    assert _written(b"") == b"whole"


def test_damaged_kernels_are_as_good_as_none(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path))
    for damage in (lambda content: content[:-1], lambda content: content[:10], lambda content: b"", lambda content: content + b"."):
        _written(b"whole")
        (path,) = (tmp_path / "kernels").iterdir()
        path.write_bytes(damage(path.read_bytes()))
        assert _written(b"again") == b"-"


def test_no_kernels_without_a_cache(monkeypatch, tmp_path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("JAXLLM_CACHE", str(blocked / "below"))
    assert [_written(b"one") for _ in range(2)] == [b"-", b"-"]
    monkeypatch.setenv("JAXLLM_CACHE", "")
    with kernels("a card") as options:
        assert options == {}


def test_a_full_disk_keeps_no_kernels_and_stops_nothing(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path))
    _written(b"whole")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxllm.cache.os.replace", full)
    assert _written(b"more") == b"whole"
    assert [path.suffix for path in (tmp_path / "kernels").iterdir()] == [""]  # and no half of it is left
    assert _written(b"more") == b"whole"


def test_a_ledger_does_not_depend_on_kernels_that_were_there(monkeypatch, tmp_path) -> None:
    """And XLA takes them: what it keeps is more or less what was kept."""
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path))
    ledgers, sizes = [], []
    for _ in range(2):
        built = build(TINY, Layout(), Machine.load("h100:1"), Workload(1, 32, "bf16-f32"))
        ledgers.append(measure(compiler.compile(built)))
        sizes.append(sum(path.stat().st_size for path in (tmp_path / "kernels").iterdir()))
    assert ledgers[0] == ledgers[1]
    assert 0 < sizes[0] <= sizes[1] < 1.1 * sizes[0]


# ---------------------------------------------------------------- as a user meets them


def _environment(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")} | more


@pytest.mark.parametrize(("delay", "number"), [(1.0, signal.SIGINT), (2.0, signal.SIGTERM), (4.0, signal.SIGINT), (7.0, signal.SIGTERM)])
def test_an_interrupt_ends_a_check_at_once_whatever_it_is_at(delay: float, number: int, tmp_path: Path) -> None:
    arguments = [*CHECK, "--mesh", "h100:8", "--layout", "data=4,tensor=2,zero=3"]
    check = subprocess.Popen(
        arguments, env=_environment(TMPDIR=str(tmp_path)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with contextlib.suppress(subprocess.TimeoutExpired):
        assert check.wait(delay) == 0  # done sooner than that, on a fast machine: nothing is left to interrupt
        return
    check.send_signal(number)
    _, stderr = check.communicate(timeout=60)
    assert check.returncode in (128 + number, -number)  # before Python has set its handler the signal itself ends it
    if check.returncode == 128 + number:
        assert stderr.splitlines()[-1] == {signal.SIGINT: "jaxllm: interrupted", signal.SIGTERM: "jaxllm: terminated"}[number]
        assert "Traceback" not in stderr and not list(tmp_path.glob("jaxllm-*"))


WRITES_ON = """
import itertools, os, signal, tempfile, threading, time
from jaxllm import cli
folder = tempfile.mkdtemp(prefix=f"{cli.DUMP}{os.getpid()}-")
def write():
    for number in itertools.count():
        try:
            open(os.path.join(folder, str(number)), "w").close()
        except OSError:
            pass
threading.Thread(target=write, daemon=True).start()
signal.signal(signal.SIGTERM, cli._interrupt)
time.sleep(0.2)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""


def test_an_interrupt_leaves_no_dump_though_a_compiler_goes_on_to_write_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WRITES_ON], env=_environment(TMPDIR=str(tmp_path)), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "jaxllm: terminated\n")
    assert not list(tmp_path.iterdir())


def test_a_reader_that_leaves_is_no_difference() -> None:
    command = f"{sys.executable} -m jaxllm models | true; exit ${{PIPESTATUS[0]}}"
    table = subprocess.run(["bash", "-c", f"{sys.executable} -m jaxllm meshes h100 | head -1; exit ${{PIPESTATUS[0]}}"],
                           capture_output=True, text=True, env=_environment(), check=False)  # fmt: skip
    listing = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=_environment(), check=False)
    for done in (table, listing):
        assert done.returncode in (0, 141), done.stderr
        assert done.stderr == ""


@pytest.mark.parametrize("flags", ["--xla_nonsense=1", "--xla_force_host_platform_device_count=banana"])
def test_flags_that_xla_refuses_are_told(flags: str) -> None:
    arguments = [*CHECK, "--mesh", "cpu:8", "--layout", "data=8"]
    done = subprocess.run(arguments, capture_output=True, text=True, env=_environment(XLA_FLAGS=flags), check=False)
    assert done.returncode == 2
    assert flags in done.stderr.splitlines()[-1]


def test_the_users_own_platform_does_not_matter_to_an_absent_one(tmp_path) -> None:
    arguments = [*CHECK, "--mesh", "cpu:2", "--layout", "data=2", "--seq", "16"]
    environment = _environment(JAX_PLATFORMS="tpu", JAXLLM_CACHE=str(tmp_path))
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_several_checks_at_once_do_not_trip_over_each_other(tmp_path) -> None:
    def one(mesh: str) -> subprocess.CompletedProcess:
        arguments = [*CHECK, "--mesh", mesh, "--layout", "data=4,tensor=2,zero=3", "--seq", "32"]
        environment = os.environ | {"JAXLLM_CACHE": str(tmp_path)}
        environment.pop("XLA_FLAGS", None)
        return subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=300)

    with ThreadPoolExecutor(3) as pool:
        for done in pool.map(one, ["v5e:2x4", "v5e:2x4", "h100:8"]):
            assert done.returncode == 0, done.stderr
            assert all(line.startswith("jaxllm: ") for line in done.stderr.splitlines()), done.stderr


@pytest.mark.parametrize(("text", "memory"), [
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required (33.09G) exceeds (15.75G).", True),
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm.", True),
    ("RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 512, available: 1", False),
    ("INTERNAL: ptxas failed", False),
])  # fmt: skip
def test_a_program_is_too_large_when_the_device_is_too_small(text: str, memory: bool) -> None:
    assert compiler._is_memory(text) is memory
