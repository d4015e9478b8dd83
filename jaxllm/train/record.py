"""The record of a run, run.json: what was asked, so that a resumed run asks for the same."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from jaxllm.spec.errors import SpecError

SCHEMA = 1


@dataclass(frozen=True)
class Record:
    """All that the losses of a run depend on beside rounding. Mesh, layout and processes may change on the way."""

    model: Mapping[str, Any]  # the fields of the ModelConfig
    text: str  # path
    tokenizer: str  # "bytes", or the path of a tokenizer.json
    digest: str  # SHA-256 of text and tokenizer
    batch: int  # sequences a step
    sequence: int  # tokens
    precision: str
    gradient_dtype: str
    optimizer: str
    learning_rate: float
    warmup: int  # steps
    seed: int


OPTIONS = {
    "text": "--text", "tokenizer": "--tokenizer", "batch": "--batch", "sequence": "--seq", "precision": "--precision",
    "gradient_dtype": "--gradient-dtype", "optimizer": "--optimizer", "learning_rate": "--lr", "warmup": "--warmup", "seed": "--seed",
}  # fmt: skip


def write(folder: Path, record: Record) -> None:
    """Writes run.json beside and moves it into place. Raises OSError."""
    handle, name = tempfile.mkstemp(dir=folder, suffix=".part")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump({"schema": SCHEMA} | asdict(record), file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(name, folder / "run.json")


def read(folder: Path) -> Record | None:
    """The record in a folder, or None when there is none. Raises SpecError when it cannot be understood."""
    path = folder / "run.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        schema = found.pop("schema")
        if schema != SCHEMA:
            raise SpecError(f"{str(path)!r} has schema {schema!r}, and this jaxllm reads {SCHEMA}; take its own version.")
        return Record(**{field.name: found.pop(field.name) for field in fields(Record)})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise SpecError(f"{str(path)!r} cannot be read: {error.strerror}; correct that, or take another --out.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"{str(path)!r} is not the record of a run; take another --out.") from None


def check_same(before: Record, now: Record, folder: Path) -> None:
    """Raises SpecError where a resumed run is not the one that lies in the folder."""
    if dict(before.model) != dict(now.model):
        raise SpecError(
            f"--out {str(folder)!r} holds a run of {_model(before)}, not of {_model(now)}; name that model, or take "
            "another folder."
        )
    for name, option in OPTIONS.items():
        old, new = getattr(before, name), getattr(now, name)
        if name not in ("text", "tokenizer") and old != new:
            raise SpecError(
                f"--out {str(folder)!r} holds a run with {option} {old}, and {new} is asked; leave {option} out to go on "
                "with it, or take another folder."
            )
    if before.digest != now.digest:
        raise SpecError(
            f"--out {str(folder)!r} holds a run on another text or tokenizer than {now.text!r} is now; give the same, or "
            "take another folder."
        )


def _model(record: Record) -> str:
    return f"{record.model.get('name')!r}" if isinstance(record.model, Mapping) else "another model"
