"""Does the sharded run learn what an unsharded one learns? 200 steps of llama-tiny on a text, both ways.

    python experiments/curves.py [--steps N] [--out DIR]

One run is `jaxllm train` on eight emulated devices, with tensor parallelism and ZeRO 3. The other takes the same
parameters and batches through the reference that is written without any sharding, on one device. In f32 the losses have
to be within 1e-4 of each other at every step, and the held-out loss has to end below the entropy of the text's byte
pairs: the best that a table which sees one byte can do.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments import common

MODEL, MESH, LAYOUT = "llama-tiny", "cpu:8", "data=2,tensor=4,zero=3"
TEXT = common.ROOT / "docs" / "examples" / "harbour.txt"
STEPS = 200
WITHIN = 1e-4  # of a loss, in nats


def sharded(folder: Path, steps: int) -> list[Any]:
    """The rows of metrics.csv of `jaxllm train`."""
    from jaxllm.train import metrics

    command = [sys.executable, "-m", "jaxllm", "train", MODEL, "--mesh", MESH, "--layout", LAYOUT, "--text", str(TEXT)]
    command += ["--steps", str(steps), "--out", str(folder / "run")]
    subprocess.run(command, cwd=common.ROOT, check=True)
    return metrics.read(folder / "run" / "metrics.csv")


def unsharded(steps: int) -> Iterator[float]:
    """The losses of the reference on the same parameters and batches."""
    from jaxllm.check import build
    from jaxllm.spec.layout import Layout
    from jaxllm.spec.machine import Machine
    from jaxllm.spec.model import ModelConfig
    from jaxllm.spec.workload import Workload
    from jaxllm.train import request, text

    model, one = ModelConfig.load(MODEL), Layout()
    workload = Workload(request.training_batch(Layout.parse(LAYOUT)), 128)
    built = build(model, one, Machine.load("cpu:1"), workload)
    # What follows imports jax, which has to be started first.
    import jax
    import numpy as np

    from jaxllm.program.reference import reference_steps
    from jaxllm.train.batches import training_batch

    tokens = text.read_text(str(TEXT), None, model.vocab, workload.sequence)
    start = jax.tree.map(np.asarray, built.init_parameters(request.SEED))

    def batches() -> Iterator[Any]:
        for step in range(steps):
            batch = training_batch(tokens, built, request.SEED, step)
            yield {name: np.asarray(value)[0] for name, value in batch.items()}  # one microbatch

    peak, warmup = workload.keeps.rate, request.WARMUP
    rates = (peak * min(step / warmup, (warmup / step) ** 0.5) for step in itertools.count(1))
    for loss, *_ in reference_steps(model, start, batches(), learning_rates=rates):
        yield loss


def rows(folder: Path, steps: int) -> list[dict[str, Any]]:
    """A row a step: both losses, how far apart they are, and the held-out loss where it was evaluated."""
    measured = sharded(folder, steps)
    found = []
    for step, reference in zip(measured, unsharded(steps), strict=True):
        if step.step % 20 == 0:
            print(f"unsharded step {step.step} of {steps}: loss {reference:.4f}", file=sys.stderr, flush=True)
        apart = abs(step.loss - reference)
        found.append(
            {"step": step.step, "sharded": step.loss, "unsharded": reference, "apart": apart, "held_out": step.held_out}
        )
    return found


def draw(table: list[dict[str, Any]], entropy: float, path: Path) -> None:
    """Both curves, the held-out loss, and how far the curves are apart."""
    figure = common.figure(9, 4)
    losses, apart = figure.subplots(1, 2, width_ratios=(1.6, 1))
    step = [row["step"] for row in table]
    losses.plot(step, [row["unsharded"] for row in table], color=common.SECOND, linewidth=3, label="unsharded reference")
    losses.plot(step, [row["sharded"] for row in table], color=common.FIRST, linewidth=1, label=f"{LAYOUT} on {MESH}")
    held = [row for row in table if row["held_out"] is not None]
    losses.plot([row["step"] for row in held], [row["held_out"] for row in held], "o", color=common.INK, label="held out")
    losses.axhline(entropy, color=common.PALE, linestyle="--", label=f"byte pairs, {entropy:.2f}")
    losses.set(xlabel="step", ylabel="loss, nats a byte", title="The sharded run learns what the unsharded one learns")
    losses.legend(frameon=False)
    apart.semilogy(step, [max(row["apart"], 1e-9) for row in table], color=common.FIRST, linewidth=1)
    apart.axhline(WITHIN, color=common.PALE, linestyle="--")
    apart.set(xlabel="step", ylabel="nats", title="how far apart their losses are")
    common.save_png(figure, path)


def main() -> int:
    def steps(parser: ArgumentParser) -> None:
        parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of each run, {STEPS} by default")

    options = common.options(__doc__, steps)
    from jaxllm.train.text import read_text

    entropy = read_text(str(TEXT), None, 256, 128).pair_entropy
    with tempfile.TemporaryDirectory() as folder:
        table = rows(Path(folder), options.steps)
    common.write_csv(table, options.out / "curves.csv")
    draw(table, entropy, options.out / "curves.png")
    common.show(table[:: max(1, len(table) // 10)] + table[-1:], {name: name for name in table[0]})
    apart, last = max(row["apart"] for row in table), table[-1]["held_out"]
    print(f"largest difference {apart:.1e}, limit {WITHIN:.0e}; held out {last:.4f}, byte pairs {entropy:.4f}")
    return 0 if apart <= WITHIN and last < entropy else 1


if __name__ == "__main__":
    sys.exit(main())
