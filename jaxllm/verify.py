"""What compilers make of the first layouts of a plan: each checked in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

from jaxllm.plan import follow
from jaxllm.plan.compiled import Verified
from jaxllm.plan.plan import Plan
from jaxllm.plan.search import Scored

AGREES, DIFFERS, TOO_LARGE = 0, 1, 4  # exit codes of `check` that come with a ledger


def verify(plan: Plan, count: int, progress: Callable[[str], None] = lambda text: None) -> tuple[Verified, ...]:
    """Compiles the first layouts, as many at a time as there are cores, and orders them: those that compile to what was planned
    first, in the order of the plan."""
    first = plan.best[:count]
    found: list[Verified] = []
    with (
        ThreadPoolExecutor(max(1, min(len(first), os.cpu_count() or 1))) as pool,
        _ended_with_us(pool) as running,
    ):
        jobs = {pool.submit(_check, plan, scored, rank, running): rank for rank, scored in enumerate(first, start=1)}
        progress(f"compiling {len(first)}, {pool._max_workers} at a time")
        for job in as_completed(jobs):
            one = job.result()
            found.append(one)
            progress(f"compiled {len(found)} of {len(first)}: rank {one.rank} {one.reason or 'is what was planned'}")
    return tuple(sorted(found, key=lambda one: (bool(one.reason), one.rank)))


def reordered(plan: Plan, found: Sequence[Verified]) -> Plan:
    """The plan with its first layouts in the order of what was verified, and so another first where that moved down."""
    first = [plan.best[one.rank - 1] for one in found]
    return replace(plan, found=replace(plan.found, best=[*first, *plan.best[len(first) :]]))


@contextlib.contextmanager
def _ended_with_us(pool: ThreadPoolExecutor) -> Iterator[list[subprocess.Popen[str]]]:
    """Checks that are put on the list end when this process is interrupted or terminated, and no more begin."""
    running: list[subprocess.Popen[str]] = []
    ours = threading.current_thread() is threading.main_thread()  # no other may say what a signal does
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)) if ours else None
    try:
        yield running
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            process.kill()
        raise
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)


def _check(plan: Plan, scored: Scored, rank: int, running: list[subprocess.Popen[str]]) -> Verified:
    layout = f"{scored.layout}"
    command = [sys.executable, "-m", "jaxllm", "check", *follow.check_arguments(plan, scored), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        running.append(process)
        out, err = process.communicate()
    if process.returncode not in (AGREES, DIFFERS, TOO_LARGE) or not out.strip():
        said = [line for line in err.splitlines() if line.startswith("jaxllm: ")]
        return Verified(rank, layout, reason=f"it does not compile: {said[-1].removeprefix('jaxllm: ') if said else 'no word of why'}")
    return read(json.loads(out), rank, layout)


def read(document: dict[str, Any], rank: int, layout: str) -> Verified:
    """What the JSON of `check` says of a layout."""
    rows = [row for section in ("memory", "flops", "collectives", "transfers") for row in document.get(section, ())]
    compared = [row for row in rows if row["status"] != "not comparable"]
    wires = [row for row in document["collectives"] if row["status"] != "not comparable"]
    peak = document["peak"]
    return Verified(
        rank,
        layout,
        lines=len(compared),
        equal=sum(row["status"] == "equal" for row in compared),
        peak=peak["predicted"],
        compiled_peak=peak["compiled"],
        wire=sum(row["wire_predicted"] or 0 for row in wires),
        compiled_wire=sum(row["wire_compiled"] or 0 for row in wires),
        reason=_reason(document, [row for row in compared if row["status"] != "equal"]),
    )


def _reason(document: dict[str, Any], differing: list[dict[str, Any]]) -> str:
    if differing:
        names = ", ".join(row.get("line") or "/".join((row["kind"], "+".join(row["axes"]), row["phase"])) for row in differing[:3])
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        return f"it compiles to something else: {names}{more}"
    if document["unexplained"]:
        return f"the program has what nobody planned: {document['unexplained'][0]}"
    if not document["peak"]["fits"]:
        return "the compiled program does not fit"
    return ""
