"""The committed times keep to what is asked, and the large texts are programs that do so much more work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from experiments import bench_inspect, common
from jaxllm.hlo.inspect import inspect_program
from jaxllm.hlo.read import read_bytes
from jaxllm.report.inspection import total
from tests.hlo.dumps import dumped

COMMITTED = common.read_csv(common.COMMITTED / "bench_inspect.csv")


def test_the_committed_times_keep_to_what_is_asked() -> None:
    assert list(COMMITTED[0]) == list(bench_inspect.COLUMNS)
    assert [row["file"] for row in COMMITTED[-2:]] == ["405B, proto", "405B, text"]
    asked = [(row, limits) for row in COMMITTED if (limits := bench_inspect.limit(row["file"]))]
    assert len(asked) == 5
    for row, (seconds, memory) in asked:
        assert row["seconds"] < seconds and row["peak_gb"] < memory
        assert row["seconds"] == pytest.approx(row["read"] + row["measure"], abs=0.02)  # each rounded to 0.01
    for row in COMMITTED:
        if "100 MB" in row["file"]:
            # whole copies, whose names are longer than the original's
            assert row["mb"] == pytest.approx(100, rel=0.05) and row["per_line"] < 1.5


@pytest.mark.parametrize(("name", "target"), [("scan_in_scan", "cpu"), ("ring", "gpu"), ("cnn", "tpu")])
def test_an_enlarged_text_is_a_program_of_so_many_copies(name: str, target: str) -> None:
    text = dumped(name, target).text.decode()
    one = inspect_program(read_bytes(text.encode(), "one"))
    large = bench_inspect.enlarged(text, 4 * len(text))
    many, copies = inspect_program(read_bytes(large.encode(), "many")), large.count("%call.")
    assert copies >= 3 and abs(len(large) - 4 * len(text)) < 1.2 * len(text)  # a copy is never cut, and its names grow
    assert many.matmul_flops == copies * one.matmul_flops > 0
    assert total(many.collectives, "wire") == copies * total(one.collectives, "wire")
    assert many.not_understood == one.not_understood


def test_a_file_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(dumped("decode", "cpu").text)
    found = bench_inspect.alone(bench_inspect.measured, path)
    assert found["seconds"] == pytest.approx(found["read"] + found["measure"]) and 0 < found["seconds"] < 60
    assert found["instructions"] > 50 and 0.01 < found["peak_gb"] < 3


def test_the_memory_of_a_process_is_not_that_of_its_parent() -> None:
    held = bytearray(b"1") * 200_000_000  # every page of it written
    assert bench_inspect.held_at_most() > len(held)
    assert bench_inspect.alone(bench_inspect.held_at_most) < len(held) / 2


def test_help_names_the_question() -> None:
    command = [sys.executable, str(common.ROOT / "experiments" / "bench_inspect.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "How long does an inspection take?" in shown
