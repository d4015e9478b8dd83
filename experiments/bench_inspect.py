"""How long does an inspection take? Texts of 1 to 100 MB of three compilers, and the step of 405B on 16,384 cards.

    python experiments/bench_inspect.py [--repeat N] [--out DIR]

A step of Llama is compiled by each compiler, with no device, and its text is repeated: all its computations again under
new names, called one after the other by a new entry, as if the step had that many more layers. The program of 405B is
taken as it is, as a proto and as a text. Each file is read and measured in a process of its own. `MB/s` is of both
together; `per line` compares the time of an instruction with that in the smallest text of the same compiler, and says
whether time grows faster than the text. Seconds are the processor's: the work is one thread, and what else the machine
does meanwhile is left out. The fastest repetition is shown, with the most memory of any.
"""

from __future__ import annotations

import multiprocessing
import re
import resource
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import common


@dataclass(frozen=True)
class Step:
    """A training step, by the words of the command line."""

    model: str
    mesh: str
    layout: str
    batch: int
    sequence: int


STEPS = {
    "gpu": Step("llama-2-7b", "h100:8", "data=4,tensor=2,zero=3,remat=full", 8, 2048),
    "tpu": Step("llama-tiny", "v5e:2x4", "data=4,tensor=2,zero=3,remat=full", 8, 128),
    "cpu": Step("llama-tiny", "cpu:8", "data=4,tensor=2,zero=3,remat=full", 8, 128),
    "405b": Step("llama-3.1-405b", "h100:2048x8", "data=2048,tensor=8,zero=3,remat=full", 2048, 8192),
}
MEGABYTES = (1, 10, 100)
COLUMNS = {
    "file": "file", "mb": "MB", "instructions": "instructions", "read": "read", "measure": "measure",
    "seconds": "seconds", "mb_per_s": "MB/s", "per_line": "per line", "peak_gb": "memory, GB",
}  # fmt: skip

# What is asked of the largest text, and of the program of 405B: seconds, and GB.
LIMITS = {"100 MB": (15.0, 3.0), "405B": (1.0, 3.0)}


def alone(function: Any, *arguments: Any) -> Any:
    """What a function gives in a process of its own, whose memory is its own as well."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def compiled(name: str, folder: Path) -> tuple[Path, Path]:
    """Compiles one of the steps. Paths of its optimized module as a proto and as a text."""
    from jaxllm import Layout, Machine, ModelConfig, Workload, build, compile
    from jaxllm.hlo import Dump
    from jaxllm.targets import start

    step, machine = STEPS[name], Machine.load(STEPS[name].mesh)
    start.prepare(machine.target, machine.devices)
    precision = "f32" if machine.target == "cpu" else "bf16-f32"
    workload = Workload(step.batch, step.sequence, precision)
    with start.quiet():
        built = build(ModelConfig.load(step.model), Layout.parse(step.layout), machine, workload)
        program = compile(built)
        proto, text = folder / f"{name}.hlo.pb", folder / f"{name}.txt"
        proto.write_bytes(Dump.find(program.dump.name, machine.target).optimized.read_bytes())
        text.write_text(program.executable.as_text())
    return proto, text


def enlarged(text: str, size: float) -> str:
    """A text of about `size` bytes: all computations of a program again and again under new names, and an entry that
    calls each of them with its own arguments."""
    start = text.rindex("\n\n", 0, re.search(r"^(ENTRY )?%\S+ \(", text, re.M).start()) + 2
    head, body = text[:start], text[start:]
    entry = re.search(r"^ENTRY (%\S+) \((.*)\) -> (.*) \{\n", body, re.M)
    lines = body[entry.end() :].splitlines()
    arguments = sorted((line for line in lines if " parameter(" in line), key=lambda line: int(_number(line)))
    shape = re.match(r"  ROOT \S+ = (.*?) [a-z][\w\-]*\(", next(line for line in lines if line.startswith("  ROOT")))[1]
    names = ", ".join(re.match(r"  (%\S+) = ", line)[1] for line in arguments)
    pieces = re.split(r"(?<=%)([\w.\-]+)", body.replace("ENTRY ", ""))

    def again(copy: int) -> str:
        return "".join(f"{piece}.copy{copy}" if place % 2 else piece for place, piece in enumerate(pieces)) + "\n\n"

    copies = max(1, round(size / len(again(0))))
    texts = [head, *map(again, range(copies))]
    texts.append(f"ENTRY %main ({entry[2]}) -> {entry[3]} {{\n" + "".join(f"{line}\n" for line in arguments))
    for copy in range(copies):
        root = "ROOT " if copy == copies - 1 else ""
        texts.append(f"  {root}%call.{copy} = {shape} call({names}), to_apply={entry[1]}.copy{copy}\n")
    return "".join((*texts, "}\n"))


def _number(line: str) -> str:
    return re.search(r" parameter\((\d+)\)", line)[1]


def enlarge(source: Path, target: Path, megabytes: int) -> None:
    target.write_text(enlarged(source.read_text(), megabytes * 1e6))


def measured(path: Path) -> dict[str, float]:
    """Seconds of reading and of measuring a file, its size, and the memory that this process took at most."""
    from jaxllm.hlo.inspect import inspect_program
    from jaxllm.hlo.read import read_file

    begin = time.process_time()
    program = read_file(path)
    read = time.process_time()
    inspect_program(program)
    end = time.process_time()
    return {
        "mb": path.stat().st_size / 1e6,
        "instructions": sum(len(computation.instructions) for computation in program.module.computations.values()),
        "read": read - begin,
        "measure": end - read,
        "seconds": end - begin,
        "peak_gb": held_at_most() / 1e9,
    }


def held_at_most() -> int:
    """Bytes of memory that this process held at most. Where /proc does not tell it, getrusage does, but its figure
    begins with what the parent held when it started this process."""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def row(name: str, path: Path, repeat: int) -> dict[str, Any]:
    common.progress(f"{name}, {repeat} times")
    runs = [alone(measured, path) for _ in range(repeat)]
    found = min(runs, key=lambda run: run["seconds"])
    return dict.fromkeys(COLUMNS) | {
        "file": name,
        "mb": round(found["mb"], 1),
        "instructions": int(found["instructions"]),
        **{key: round(found[key], 2) for key in ("read", "measure", "seconds")},
        "mb_per_s": round(found["mb"] / found["seconds"], 1),
        "peak_gb": round(max(run["peak_gb"] for run in runs), 2),
    }


def rows(repeat: int) -> list[dict[str, Any]]:
    table = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for target in ("gpu", "tpu", "cpu"):
            common.progress(f"compiling {STEPS[target].model} for {STEPS[target].mesh}")
            _, text = alone(compiled, target, folder)
            mine: list[dict[str, Any]] = []
            for size in MEGABYTES:
                path = folder / "enlarged.txt"
                alone(enlarge, text, path, size)
                mine.append(row(f"XLA:{target.upper()}, text of {size} MB", path, repeat))
                each = [one["seconds"] / one["instructions"] for one in (mine[0], mine[-1])]
                mine[-1]["per_line"] = round(each[1] / each[0], 2)
            table += mine
        common.progress(f"compiling {STEPS['405b'].model} for {STEPS['405b'].mesh}")
        proto, text = alone(compiled, "405b", folder)
        table += [row("405B, proto", proto, repeat), row("405B, text", text, repeat)]
    return table


def limit(name: str) -> tuple[float, float] | None:
    """Seconds and GB that are asked of a file; None when nothing is."""
    return next((limits for word, limits in LIMITS.items() if word in name), None)


def draw(table: Sequence[common.Row], path: Path) -> None:
    """A bar a file, reading and measuring, and what is asked of it."""
    figure = common.figure(9, 1.2 + 0.4 * len(table))
    axes = figure.subplots()
    for place, row in enumerate(table):
        reading, measuring = ("", "") if place else ("reading", "measuring")
        axes.barh(place, row["read"], height=0.6, color=common.FIRST, label=reading)
        axes.barh(place, row["measure"], left=row["read"], height=0.6, color=common.SECOND, label=measuring)
        asked = limit(row["file"])
        if asked:
            label = "" if place != 2 else "the limit"
            axes.plot([asked[0]] * 2, [place - 0.4, place + 0.4], color=common.INK, lw=1.6, label=label)
        end = max(row["seconds"], asked[0] if asked else 0)
        axes.annotate(f"  {row['seconds']:.2f} s, {row['peak_gb']:.2f} GB", (end, place), va="center")
    axes.set_yticks(range(len(table)), [row["file"] for row in table])
    axes.invert_yaxis()
    fastest, slowest = (pick(row["mb_per_s"] for row in table if "100 MB" in row["file"]) for pick in (max, min))
    title = f"An inspection goes through {slowest:.0f} to {fastest:.0f} MB of a large text in a second"
    axes.set(xlabel="seconds of one core", title=title, xlim=(0, 19))
    axes.legend(frameon=False, loc="lower right")
    common.save_png(figure, path)


def main() -> int:
    def repeat(parser: ArgumentParser) -> None:
        parser.add_argument("--repeat", type=int, default=3, help="repetitions of each file, 3 by default")

    options = common.options(__doc__, repeat)
    table = rows(max(1, options.repeat))
    common.show(table, COLUMNS)
    common.write_csv(table, options.out / "bench_inspect.csv")
    draw(table, options.out / "bench_inspect.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
