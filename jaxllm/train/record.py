"""The record of a run, run.json: what was asked, so that a resumed run asks for the same."""

from __future__ import annotations

import json
import os
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
    part = folder / "run.part"
    with part.open("w", encoding="utf-8") as file:
        json.dump({"schema": SCHEMA} | asdict(record), file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder / "run.json")


def read(folder: Path) -> Record | None:
    """The record in a folder, or None when there is none. Raises SpecError when it cannot be understood."""
    path = folder / "run.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        schema = found.pop("schema")
        if schema != SCHEMA:
            raise SpecError(f"{str(path)!r} has schema {schema!r}, and this jaxllm reads {SCHEMA}; take its own version.")
        return _sound(Record(**{field.name: found.pop(field.name) for field in fields(Record)}))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise SpecError(f"{str(path)!r} cannot be read: {error.strerror}; correct that, or take another --out.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"{str(path)!r} is not the record of a run; take another --out.") from None


def _sound(record: Record) -> Record:
    """The record, if each field is of its kind. Raises ValueError."""
    numbers = {"batch": 1, "sequence": 1, "warmup": 0, "seed": 0}
    for field in fields(Record):
        value = getattr(record, field.name)
        if field.name == "model":
            good = isinstance(value, dict) and isinstance(value.get("name"), str)
        elif field.name in numbers:
            good = type(value) is int and value >= numbers[field.name]
        elif field.name == "learning_rate":
            good = type(value) in (int, float) and 0 < value < 1000
        else:
            good = isinstance(value, str)
        if not good:
            raise ValueError(f"{field.name} is {value!r}")
    return record


def check_same(before: Record, now: Record, folder: Path) -> None:
    """Raises SpecError where a resumed run is not the one that lies in the folder."""
    if dict(before.model) != dict(now.model):
        raise SpecError(
            f"--out {str(folder)!r} holds a run of {before.model['name']}, not of {now.model['name']}; name that model, or "
            "take another folder."
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

