"""The main job: predict, build, compile, measure, compare; and run, where there are devices."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, Literal

from jaxllm import targets
from jaxllm.cache import recalled
from jaxllm.report.compare import Comparison, compare
from jaxllm.spec.errors import SpecError
from jaxllm.spec.layout import Layout
from jaxllm.spec.ledger import Ledger
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.validate import default_batch, default_sequence, validate
from jaxllm.spec.workload import Workload
from jaxllm.theory import predict

Size = int | Literal["max"] | None
Say = Callable[[str], None]

SEQUENCE_STEP = 128  # `--seq max` looks at multiples of it: what matmul units like


def silent(message: str) -> None:
    """Progress that nobody reads."""


def check(
    model: ModelConfig,
    layout: Layout,
    mesh: Any,
    workload: Workload,
    *,
    target: str = "",
    run: bool = False,
    progress: Say = silent,
) -> Comparison:
    """Lays the closed form of one training step beside what the compiler makes of it; with `run`, takes three steps.

    Raises SpecError when the nouns do not go together, TargetError when the target cannot be used here.
    """
    from jaxllm.hlo import Dump, measure
    from jaxllm.program import build
    from jaxllm.program.run import LEARNING_RATE
    from jaxllm.program.run import run as take_steps
    from jaxllm.targets import compiler

    target = target or mesh.target
    validate(model, layout, mesh.devices, workload)
    predicted = predict(model, layout, workload)
    progress(f"building {model.name} for {layout} on {mesh}")
    # A run needs a rate at which three steps move the parameters; the ledger does not depend on it.
    rate = {"learning_rate": LEARNING_RATE} if run else {}
    built = build(model, layout, workload, targets.module(target).devices(mesh), **rate)
    lowered = compiler.lower(built, target)
    steps = None

    def measured() -> tuple[Ledger, str, dict[str, float]]:
        nonlocal steps
        progress(f"compiling with XLA:{lowered.compiler.upper()}")
        with compiler.compile(lowered) as compiled:
            start = time.perf_counter()
            dump = Dump.find(compiled.folder, lowered.compiler)
            ledger = measure(dump, built.axes, logical_bytes=built.logical_bytes)
            spent = {"compile": round(compiled.seconds, 3), "measure": round(time.perf_counter() - start, 3)}
            if run:
                progress("taking three steps, and the same three without any sharding")
                steps = take_steps(built, compiled.executable)
            return ledger, compiled.refused, spent

    ledger, refused, spent = measured() if run else recalled(lowered, measured)
    comparison = compare(predicted, ledger, capacity=mesh.capacity, refused=refused)
    return dataclasses.replace(comparison, run=steps, seconds={"lower": round(lowered.seconds, 3)} | spent)


def resolve(
    model: ModelConfig,
    layout: Layout,
    mesh: Any,
    batch: Size,
    sequence: Size,
    precision: str,
    optimizer: str = "adamw",
    gradient_dtype: str = "",
    *,
    share: float = 1.0,
) -> Workload:
    """The workload with its defaults filled in, and `max` searched for by closed form.

    `share` of the capacity is what the closed form may fill: below 1 when a compile has found it too hopeful.
    Raises SpecError where there is no limit to search against, or no closed form.
    """
    if "max" in (batch, sequence):
        if mesh.capacity is None:
            raise SpecError(f"{mesh.machine.name} has no memory limit, so nothing is the largest that fits; give numbers.")
        if layout.remat == "jax":
            raise SpecError("remat=jax has no closed form to search with; give numbers, or choose remat=full or none.")
    parts = default_batch(layout)

    def workload(sequences: int, tokens: int) -> Workload:
        return Workload(sequences * parts, tokens, precision, optimizer, gradient_dtype)

    def fits(candidate: Workload) -> bool:
        return predict(model, layout, candidate).peak <= mesh.capacity * share

    if isinstance(batch, int):  # checked here, so that what follows may count in sequences per device
        sequences = Workload(batch, 1, precision).sequences_per_device(layout)
    else:
        sequences = 1
    tokens = sequence if isinstance(sequence, int) else default_sequence(model)
    if sequence == "max":
        step = min(SEQUENCE_STEP, model.max_sequence)
        most = model.max_sequence // step
        tokens = step * _largest(lambda count: fits(workload(sequences, step * count)), most)
    if batch == "max":
        sequences = _largest(lambda count: fits(workload(count, tokens)))
    return workload(sequences, tokens)


def _largest(fits: Callable[[int], bool], most: float = math.inf) -> int:
    """The largest count from 1 to `most` that fits; 1 when nothing does, so that the verdict can say so."""
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = int(min(high, most + 1))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
