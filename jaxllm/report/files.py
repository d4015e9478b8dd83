"""Files that a report is written to, tried before the long work that leads to them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from jaxllm.spec.errors import SpecError

_PICTURES = (".png", ".svg", ".pdf")


def output_path(option: str, text: str, suffixes: Sequence[str], what: str) -> Path:
    """The path of a file that can be written. Raises SpecError, which names the option, when it cannot.

    Args: the option and its text; the suffixes that the file may have; what such a file is, as "a picture".
    """
    path = Path(text)
    if path.suffix.lower() not in suffixes:
        *first, last = suffixes
        listed = f"{', '.join(first)} or {last}" if first else last
        raise SpecError(f"{option} {text!r}: {path.suffix or 'no suffix'} is not {what}; end it in {listed}.")
    if path.is_dir():
        raise SpecError(f"{option} {text} is a folder; name a file in it.")
    if not path.parent.is_dir():
        raise SpecError(f"{option} {text}: there is no folder {path.parent}; make it first or name another.")
    try:  # os.access would believe that root may write to a file system that is read-only
        if path.exists():
            path.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise SpecError(f"{option} {text} cannot be written: {error.strerror}; name a file elsewhere.") from None
    return path


def plot_path(text: str | None) -> Path | None:
    """The path of a picture that can be written; None where none is wanted. Raises SpecError."""
    return None if text is None else output_path("--plot", text, _PICTURES, "a picture")
