"""Several processes on one machine: the same command in each of them, and one that watches over all."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import IO

from jaxllm.spec.errors import SpecError

WATCHER = "JAXLLM_WATCHER"  # the process that started this one: without it, this one ends
_GRACE = 60  # seconds that the others have to end when one of them was asked to and did


def validate(processes: int, index: int | None, coordinator: str | None, devices: int, mesh: str, target: str) -> None:
    """Raises SpecError where the options on processes do not go together, or with the mesh."""
    if processes < 1 or devices % processes:
        fit = ", ".join(str(n) for n in range(1, min(devices, 64) + 1) if devices % n == 0)
        raise SpecError(f"--processes {processes} does not divide the {devices:,} devices of {mesh}; it may be {fit}.")
    if (index is None) != (coordinator is None):
        raise SpecError("--process and --coordinator go together: give both in every process, or neither on one machine.")
    if index is not None and not 0 <= index < processes:
        raise SpecError(f"--process {index} is none of {processes} processes; count from 0 to {processes - 1}.")
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise SpecError(f"--coordinator {coordinator!r} is not host:port; write it like node-0:1234.")
    if processes > 1 and index is None and target != "cpu":
        raise SpecError(
            f"--processes {processes} starts processes for emulated devices only; on {mesh} start each one yourself, with "
            "--process and --coordinator."
        )


def launch(arguments: Sequence[str], processes: int) -> int:
    """Runs `jaxllm ARGUMENTS` in as many processes on this machine, and returns the exit code of the first that fails.

    Standard output and error are those of process 0; what another says is shown when it fails first. A signal is passed
    on to all of them; when one of them fails, the others are ended.
    """
    coordinator = f"localhost:{_free_port()}"
    with contextlib.ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(processes)]
        running: list[subprocess.Popen[bytes]] = []
        # Before any of them is started, so that none is left behind.
        asked = _pass_on(running)
        for index in range(processes):
            own = ["--process", str(index), "--coordinator", coordinator]
            running.append(
                subprocess.Popen(
                    [sys.executable, "-m", "jaxllm", arguments[0], *own, *arguments[1:]],
                    env=os.environ | {WATCHER: str(os.getpid())},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE if index == 0 else subprocess.DEVNULL,
                    stderr=None if index == 0 else said[index],
                    start_new_session=True,  # a terminal's interrupt comes once, through here
                )
            )
        shown = threading.Thread(target=_copy, args=(running[0].stdout,))
        shown.start()
        first = _first_to_fail(running)
        shown.join()
        if first is None:
            return 0
        if asked:
            return 128 + asked[0]
        if running[first].returncode < 0:
            print(
                f"jaxllm: process {first} was ended by signal {-running[first].returncode}; go on with --resume.",
                file=sys.stderr,
            )
        elif first:
            _show(said[first])
        return _code(running[first])


def end_with_watcher() -> None:
    """Ends this process when the one that launched it is gone, killed perhaps: nobody else would."""
    watcher = os.environ.get(WATCHER)
    if watcher is None:
        return

    def watch() -> None:
        while os.getppid() == int(watcher):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _pass_on(running: list[subprocess.Popen[bytes]]) -> list[int]:
    """Passes SIGINT and SIGTERM on, and kills at the second one. The list gets those that came."""
    asked: list[int] = []

    def forward(number: int, frame: object) -> None:
        asked.append(number)
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number if len(asked) == 1 else signal.SIGKILL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    return asked


def _first_to_fail(running: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Waits for all; the first that ends with another code than 0 takes the others with it, after a while."""
    first, deadline = None, float("inf")
    while any(process.poll() is None for process in running):
        if first is None:
            first = next((i for i, process in enumerate(running) if process.poll()), None)
            if first is not None:
                asked = _code(running[first]) in (128 + signal.SIGINT, 128 + signal.SIGTERM)
                deadline = time.monotonic() + (_GRACE if asked else 2)
        if time.monotonic() > deadline:
            for process in running:
                process.kill()
        time.sleep(0.05)
    return next((i for i, process in enumerate(running) if process.poll()), None) if first is None else first


def _code(process: subprocess.Popen[bytes]) -> int:
    """As a shell tells it: a process that a signal ended has 128 and the signal's number."""
    return 128 - process.returncode if process.returncode < 0 else process.returncode


def _copy(stream: IO[bytes]) -> None:
    """What process 0 prints, to where this process prints, which need not be a terminal or a file."""
    for line in stream:
        with contextlib.suppress(BrokenPipeError):  # the reader has gone, and the training goes on
            sys.stdout.write(line.decode(errors="replace"))
            sys.stdout.flush()


def _show(said: IO[bytes]) -> None:
    said.seek(0)
    lines = said.read().decode(errors="replace").splitlines()
    for line in [line for line in lines if line.startswith("jaxllm: ")][-1:] or lines[-5:]:
        print(line, file=sys.stderr)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
