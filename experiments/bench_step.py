"""Is the train step as fast as one that is written by hand in plain JAX?

    python experiments/bench_step.py [--pairs N] [--out DIR]

Both steps run on the emulated mesh cpu:8, in one process and warm: ours, and experiments/plain_step.py, with the same
parameters, batch, layout, remat, precision and donation. A pair is one step of each, in turn first and second, so that
what slows the machine down for a while slows down both; the median of the pairs' ratios is what counts. Emulated
devices share the processors of one host: ratios within one run say something, seconds do not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from experiments import common
from jaxllm.spec.layout import Layout
from jaxllm.spec.machine import Machine
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.workload import Workload

DEVICES = 8
# As wide as keeps a step below a second on two cores: arithmetic outweighs the threads' waiting for each other, which
# is dear on an emulated mesh and says nothing of a real one.
MODEL = ModelConfig(
    name="llama-15m",
    layers=4,
    d_model=512,
    d_ff=1536,
    heads=8,
    kv_heads=8,
    head_dim=64,
    vocab=2048,
    tied=False,
    rope_theta=1e4,
    rope_scaling=None,
    norm_epsilon=1e-5,
    max_sequence=4096,
    source="made for this experiment; not a published model",
)
WORKLOAD = Workload(batch=8, sequence=128, precision="f32")
LAYOUTS = (
    "data=8",
    "data=4,tensor=2,zero=1,remat=full",
    "data=4,tensor=2,zero=2,remat=full",
    "data=8,zero=3,remat=full",
)
PAIRS, WARM = 20, 2
LEARNING_RATE = 3e-4
LIMIT = 1.05  # what the median ratio should not exceed
LOSS_TOLERANCE = 1e-5  # relative, of the first loss: else the two do not compute the same

COLUMNS = {
    "layout": "layout",
    "ours_s": "ours s",
    "plain_s": "plain s",
    "ratio": "ratio",
    "least": "least",
    "most": "most",
    "processor_ratio": "CPU ratio",
    "ours_mb": "ours MB",
    "plain_mb": "plain MB",
}


class Taken(NamedTuple):
    """Of one step: seconds, seconds of all processors, and the loss."""

    seconds: float
    processor: float
    loss: float


@dataclass
class Runner:
    """A compiled step with its state on the mesh, which each call of `take` moves on by one step."""

    step: Any  # jax.stages.Compiled
    state: tuple[Any, Any]
    batch: tuple[Any, ...]
    loss: Callable[[Any], float]

    def take(self) -> Taken:
        """One step."""
        import jax

        begin, used = time.perf_counter(), time.process_time()
        *state, told = jax.block_until_ready(self.step(*self.state, *self.batch))
        seconds, processor = time.perf_counter() - begin, time.process_time() - used
        self.state = tuple(state)
        return Taken(seconds, processor, self.loss(told))

    @property
    def temporaries(self) -> int:
        """Bytes of one device beside arguments and results, by XLA."""
        return int(self.step.memory_analysis().temp_size_in_bytes)


def ours(
    model: ModelConfig, layout: Layout, workload: Workload, start: Mapping[str, Any], batch: Mapping[str, Any],
    learning_rate: float = LEARNING_RATE,
) -> Runner:  # fmt: skip
    """jaxllm's step over the first devices here. `start` and `batch` are host arrays."""
    import jax

    from jaxllm.check import build

    mesh = Machine.load(f"cpu:{layout.devices}")
    built = build(model, layout, mesh, workload, target="cpu", learning_rate=learning_rate)
    parameters, _, rows = jax.tree.map(lambda leaf: leaf.sharding, built.arguments)
    parameters = jax.device_put(start, parameters)
    tokens = jax.device_put({name: array[None] for name, array in batch.items()}, rows)  # one microbatch
    step = built.lower().compile()
    return Runner(step, (parameters, built.init_optimizer(parameters)), (tokens,), lambda told: float(told["loss"]))


def plain(
    model: ModelConfig, layout: Layout, start: Mapping[str, Any], batch: Mapping[str, Any],
    learning_rate: float = LEARNING_RATE,
) -> Runner:  # fmt: skip
    """The hand-written step over the same devices."""
    import jax

    from experiments.plain_step import plain_step

    step, init, (held, rows) = plain_step(model, layout, jax.devices()[: layout.devices], learning_rate)
    parameters = jax.device_put(start, held)
    state = init(parameters)
    arrays = jax.device_put((batch["tokens"], batch["targets"]), rows)
    return Runner(step.lower(parameters, state, *arrays).compile(), (parameters, state), arrays, float)


def both(text: str, model: ModelConfig = MODEL, workload: Workload = WORKLOAD) -> tuple[Runner, Runner]:
    """Ours and the plain step for a layout, from the same parameters and with the same batch."""
    import numpy as np

    from jaxllm.program.run import random_batch, random_parameters

    rng = np.random.default_rng(0)
    start, batch = random_parameters(model, rng), random_batch(model, workload.batch, workload.sequence, rng)
    layout = Layout.parse(text)
    return ours(model, layout, workload, start, batch), plain(model, layout, start, batch)


def pairs(first: Runner, second: Runner, count: int) -> list[tuple[Taken, Taken]]:
    """`count` pairs of steps, after WARM that do not count. Raises ValueError when the first losses differ."""
    taken = []
    for number in range(WARM + count):
        if number % 2:
            b, a = second.take(), first.take()
        else:
            a, b = first.take(), second.take()
        if number == 0 and not abs(a.loss - b.loss) <= LOSS_TOLERANCE * abs(b.loss):
            raise ValueError(f"the two steps do not compute the same: their losses are {a.loss} and {b.loss}")
        taken.append((a, b))
    return taken[WARM:]


def summary(taken: Sequence[tuple[Taken, Taken]]) -> dict[str, Any]:
    """Medians of the seconds and of the ratios of pairs, and the extremes of the latter."""
    ratios = [a.seconds / b.seconds for a, b in taken]
    return {
        "pairs": len(taken),
        "ours_s": round(statistics.median(a.seconds for a, _ in taken), 4),
        "plain_s": round(statistics.median(b.seconds for _, b in taken), 4),
        "ratio": round(statistics.median(ratios), 3),
        "least": round(min(ratios), 3),
        "most": round(max(ratios), 3),
        "processor_ratio": round(statistics.median(a.processor / b.processor for a, b in taken), 3),
    }


def rows(count: int) -> Iterator[dict[str, Any]]:
    for text in LAYOUTS:
        common.progress(f"compiling both steps for {text}")
        first, second = both(text)
        common.progress(f"taking {count} pairs of steps")
        yield {
            "model": MODEL.name,
            "batch": WORKLOAD.batch,
            "sequence": WORKLOAD.sequence,
            "layout": text,
            **summary(pairs(first, second, count)),
            "ours_mb": round(first.temporaries / 1e6, 1),
            "plain_mb": round(second.temporaries / 1e6, 1),
        }


def shown(table: Sequence[common.Row]) -> list[dict[str, Any]]:
    """The table with as many digits as mean something."""
    digits = {"ours_s": 3, "plain_s": 3, "ratio": 3, "least": 2, "most": 2, "processor_ratio": 3}
    return [dict(row) | {name: f"{row[name]:.{places}f}" for name, places in digits.items()} for row in table]


def draw(table: Sequence[common.Row], path: Path) -> None:
    """The median ratio of each layout as a dot, on a line from the least to the most."""
    figure = common.figure(9, 1.4 + 0.5 * len(table))
    most = max(row["ratio"] for row in table)
    figure.suptitle(
        f"A step takes up to {most:.2f} times the plain one, by the median of {table[0]['pairs']} pairs",
        x=0.01, ha="left", weight="bold",
    )  # fmt: skip
    axes = figure.subplots()
    for place, row in enumerate(table):
        axes.hlines(place, row["least"], row["most"], color=common.PALE, lw=5)
        axes.plot(row["ratio"], place, "o", color=common.FIRST, ms=8)
        axes.annotate(
            f"{row['ratio']:.3f}", (row["ratio"], place), (0, 8), textcoords="offset points", ha="center",
            bbox={"color": "white", "pad": 0.5},
        )  # fmt: skip
    axes.axvline(1, color=common.INK, lw=1)
    axes.axvline(LIMIT, color=common.SECOND, lw=1, ls=(0, (5, 3)), label=f"{LIMIT}: the median's limit")
    axes.set_yticks(range(len(table)), [row["layout"] for row in table])
    axes.set(xlabel="seconds of ours / seconds of the plain step", ylim=(len(table) - 0.5, -0.7))
    axes.tick_params(axis="y", length=0)
    figure.legend(frameon=False, loc="outside lower left", ncols=2)
    common.save_png(figure, path)


def add_pairs(parser: argparse.ArgumentParser) -> None:
    def whole(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more, as in --pairs {PAIRS}")
        return int(text)

    parser.add_argument("--pairs", type=whole, default=PAIRS, metavar="N", help=f"pairs of steps, {PAIRS} by default")


def main() -> int:
    options = common.options(__doc__, add_pairs)
    from jaxllm.targets import start

    start.prepare("cpu", DEVICES)
    table = list(rows(options.pairs))
    batch = f"batch {WORKLOAD.batch} of {WORKLOAD.sequence} tokens"
    print(f"{MODEL.name}, {MODEL.parameters:,} parameters, {batch}, cpu:{DEVICES}")
    common.show(shown(table), COLUMNS)
    common.write_csv(table, options.out / "bench_step.csv")
    draw(table, options.out / "bench_step.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
