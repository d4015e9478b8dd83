"""What has to be settled before jax is imported: how many devices there are, and that XLA keeps its noise to itself."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator

from jaxllm import targets

_FORCED = r"--xla_force_host_platform_device_count=(\d+)"


def prepare(target: str, devices: int) -> None:
    """Sets the environment for a target and starts jax; what jax has already settled stays as it is.

    Raises SpecError for an unknown target, or more devices than it can emulate.
    """
    settings = targets.module(target).environment(devices)
    if flags := settings.pop("XLA_FLAGS", ""):
        own = os.environ.get("XLA_FLAGS", "")
        given = re.search(_FORCED, own)
        if given is None or int(given[1]) < devices:
            os.environ["XLA_FLAGS"] = f"{re.sub(_FORCED, '', own).strip()} {flags}".strip()
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    with quiet():  # the plugins that jax finds have their say when it starts
        import jax

        jax.devices()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what native code writes to standard error out of sight: XLA logs there whatever it is told.

    Python's own sys.stderr goes on to the terminal. When the block raises, the last lines are attached as a note.
    """
    try:
        terminal = os.dup(2)
    except OSError:  # standard error is closed: nothing to keep quiet
        yield
        return
    python_stderr = sys.stderr
    with tempfile.TemporaryFile() as hidden:
        try:
            python_stderr.flush()
            os.dup2(hidden.fileno(), 2)
            if getattr(python_stderr, "fileno", None) and _is_fd2(python_stderr):
                sys.stderr = os.fdopen(os.dup(terminal), "w", buffering=1)
            yield
        except Exception as error:
            hidden.seek(0)
            lines = hidden.read().decode(errors="replace").splitlines()
            error.add_note("\n".join(lines[-20:]))
            raise
        finally:
            sys.stderr = python_stderr
            os.dup2(terminal, 2)
            os.close(terminal)


def _is_fd2(stream: object) -> bool:
    try:
        return stream.fileno() == 2  # type: ignore[attr-defined]
    except (OSError, ValueError):
        return False
