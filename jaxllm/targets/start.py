"""What has to be settled before jax is imported: how many devices there are, and that XLA keeps its noise to itself."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

from jaxllm import targets
from jaxllm.spec.errors import SpecError, TargetError

MEET_WITHIN = 300  # seconds: machines of a cluster do not start at the same moment

_FORCED = r"--xla_force_host_platform_device_count=(\d+)"


@dataclass(frozen=True)
class Group:
    """Processes that share one mesh: how many, which of them this is, and where the first one listens, as host:port."""

    processes: int
    index: int
    coordinator: str


def prepare(target: str, devices: int, group: Group | None = None) -> None:
    """Sets the environment for a target and starts jax; what jax has already settled stays as it is.

    `devices` are those of the mesh; in a group each process brings its share of them. Raises SpecError for an unknown
    target, more devices than it can emulate, or XLA_FLAGS that XLA refuses, TargetError when jax does not start or the
    group does not meet.
    """
    settings = targets.module(target).environment(devices // group.processes if group else devices)
    if flags := settings.pop("XLA_FLAGS", ""):
        own = os.environ.get("XLA_FLAGS", "")
        given = re.search(_FORCED, own)
        if group is not None or given is None or int(given[1]) < devices:
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

            if group is not None:
                _join(group)
            here = len(jax.devices())
        if group is not None and here != devices:
            raise TargetError(
                f"{group.processes} processes bring {here} devices, and the mesh has {devices}: take a mesh of {here}, or "
                "another number of processes."
            )
    except TargetError:
        raise
    except RuntimeError as error:
        raise TargetError(f"jax cannot start for target {target}: {str(error).splitlines()[0]}") from error
    finally:
        plugins.setLevel(level)


def _join(group: Group) -> None:
    """Meets the other processes. Raises TargetError when they do not come."""
    import jax

    try:
        # Nothing is detected: Slurm's and others' ways would have each process see one card of its node.
        jax.distributed.initialize(
            group.coordinator, group.processes, group.index, cluster_detection_method="deactivate",
            initialization_timeout=MEET_WITHIN,
        )  # fmt: skip
    except RuntimeError as error:
        if group.index == 0 and "failed to start" in str(error).lower():
            raise TargetError(f"process 0 cannot listen at {group.coordinator}: take another port.") from error
        raise TargetError(
            f"process {group.index} of {group.processes} does not meet the others at {group.coordinator} within "
            f"{MEET_WITHIN} s: {str(error).splitlines()[0][:160]}; start all of them with the same --coordinator."
        ) from error


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
def quiet() -> Iterator[Callable[[], str]]:
    """Keeps what native code writes to standard output and error out of sight: XLA and gloo do whatever they are told.

    Python's own sys.stdout and sys.stderr go on to the terminal. What is given tells, inside the block, what has been
    kept so far. When the block raises, its last lines are attached as a note.
    """
    with tempfile.TemporaryFile() as hidden:

        def said() -> str:
            size = os.fstat(hidden.fileno()).st_size  # native code writes through the same position
            return os.pread(hidden.fileno(), size, 0).decode(errors="replace")

        try:
            with _diverted(1, "stdout", hidden), _diverted(2, "stderr", hidden):
                yield said
        except Exception as error:
            error.add_note("\n".join(said().splitlines()[-20:]))
            raise


@contextlib.contextmanager
def _diverted(number: int, name: str, hidden: IO[bytes]) -> Iterator[None]:
    """What goes to the descriptor goes to a file instead, but for what Python's stream of that name writes."""
    try:
        original = os.dup(number)
    except OSError:  # it is closed: nothing to keep quiet
        yield
        return
    stream = getattr(sys, name)
    try:
        if stream is not None:
            stream.flush()
        os.dup2(hidden.fileno(), number)
        if _writes_to(stream, number):
            setattr(sys, name, os.fdopen(os.dup(original), "w", buffering=1, encoding=stream.encoding))
        yield
    finally:
        if getattr(sys, name) is not stream:
            getattr(sys, name).close()
            setattr(sys, name, stream)
        os.dup2(original, number)
        os.close(original)


def _writes_to(stream: object, number: int) -> bool:
    try:
        return stream.fileno() == number  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False
