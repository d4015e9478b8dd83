"""From what was asked to a job: defaults, what a resumed run already says, and a folder to write in. Needs no JAX."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.report.units import human
from jaxllm.spec.errors import DoesNotFit, SpecError
from jaxllm.spec.layout import Layout
from jaxllm.spec.machine import Mesh
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.validate import default_batch, default_sequence, validate
from jaxllm.spec.workload import Workload
from jaxllm.theory import predict
from jaxllm.train import metrics, record
from jaxllm.train.record import Record
from jaxllm.train.text import Text, read_text

CHECKPOINTS = "checkpoints"  # a folder in a run's, with one folder a checkpoint, named by its step

STEPS, EVERY, SEED = 200, 50, 0
# The Llama papers' warm-up is 2,000 steps. Without any, Adam's first updates are the signs of gradients, and lead to where
# rounding errors grow (docs/experiments/curves.md).
WARMUP = 20
LEAST_BATCH = 8  # sequences: fewer make a gradient of little but noise


@dataclass(frozen=True)
class Asked:
    """What the options say; None is what was left out."""

    text: str | None = None
    tokenizer: str | None = None
    batch: int | None = None
    sequence: int | None = None
    precision: str | None = None
    gradient_dtype: str | None = None
    optimizer: str | None = None
    learning_rate: float | None = None
    warmup: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Request:
    """The run to take steps of: its record, and the nouns and the text that it stands for."""

    record: Record
    workload: Workload
    text: Text
    folder: Path


def resolve(
    model: ModelConfig, layout: Layout, mesh: Mesh, target: str, asked: Asked, folder: Path, *, resume: bool, leads: bool
) -> Request:
    """The run that is asked for, with every default filled in; nothing is written yet.

    What is left out of a resumed run is what its record says. `leads` is true in the process that writes: the others
    do not look at the folder of a new run, which it may be filling already. Raises SpecError.
    """
    before = record.read(folder) if resume or leads else None
    if resume and before is None:
        raise SpecError(f"--out {str(folder)!r} holds no run to resume; leave --resume out to begin one.")
    if leads and not resume:
        _check_new(folder, before)
        before = None

    def chosen(name: str, default: Any) -> Any:
        given = getattr(asked, name)
        return given if given is not None else getattr(before, name) if before is not None else default

    text_path = chosen("text", None)
    if text_path is None:
        raise SpecError("--text is missing; give a text file to train on, as docs/examples/harbour.txt.")
    workload = Workload(
        chosen("batch", training_batch(layout)),
        chosen("sequence", default_sequence(model, layout)),
        chosen("precision", "f32" if target == "cpu" else "bf16-f32"),
        chosen("optimizer", "adamw"),
        chosen("gradient_dtype", ""),
    )
    validate(model, layout, mesh.devices, workload)
    tokenizer = chosen("tokenizer", None)
    text = read_text(text_path, tokenizer, model.vocab, workload.sequence)
    now = Record(
        model={name: value for name, value in dataclasses.asdict(model).items() if name != "source"},
        text=text.path,
        tokenizer=text.tokenizer,
        digest=text.digest,
        batch=workload.batch,
        sequence=workload.sequence,
        precision=workload.precision,
        gradient_dtype=workload.gradient_dtype,
        optimizer=workload.optimizer,
        learning_rate=chosen("learning_rate", workload.keeps.rate),
        warmup=chosen("warmup", WARMUP),
        seed=chosen("seed", SEED),
    )
    if before is not None:
        record.check_same(before, now, folder)
    return Request(now, workload, text, folder)


def last_checkpoint(folder: Path) -> int:
    """The step of the newest whole checkpoint in a run's folder, 0 when there is none; found without JAX."""
    whole = (path.parent for path in (folder / CHECKPOINTS).glob("*/_CHECKPOINT_METADATA"))
    return max((int(path.name) for path in whole if path.name.isdecimal()), default=0)


def check_steps(folder: Path, steps: int) -> None:
    """Raises SpecError when a resumed run has its steps already."""
    done = last_checkpoint(folder)
    if done >= steps:
        raise SpecError(f"--out {str(folder)!r} has {done:,} steps already; ask for more than that with --steps.")


def check_memory(model: ModelConfig, layout: Layout, workload: Workload, devices: int) -> None:
    """Raises DoesNotFit when so many emulated devices need more than this machine's memory, which they share."""
    peak, here = predict(model, layout, workload).peak, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if peak is not None and peak * devices > here:
        raise DoesNotFit(
            f"{devices} emulated devices need {human(peak * devices)} by closed form, and this machine has {human(here)}; "
            "take a smaller batch, sequence or model."
        )


def training_batch(layout: Layout) -> int:
    """The default batch of a training run: at least 8 sequences, as many on each device and in each microbatch."""
    parts = default_batch(layout)
    return -(-LEAST_BATCH // parts) * parts


def new_folder(name: str) -> Path:
    """The first of runs/NAME-1, runs/NAME-2 and so on that is not there yet."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name) or "run"
    return next(folder for index in itertools.count(1) if not (folder := Path("runs") / f"{stem}-{index}").exists())


def open_folder(request: Request) -> None:
    """Makes the folder and writes the record. Raises SpecError when the disk does not take it."""
    folder = request.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # os.access would believe that root may write anywhere
        record.write(folder, request.record)
    except OSError as error:
        raise SpecError(f"--out {str(folder)!r} cannot be written: {_said(error)}; name another folder.") from None


def _check_new(folder: Path, before: Record | None) -> None:
    if before is not None and not last_checkpoint(folder) and not metrics.read(folder / "metrics.csv"):
        return  # it never began: what kept it from that may have been corrected since
    if before is not None:
        raise SpecError(
            f"--out {str(folder)!r} holds a run of {before.model['name']}; add --resume to go on with it, or take "
            "another folder."
        )
    try:
        if folder.exists() and not folder.is_dir():
            raise SpecError(f"--out {str(folder)!r} is a file; name a folder.")
        if folder.is_dir() and any(folder.iterdir()):
            raise SpecError(f"--out {str(folder)!r} is not empty; name a new folder, so that nothing is written over.")
    except OSError as error:
        raise SpecError(f"--out {str(folder)!r} cannot be read: {_said(error)}; name another folder.") from None


def _said(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
