"""The command `jaxllm train`: reads what was asked, checks all that can be checked, and only then starts JAX."""

from __future__ import annotations

import contextlib
import gc
import io
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm import targets
from jaxllm.options import count, number, progress
from jaxllm.report.table import console, print_fields
from jaxllm.report.units import human
from jaxllm.spec.errors import DoesNotFit, SpecError, TargetError
from jaxllm.spec.layout import Layout
from jaxllm.spec.machine import Machine
from jaxllm.spec.model import ModelConfig
from jaxllm.targets import start
from jaxllm.theory import predict
from jaxllm.train import processes as group
from jaxllm.train import request
from jaxllm.train.text import BYTES

if TYPE_CHECKING:
    from jaxllm.train.loop import Job, Outcome


def run(
    arguments: list[str],
    model_text: str,
    mesh_text: str,
    layout_text: str,
    out: str | None,
    *,
    resume: bool,
    target: str | None,
    processes: str | None,
    process: str | None,
    coordinator: str | None,
    steps: str | None,
    eval_every: str | None,
    save_every: str | None,
    **asked: str | None,
) -> int:
    """Does what was asked and returns the exit code. `arguments` are the command line's, for other processes to repeat."""
    model, mesh, layout = ModelConfig.load(model_text), Machine.load(mesh_text), Layout.parse(layout_text)
    target = _training_target(target, mesh)
    number = count("--processes", processes, 1)
    index = count("--process", process, None, least=0)
    group.validate(number, index, coordinator, mesh.devices, str(mesh), target)
    if out is None:
        if resume or index is not None:
            what = "the run to go on with" if resume else "one folder for all processes"
            raise SpecError(f"--out is missing, which names {what}; add --out and the folder.")
        out = f"{request.new_folder(model.name)}"
        arguments = [*arguments, "--out", out]
        print(f"jaxllm: the run is in {out}", file=sys.stderr)
    folder = Path(out)
    wanted = _asked(**asked)
    every = {
        "steps": count("--steps", steps, request.STEPS),
        "evaluate_every": count("--eval-every", eval_every, request.EVERY),
        "save_every": count("--save-every", save_every, request.EVERY),
    }
    leads = not index
    found = request.resolve(model, layout, mesh, target, wanted, folder, resume=resume, leads=leads)
    if resume:
        request.check_steps(folder, every["steps"])
    if target == "cpu":
        here = mesh.devices if index is None else mesh.devices // number
        request.check_memory(model, layout, found.workload, here)
    if number > 1 and index is None:
        return group.launch(arguments, number)
    group.end_with_watcher()
    if leads:
        request.open_folder(found)
    with start.quiet(), progress(leads) as say, contextlib.redirect_stderr(io.StringIO()), _interrupt_told(say):
        # Of Python too nothing but progress is told: Orbax and TensorStore print tracebacks of their threads.
        say("starting JAX")
        start.prepare(target, mesh.devices, start.Group(number, index, coordinator) if number > 1 else None)
        from jaxllm.train.loop import Job
        from jaxllm.train.loop import train as take

        job = Job(
            model, layout, mesh, found.workload, target, found.text, folder, learning_rate=found.record.learning_rate,
            warmup=found.record.warmup, seed=found.record.seed, **every,
        )  # fmt: skip
        if leads:
            _print_fields(_job_fields(job, number))
        try:
            outcome, failure = take(job, resume=resume, say=say), None
        except (SpecError, TargetError, DoesNotFit) as error:
            # Without what it was raised from: TensorStore's promises that nobody waits for complain when they go.
            outcome, failure = None, type(error)(str(error))
        gc.collect()
    if failure is not None:
        raise failure
    if leads:
        _print_fields(_outcome_fields(job, outcome))
    return 128 + outcome.stopped if outcome.stopped else 0


@contextlib.contextmanager
def _interrupt_told(say: Callable[[str], None]) -> Iterator[None]:
    """An interrupt before the first step ends at once, as in other commands; what they print would go nowhere here."""
    before = signal.getsignal(signal.SIGINT)

    def interrupted(number: int, frame: Any) -> None:
        say("interrupted")
        if callable(before):
            before(number, frame)

    signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _asked(
    *, batch: str | None, seq: str | None, lr: str | None, warmup: str | None, seed: str | None, **texts: str | None
) -> request.Asked:
    """The options of a run as numbers; None is what was left out. Raises SpecError."""
    for name, value in texts.items():
        if value is not None and not value.strip():
            raise SpecError(f"--{name.replace('_', '-')} is blank; leave it out for the default.")
    return request.Asked(
        batch=count("--batch", batch, None),
        sequence=count("--seq", seq, None),
        learning_rate=None if lr is None else number("--lr", lr, most=1000, example="0.001"),
        warmup=count("--warmup", warmup, None, least=0),
        seed=count("--seed", seed, None, least=0),
        **texts,
    )


def _training_target(text: str | None, mesh: Any) -> str:
    """cpu for emulated devices, local for those that are here. Raises SpecError: a compiler alone cannot train."""
    target = text or ("cpu" if mesh.target == "cpu" else "local")
    targets.validate(target, mesh)
    if target not in ("cpu", "local"):
        raise SpecError(f"training needs devices and --target {target} only compiles; use --target cpu or local.")
    return target


def _job_fields(job: Job, processes: int) -> list[tuple[str, str]]:
    """What is about to be trained, as (name, value)."""
    work, text = job.workload, job.text
    peak = predict(job.model, job.layout, work).peak
    shared = f" in {processes} processes" if processes > 1 else ""
    unit = "bytes" if text.tokenizer == BYTES else f"tokens by {text.tokenizer}"
    return [
        ("model", f"{job.model.name}, {job.model.parameters:,} parameters"),
        *([("note", job.model.note)] if job.model.note else []),
        ("mesh", f"{job.mesh}, {job.mesh.devices:,} device{'s' if job.mesh.devices > 1 else ''}{shared}"),
        ("layout", str(job.layout)),
        ("workload", f"batch {work.batch:,}, sequence {work.sequence:,}: {work.batch * work.sequence:,} tokens a step"),
        ("precision", f"{work.precision}, gradients in {work.dtypes.gradients}, optimizer {work.optimizer}"),
        ("rate", f"{job.learning_rate:g}{_schedule(job.warmup)}, seed {job.seed}"),
        ("text", f"{text.path}: {len(text.training):,} {unit} to train on, {len(text.evaluation):,} held out"),
        ("memory", f"{human(peak)} a device at the peak, by closed form"),
    ]


def _schedule(warmup: int) -> str:
    return f" after {warmup:,} steps, then with the inverse square root" if warmup else ""


def _outcome_fields(job: Job, outcome: Outcome) -> list[tuple[str, str]]:
    """What became of it, as (name, value)."""
    steps, first = outcome.steps, outcome.steps[0]
    last, own = steps[-1], [step.seconds for step in steps if step.step > outcome.first]
    fields = [
        ("steps", f"{last.step:,} of {job.steps:,}" + (f", {outcome.first:,} of them before" if outcome.first else "")),
        ("loss", f"{first.loss:.4f} at step {first.step:,}, {last.loss:.4f} at step {last.step:,}"),
    ]
    if (held := outcome.held_out) is not None:
        pairs = job.text.pair_entropy
        beside = f"; the best table of byte pairs has {pairs:.4f}" if pairs is not None else ""
        fields.append(("held out", f"{held.held_out:.4f} after step {held.step:,}{beside}"))
    # The first step of a process also waits for what is only done once.
    middle = sorted(own[1:] or own)[len(own[1:] or own) // 2]
    fields.append(("seconds", f"{middle:.2f} a step, the median"))
    fields.append(("files", f"{job.folder / 'metrics.csv'}, {job.folder / 'checkpoints' / str(outcome.saved)}"))
    return fields


def _print_fields(fields: list[tuple[str, str]]) -> None:
    print_fields(console(), fields)
    sys.stdout.flush()
