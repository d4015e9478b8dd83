"""The training loop: steps, evaluation, metrics and checkpoints, from the first step or from where a run stopped."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxllm.check import build
from jaxllm.program import Built
from jaxllm.spec.errors import DoesNotFit, SpecError, TargetError
from jaxllm.spec.layout import Layout
from jaxllm.spec.machine import Mesh
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.workload import Workload
from jaxllm.targets import compiler
from jaxllm.train import checkpoint, metrics
from jaxllm.train.batches import evaluation_batches, training_batch
from jaxllm.train.metrics import Step
from jaxllm.train.request import CHECKPOINTS
from jaxllm.train.text import Text

Tree = Any
Say = Callable[[str], None]

TELL_EVERY = 5.0  # seconds between two lines of progress


@dataclass(frozen=True)
class Job:
    """One call of `jaxllm train`: what is trained on what, for how long, and where its files go."""

    model: ModelConfig
    layout: Layout
    mesh: Mesh
    workload: Workload
    target: str
    text: Text
    folder: Path
    steps: int  # in all, those before a resumption included
    learning_rate: float
    warmup: int
    seed: int
    evaluate_every: int  # steps
    save_every: int  # steps


@dataclass(frozen=True)
class Outcome:
    """What became of a job. `steps` are all that the metrics hold, those before a resumption included."""

    steps: tuple[Step, ...]
    first: int  # steps that were there already
    stopped: int = 0  # the signal that ended it early
    saved: int = 0  # the step of the newest checkpoint

    @property
    def held_out(self) -> Step | None:
        """The last step after which the held-out text was evaluated."""
        return next((step for step in reversed(self.steps) if step.held_out is not None), None)


@dataclass
class _Stop:
    """Whether a signal has asked to end. The second one does not ask."""

    signal: int = 0
    said: Say = field(default=lambda message: None)

    def __call__(self, number: int, frame: object) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        self.said("ending after this step; once more ends at once")


@contextlib.contextmanager
def _stopping(say: Say) -> Iterator[_Stop]:
    """SIGINT and SIGTERM ask to end after the step, as a cluster does before it takes a machine away."""
    stop = _Stop(said=say)
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(job: Job, *, resume: bool, say: Say) -> Outcome:
    """Takes the steps of a job that are not there yet. jax runs already, with all processes that take part.

    Raises SpecError when the disk fails, a checkpoint cannot be read or the loss is no number, DoesNotFit when memory
    is short, and what `build` and `compile` raise.
    """
    say(f"building {job.model.name} for {job.layout} on {job.mesh}")
    built = build(
        job.model, job.layout, job.mesh, job.workload, target=job.target, learning_rate=job.learning_rate,
        warmup=job.warmup,
    )  # fmt: skip
    with checkpoint.opened(job.folder / CHECKPOINTS) as manager:
        first = (manager.latest_step() or 0) if resume else 0
        say("compiling")
        step = compiler.compile(built, say)
        if step.refused:
            raise DoesNotFit(f"the step does not fit: the compiler says {step.refused}")
        step.dump.cleanup()  # nobody measures it
        with _memory(job):
            if resume and not first:
                say("there is no checkpoint: beginning again with the first step")
            if first:
                say(f"going on after step {first:,}")
                state = checkpoint.restore(manager, first, built)
            else:
                parameters = built.init_parameters(job.seed)
                state = parameters, built.init_optimizer(parameters)
            return _steps(job, built, step.executable, state, manager, first, say)


def _steps(
    job: Job, built: Built, compiled: Any, state: tuple[Tree, Tree], manager: Any, first: int, say: Say
) -> Outcome:
    path, leads = job.folder / "metrics.csv", jax.process_index() == 0
    with _written(path):
        done = metrics.keep(path, first) if leads else []
    if leads and len(done) < first:
        say(f"metrics.csv lacks rows of the {first:,} steps before")
    size = job.workload.batch * job.workload.sequence
    saved, told = first, 0.0
    parameters, optimizer = state
    batch = training_batch(job.text, built, job.seed, first)
    with _stopping(say if leads else lambda message: None) as stop:
        for number in range(first + 1, job.steps + 1):
            begin = time.perf_counter()
            parameters, optimizer, metric = compiled(parameters, optimizer, batch)
            if number < job.steps:
                batch = training_batch(job.text, built, job.seed, number)  # while the devices are at work
            loss, norm = float(metric["loss"]), float(metric["gradient_norm"])
            now = time.perf_counter()
            ends = _agreed(stop.signal)
            last = number == job.steps or bool(ends)
            held_out = None
            if math.isfinite(loss) and (number % job.evaluate_every == 0 or last):
                held_out = evaluate(built, parameters, job.text)
            done.append(Step(number, number * size, loss, norm, held_out, round(now - begin, 4)))
            with _written(path):
                if leads:
                    metrics.append(path, done[-1])
            saves = last or number % job.save_every == 0
            # A scaled loss that overflowed its gradients' dtype has changed nothing but its factor.
            figures = (loss, held_out or 0.0) if job.workload.dtypes.scaled else (loss, norm, held_out or 0.0)
            if not all(map(math.isfinite, figures)) or (saves and not _finite(parameters)):
                raise SpecError(
                    f"training with --lr {job.learning_rate:g} gives what is no number at step {number:,}, where the loss is "
                    f"{loss:g}; take a smaller one and another --out{f'; the checkpoint of step {saved:,} is whole' if saved else ''}."
                )
            if saves:
                checkpoint.save(manager, number, built, parameters, optimizer)
                saved = number
            if now - told > TELL_EVERY or held_out is not None:
                told = now
                say(_progress(done[-1], job.steps))
            if ends:
                break
        checkpoint.finish(manager)
    return Outcome(tuple(done), first, ends, saved)


def evaluate(built: Built, parameters: Tree, text: Text) -> float:
    """The mean loss over the held-out text, in nats a token."""
    parts = [(count, built.loss(parameters, batch)) for count, batch in evaluation_batches(text, built)]
    return sum(count * float(loss) for count, loss in parts) / sum(count for count, _ in parts)


def _progress(step: Step, steps: int) -> str:
    held_out = f", held out {step.held_out:.4f}" if step.held_out is not None else ""
    return f"step {step.step:,} of {steps:,}: loss {step.loss:.4f}{held_out}; {step.seconds:.2f} s a step"


@jax.jit
def _finite(tree: Tree) -> jax.Array:
    """Whether all of it are numbers."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _agreed(wanted: int) -> int:
    """The signal that any of the processes has got: all must end after the same step."""
    if jax.process_count() == 1:
        return wanted
    return int(np.max(multihost_utils.process_allgather(np.int32(wanted))))


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    """A disk that fails as one sentence."""
    try:
        yield
    except OSError as error:
        raise SpecError(
            f"{str(path)!r} cannot be written: {(error.strerror or str(error)).lower()}; the checkpoints are whole: correct "
            "that, and go on with --resume."
        ) from error


@contextlib.contextmanager
def _memory(job: Job) -> Iterator[None]:
    """A device that runs out of memory is a verdict, not a failure."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            if jax.process_count() == 1:
                raise
            raise TargetError(
                f"another process is gone: {compiler.first_line(error)[:160]}; start all of them again, with --resume."
            ) from error
        raise DoesNotFit(
            f"{job.model.name} does not fit with {job.layout} on {job.mesh}: {compiler.memory_message(str(error))}"
        ) from error
