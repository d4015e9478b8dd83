"""What has to be settled before jax is imported: how many devices there are, and that XLA keeps its noise to itself."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from jaxllm import targets
from jaxllm.spec.errors import SpecError, TargetError

_FORCED = r"--xla_force_host_platform_device_count=(\d+)"


def prepare(target: str, devices: int) -> None:
    """Sets the environment for a target and starts jax; what jax has already settled stays as it is.

    Raises SpecError for an unknown target, more devices than it can emulate, or XLA_FLAGS that XLA refuses, TargetError
    when jax does not start.
    """
    settings = targets.module(target).environment(devices)
    if flags := settings.pop("XLA_FLAGS", ""):
        own = os.environ.get("XLA_FLAGS", "")
        given = re.search(_FORCED, own)
        if given is None or int(given[1]) < devices:
            os.environ["XLA_FLAGS"] = f"{re.sub(_FORCED, '', own).strip()} {flags}".strip()
    os.environ |= settings
    if "jax" not in sys.modules:
        _try_flags()
    # The plugins that jax finds have their say when it starts, some of it through Python's logging.
    plugins = logging.getLogger("jax._src.xla_bridge")
    level = plugins.level
    plugins.setLevel(logging.CRITICAL + 1)
    try:
        with quiet():
            import jax

            jax.devices()
    except RuntimeError as error:
        raise TargetError(f"jax cannot start for target {target}: {str(error).splitlines()[0]}") from error
    finally:
        plugins.setLevel(level)


def _try_flags() -> None:
    """Lets another process meet the user's own XLA_FLAGS first: XLA ends the process over one that it does not know.

    Raises SpecError with what XLA says.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if not re.sub(_FORCED, "", flags).strip():
        return
    code = "import jax; jax.devices()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "lag" in line] or done.stderr.splitlines() or ["no reason"]
        raise SpecError(f"XLA_FLAGS={flags!r} is refused by XLA: {said[0][-200:].strip()}; correct or unset it.")


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
