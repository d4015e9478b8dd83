"""What does kill -9 cost? Ten kills of one training run at random moments, each taken up again with --resume.

    python experiments/crashes.py [--steps N] [--out DIR]

A run is killed at random, while it starts, steps, evaluates or saves, and resumed, ten times over; then it ends. Each
time it may lose the steps since the last checkpoint, and no checkpoint may be unreadable. In the end its losses have to
be those of a run that nobody killed, to the last bit.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from experiments import common
from jaxllm.train import metrics
from jaxllm.train.request import last_checkpoint

ROOT = common.ROOT
RUN = (
    sys.executable, "-m", "jaxllm", "train", "docs/examples/config.json", "--mesh", "cpu:8",
    "--layout", "data=4,tensor=2,zero=3", "--text", "docs/examples/harbour.txt", "--seq", "64",
    "--save-every", "5", "--eval-every", "50",
)  # fmt: skip
EVERY = 5  # steps between two checkpoints
KILLS, STEPS = 10, 400
REACH = 60  # a life is killed within so many steps, or while it starts
SEED = 7  # of the moments


def train(folder: Path, steps: int, *, resume: bool) -> subprocess.Popen[bytes]:
    """Starts the run, quietly, as the first of a group of processes."""
    command = [*RUN, "--steps", str(steps), "--out", str(folder), *(["--resume"] if resume else [])]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def last_step(folder: Path) -> int:
    """The last step that metrics.csv tells of, 0 when none."""
    rows = metrics.read(folder / "metrics.csv")
    return rows[-1].step if rows else 0


def killed(folder: Path, steps: int, draw: random.Random, *, resume: bool) -> dict[str, Any]:
    """Starts or resumes the run and kills it at a random moment: while it starts, or after so many of its steps.

    Raises RuntimeError when it ends by itself before.
    """
    before, target = last_checkpoint(folder), draw.randint(-REACH // 6, REACH)
    begin = time.monotonic()
    process = train(folder, steps, resume=resume)
    while target > 0 and last_step(folder) < before + target and process.poll() is None:
        time.sleep(0.005)
    # A moment of its own: a step, an evaluation or a save is under way.
    with contextlib.suppress(subprocess.TimeoutExpired):
        _, said = process.communicate(timeout=draw.uniform(0, 0.2 if target > 0 else 5))
        raise RuntimeError(f"the run ended with {process.returncode}: {said.decode()[-300:]}; ask for more --steps.")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    seen, kept = last_step(folder), last_checkpoint(folder)
    return {
        "seconds": round(time.monotonic() - begin, 2), "began_after": before, "last_step": seen, "checkpoint": kept,
        "lost": max(0, seen - kept),
    }  # fmt: skip


def rows(folder: Path, steps: int) -> list[dict[str, Any]]:
    """A row a kill."""
    draw, found = random.Random(SEED), []
    for number in range(1, KILLS + 1):
        row = killed(folder, steps, draw, resume=(folder / "run.json").exists())
        found.append({"kill": number} | row)
        print(f"kill {number} of {KILLS}: {row}", file=sys.stderr, flush=True)
    return found


def finished(folder: Path, steps: int, *, resume: bool) -> list[metrics.Step]:
    """Lets the run end, and gives its metrics. Raises RuntimeError when it fails."""
    process = train(folder, steps, resume=resume)
    _, said = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the run ended with {process.returncode}: {said.decode()[-300:]}")
    return metrics.read(folder / "metrics.csv")


def main() -> int:
    def steps(parser: ArgumentParser) -> None:
        parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of the run, {STEPS} by default")

    options = common.options(__doc__, steps)
    with tempfile.TemporaryDirectory() as place:
        table = rows(Path(place) / "killed", options.steps)
        after_kills = finished(Path(place) / "killed", options.steps, resume=True)
        print("the same without kills", file=sys.stderr, flush=True)
        undisturbed = finished(Path(place) / "whole", options.steps, resume=False)
    same = sum(a.loss == b.loss and a.held_out == b.held_out for a, b in zip(after_kills, undisturbed, strict=True))
    table = [row | {"steps": options.steps, "same_to_the_bit": same} for row in table]
    common.write_csv(table, options.out / "crashes.csv")
    draw(table, options.out / "crashes.png")
    titles = {"kill": "kill", "seconds": "after s", "began_after": "began after", "last_step": "reached", "checkpoint": "kept",
              "lost": "steps lost"}  # fmt: skip
    common.show(table, titles)
    lost = max(row["lost"] for row in table)
    print(f"{same} of {options.steps} losses are the same to the bit; at most {lost} steps were lost, with {EVERY} between checkpoints")
    return 0 if same == options.steps and lost <= 2 * EVERY else 1


def draw(table: list[dict[str, Any]], path: Path) -> None:
    """From where to where each life of the run went, and how far back the next one began."""
    figure = common.figure(9, 3.6)
    axes = figure.subplots()
    for row in table:
        life = dict(height=0.6, left=row["began_after"])
        axes.barh(row["kill"], row["checkpoint"] - row["began_after"], color=common.FIRST, **life)
        axes.barh(row["kill"], row["lost"], height=0.6, left=row["checkpoint"], color=common.SECOND)
        axes.annotate(f" {row['lost']} lost", (max(row["last_step"], row["checkpoint"]), row["kill"]), va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set(
        xlabel="step", ylabel="kill", yticks=[row["kill"] for row in table],
        title="Each life of a run that is killed ten times: steps kept, and steps lost to the kill",
    )  # fmt: skip
    common.save_png(figure, path)


if __name__ == "__main__":
    sys.exit(main())
