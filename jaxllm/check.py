"""The main job: predict, build, compile, measure, compare; and run, where there are devices."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from jaxllm import targets
from jaxllm.bundle import save_program
from jaxllm.cache import recalled
from jaxllm.report.compare import Comparison, compare
from jaxllm.spec.errors import SpecError
from jaxllm.spec.layout import Layout
from jaxllm.spec.ledger import COLLECTIVES, Ledger
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.validate import default_batch, default_sequence, validate, validate_host, validate_target
from jaxllm.spec.workload import Workload
from jaxllm.targets import start
from jaxllm.theory import PLAIN_AUTODIFF, predict

if TYPE_CHECKING:
    from pathlib import Path

    from jaxllm.hlo import Dump
    from jaxllm.program import Built
    from jaxllm.report.inspection import Report
    from jaxllm.spec.machine import Mesh
    from jaxllm.targets.compiler import Compiled

Size = int | Literal["max"] | None
Say = Callable[[str], None]

SEQUENCE_STEP = 128  # `--seq max` looks at multiples of it: what matmul units like


def silent(message: str) -> None:
    """Progress that nobody reads."""


def build(
    model: ModelConfig, layout: Layout, mesh: Mesh, workload: Workload, *, target: str = "", **options: Any
) -> Built:
    """A training step for the model on the mesh, for the mesh's own target or another.

    Starts jax when it is not running yet, for which it sets environment variables of this process: JAX_PLATFORMS,
    XLA_FLAGS and others that tell jax which devices there are. Raises SpecError when the nouns do not go together, TargetError when the
    target cannot be used here.
    """
    target = target or mesh.target
    targets.validate(target, mesh)
    validate(model, layout, mesh.devices, workload)
    validate_target(target, layout, workload)
    start.prepare(target, mesh.devices)
    with start.quiet():
        from jaxllm.program import build

        hardware = repr((target, mesh.topology, mesh.machine.compiler))
        devices = targets.module(target).devices(mesh)
        validate_host(devices[0].platform, layout)  # of target local nobody knew before
        return build(model, layout, workload, devices, target=target, hardware=hardware, **options)


def measure(compiled: Any, **options: Any) -> Ledger | Report:
    """The ledger of a step that `compile` gave, read from XLA's protos; of any other jax.stages.Compiled its report, for
    which jaxllm.inspection.measure has the options."""
    from jaxllm.inspection import measure as report
    from jaxllm.targets.compiler import Compiled

    return _ledger(compiled) if isinstance(compiled, Compiled) else report(compiled, **options)


def _ledger(compiled: Compiled) -> Ledger:
    from jaxllm.hlo import measure

    built = compiled.lowered.built
    return measure(
        dump_of(compiled), built.axes, logical_bytes=built.logical_bytes, needed_bytes=built.needed_bytes
    )


def dump_of(compiled: Compiled) -> Dump:
    from jaxllm.hlo import Dump

    return Dump.find(compiled.dump.name, compiled.lowered.compiler, devices=compiled.lowered.built.mesh.size)


def check(
    model: ModelConfig,
    layout: Layout,
    mesh: Mesh,
    workload: Workload,
    *,
    target: str = "",
    run: bool = False,
    progress: Say = silent,
    bundle: Path | None = None,
) -> Comparison:
    """Lays the closed form of one training step beside what the compiler makes of it; with `run`, takes three steps.

    The program, XLA's protos and both ledgers are written to the folder `bundle`. Raises what `build` and `compile`
    raise.
    """
    predicted = predict(model, layout, workload, target=target or mesh.target)
    progress(f"building {model.name} for {layout} on {mesh}")
    options: dict[str, Any] = {}
    if run:
        start.prepare(target or mesh.target, mesh.devices)  # before what follows imports jax
        from jaxllm.program import run as runs

        # The ledger does not depend on it
        options["learning_rate"] = runs.learning_rate(workload.optimizer, model, fp8=workload.dtypes.fp8)
    built = build(model, layout, mesh, workload, target=target, **options)
    from jaxllm.targets import compiler

    lowered = compiler.lower(built)
    steps = None

    def measured() -> tuple[Ledger, str, dict[str, float]]:
        nonlocal steps
        progress(f"compiling with XLA:{lowered.compiler.upper()}")
        compiled = compiler.compile(lowered, progress)
        begin = time.perf_counter()
        ledger = _ledger(compiled)
        if bundle is not None:
            save_program(bundle, lowered.stages.as_text(debug_info=True), dump_of(compiled), predicted, ledger)
        spent = {"compile": round(compiled.seconds, 3), "measure": round(time.perf_counter() - begin, 3)}
        if run:
            progress("taking three steps, and the same three without any sharding")
            steps = runs.run(built, compiled.executable)
        return ledger, compiled.refused, spent

    (ledger, refused, spent), cached = (measured(), False) if run or bundle else recalled(lowered, measured)
    unknown = dict.fromkeys(("matmul", *COLLECTIVES), PLAIN_AUTODIFF) if layout.remat == "jax" else {}
    comparison = compare(predicted, ledger, capacity=mesh.capacity, not_comparable=unknown, refused=refused)
    return dataclasses.replace(
        comparison,
        run=steps,
        seconds={"lower": round(lowered.seconds, 3)} | spent,
        cached=cached,
        notes=(*comparison.notes, *_without_8_bits(mesh, workload)),
    )


def _without_8_bits(mesh: Mesh, workload: Workload) -> tuple[str, ...]:
    """A note where products are to be in 8 bits, and no source says that the chips multiply so."""
    machine = mesh.machine
    if not workload.dtypes.fp8 or "fp8" in machine.peak_flops or machine.target == "cpu":
        return ()
    return (
        f"precision {workload.precision}: no source has a rate of {machine.name} for matmuls in 8 bits; its compiler takes them, "
        "and nothing says that they are faster than those in bf16",
    )


def check_largest(
    model: ModelConfig,
    layout: Layout,
    mesh: Mesh,
    resolved: Callable[[float], Workload],
    *,
    target: str = "",
    run: bool = False,
    progress: Say = silent,
    bundle: Path | None = None,
) -> tuple[Workload, Comparison]:
    """The largest workload that fits: searched for by closed form, confirmed by a compile.

    `resolved(factor)` is the workload that fits when all that grows with it is `factor` times the closed form's. Where
    the compile finds the closed form too hopeful, the search is repeated with the factor that it found, twice at most.
    """
    factor, hopeful = 1.0, []
    while True:
        workload = resolved(factor)
        comparison = check(model, layout, mesh, workload, target=target, run=run, progress=progress, bundle=bundle)
        peak = comparison.peak
        if comparison.fits or len(hopeful) == 2 or resolved(math.inf) == workload:
            return workload, dataclasses.replace(comparison, notes=(*comparison.notes, *hopeful))
        hopeful.append(
            f"by closed form alone batch {workload.batch:,} of {workload.sequence:,} tokens fits; compiled it does not"
        )
        held = _held(comparison)
        factor = (peak.compiled - held) / (peak.predicted - held) if peak.compiled else factor * (1 + peak.tolerance)


def resolve(
    model: ModelConfig,
    layout: Layout,
    mesh: Mesh,
    batch: Size,
    sequence: Size,
    precision: str,
    optimizer: str = "adamw",
    gradient_dtype: str = "",
    *,
    target: str = "",
    factor: float = 1.0,
) -> Workload:
    """The workload with its defaults filled in, and `max` searched for by closed form.

    What is not held between steps counts `factor` times: above 1 when a compile has found the closed form too hopeful.
    Raises SpecError where there is no limit to search against, or no closed form.
    """
    if "max" in (batch, sequence):
        if mesh.capacity is None:
            raise SpecError(f"{mesh.machine.name} has no memory limit, so nothing is the largest that fits; give numbers.")
        if layout.remat == "jax":
            raise SpecError("remat=jax has no closed form to search with; give numbers, or choose remat=none, selective or full.")
    parts = default_batch(layout)

    def workload(sequences: int, tokens: int) -> Workload:
        return Workload(sequences * parts, tokens, precision, optimizer, gradient_dtype)

    def fits(candidate: Workload) -> bool:
        ledger = predict(model, layout, candidate, target=target or mesh.target)
        held = _held(ledger)
        return held + factor * (ledger.peak - held) <= mesh.capacity

    if isinstance(batch, int):  # checked here, so that what follows may count in sequences per device
        sequences = Workload(batch, 1, precision).sequences_per_device(layout)
    else:
        sequences = 1
    tokens = sequence if isinstance(sequence, int) else default_sequence(model, layout)
    if sequence == "max":  # of what the model was made for
        longest = max(1, model.max_sequence // layout.sequence_parts) * layout.sequence_parts
        step = min(math.lcm(SEQUENCE_STEP, layout.sequence_parts), longest)
        most = model.max_sequence // step
        tokens = step * _largest(lambda count: fits(workload(sequences, step * count)), most)
    if batch == "max":
        sequences = _largest(lambda count: fits(workload(count, tokens)))
    return workload(sequences, tokens)


def _held(ledger: Ledger | Comparison) -> int:
    """Bytes that do not grow with the workload, by closed form: state and gradients. In a pipeline those of the first
    stage, which has as many as all the others."""
    names = ("parameters", "optimizer", "gradients", "padding", "uniform")
    lines = [line for line in ledger.section("memory") if line.name in names]
    if isinstance(ledger, Comparison):
        return sum(row.on_stage(0)[0] for row in lines)
    return sum(line.on_stage(0) for line in lines)


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
