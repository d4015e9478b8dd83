"""A step's compiled program as it was played on a machine, beside the closed form: for people and for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from jaxllm.report.table import print_listing
from jaxllm.report.time import NAMES, ROUNDING
from jaxllm.report.units import duration, human, percent, wrap
from jaxllm.theory.time import StepTime

HOST, OTHER, BUBBLE, LAUNCH = "host", "other", "bubble", "launch"
MOST_PARTS, MOST_OPERATIONS = 4, 3  # that are taken apart
MEET = "all stages run one program, and wherever it sends between them each waits for the slowest of those that it meets"
LEAST = 0.005  # of a step: what differs by less is not taken apart


@dataclass(frozen=True)
class PlayedOperation:
    """What one instruction takes in a step, in seconds, its runs added up.

    part     products, memory, optimizer, host, or the mesh axes of a collective, joined by +
    seconds  its own, whether anything waits for them or not; waited: those for which the device idles, or computes
    runs     in a step; flops, read, written (bytes of HBM), wire (bytes sent), copied (to or from host memory): of one run
    """

    name: str
    opcode: str
    source: str
    phase: str
    part: str
    seconds: float
    waited: float
    runs: int
    flops: int = 0
    read: int = 0
    written: int = 0
    wire: int = 0
    copied: int = 0

    @property
    def hidden(self) -> float:
        return max(0.0, self.seconds - self.waited)

    @property
    def kernel(self) -> bool:
        """Whether each run is one kernel: no collective and no copy."""
        return not (self.wire or self.copied) and (bool(self.flops) or not self.opcode.endswith("-start"))

    def __str__(self) -> str:
        """`fusion.12 (llama.py:88 < llama.py:70), 41.0 ms in 64 runs that each read 3.2 GB and write 33.6 MB`."""
        where = f" ({self.source})" if self.source else ""
        hidden = f" of {duration(self.seconds)}" if self.hidden > ROUNDING else ""
        runs = f" in {self.runs:,} runs" if self.runs != 1 else ""
        return f"{self.name}{where}, {duration(self.waited)}{hidden}{runs}{self._does()}"

    def _does(self) -> str:
        if self.wire:
            does = [(f"send{'s' * (self.runs == 1)}", self.wire, "B")]
        elif self.copied:
            does = [("copy" if self.runs != 1 else "copies", self.copied, "B")]
        else:
            one = "s" * (self.runs == 1)
            multiplies = "multiply" if self.runs != 1 else "multiplies"
            does = [(multiplies, self.flops, "FLOP"), (f"read{one}", self.read, "B"), (f"write{one}", self.written, "B")]
        told = [f"{verb} {human(amount, unit)}" for verb, amount, unit in does if amount]
        if not told:
            return ""
        listed = " and ".join((", ".join(told[:-1]), told[-1])) if len(told) > 1 else told[0]
        return f"{',' if self.runs == 1 else ' that each'} {listed}"


@dataclass(frozen=True)
class Sending:
    """Seconds of all collectives over some mesh axes: those that the device waits for, and those that are hidden."""

    axes: tuple[str, ...]
    exposed: float
    hidden: float


@dataclass(frozen=True)
class Slice:
    """What stands on a lane of the trace, in seconds from the beginning of the step."""

    lane: str
    name: str
    start: float
    end: float
    operation: str = ""  # the name of the PlayedOperation


@dataclass(frozen=True)
class Played:
    """A compiled step, played on a machine.

    closed      the closed form of the same step
    seconds     of the step
    parts       by the names of StepTime's own: products, memory, bubble, optimizer, host, other
    traffic     seconds of collectives by mesh axes, waited for and hidden
    operations  of the device that is played, in a pipeline one of the stage that works longest; the longest first
    slices      when they run
    notes       what leaves the time open, one sentence each
    compiler    whose program it is: gpu or tpu
    """

    closed: StepTime
    seconds: float
    parts: dict[str, float]
    traffic: tuple[Sending, ...]
    operations: tuple[PlayedOperation, ...]
    slices: tuple[Slice, ...]
    notes: tuple[str, ...]
    compiler: str
    stage: int | None = None

    @property
    def kernels(self) -> int:
        """How many the device runs, each of which takes at least what Rates.kernel says."""
        return sum(one.runs for one in self.operations if one.kernel)

    @property
    def differences(self) -> tuple[Difference, ...]:
        """The parts in which the two differ, those that differ most first; seconds that are waited for."""
        return tuple(sorted(_differences(self), key=lambda one: -abs(one.seconds)))


@dataclass(frozen=True)
class Difference:
    """Seconds of a part: by closed form and played, waited for; and those that are hidden."""

    part: str
    predicted: float
    played: float
    hidden_predicted: float = 0.0
    hidden_played: float = 0.0

    @property
    def seconds(self) -> float:
        return self.played - self.predicted

    @property
    def what(self) -> str:
        return NAMES.get(self.part) or f"collectives over {self.part}"


def _differences(played: Played) -> Iterator[Difference]:
    own = {name: float(seconds) for name, seconds in played.closed.parts.items() if name in NAMES}
    for part in NAMES:
        beside = sum(one.hidden for one in played.operations if one.part == part)
        yield Difference(part, own[part], played.parts.get(part, 0.0), 0.0, beside)
    closed = {"+".join(each.axes): (float(each.exposed), float(each.hidden)) for each in played.closed.traffic}
    ran = {"+".join(each.axes): (float(each.exposed), float(each.hidden)) for each in played.traffic}
    for axes in dict.fromkeys((*closed, *ran)):
        (waited, hidden), (now, beside) = closed.get(axes, (0.0, 0.0)), ran.get(axes, (0.0, 0.0))
        yield Difference(axes, waited, now, hidden, beside)


def _told(played: Played) -> list[Difference]:
    """The parts that take any time."""
    return [
        one for one in played.differences
        if max(one.predicted, one.played, one.hidden_predicted, one.hidden_played) > ROUNDING
    ]  # fmt: skip


def largest(played: Played, part: str, count: int = MOST_OPERATIONS) -> list[PlayedOperation]:
    """The operations of a part that take most of what is waited for."""
    mine = [one for one in played.operations if one.part == part and one.waited > ROUNDING]
    return sorted(mine, key=lambda one: -one.waited)[:count]


def document(played: Played) -> dict[str, Any]:
    """All of it as plain dicts and lists, for --json: what `time` puts under "compiled"."""
    return {
        "compiler": played.compiler,
        "stage": played.stage,
        "seconds": played.seconds,
        "kernels": played.kernels,
        "kernel": played.closed.rates.kernel,
        "parts": [
            {
                "part": one.what,
                "predicted": one.predicted,
                "played": one.played,
                "difference": one.seconds,
                "hidden_predicted": one.hidden_predicted,
                "hidden_played": one.hidden_played,
            }
            for one in _told(played)
        ],
        "operations": [
            {
                "instruction": one.name,
                "opcode": one.opcode,
                "source": one.source,
                "phase": one.phase or None,
                "part": NAMES.get(one.part) or f"collectives over {one.part}",
                "seconds": one.seconds,
                "waited": one.waited,
                "runs": one.runs,
                "flops": one.flops,
                "read": one.read,
                "written": one.written,
                "wire": one.wire,
                "copied": one.copied,
            }
            for one in played.operations
        ],
        "notes": list(played.notes),
    }


def print_played(played: Played, out: Console) -> None:
    """Both times of the step, its parts side by side, and the operations of those that differ most."""
    closed = float(played.closed.seconds)
    more = percent(played.seconds / closed - 1) if closed else ""
    stage = "" if played.stage is None else f", on stage {played.stage}, which works longest"
    least = played.closed.rates.kernel
    launched = f" {played.kernels:,} kernels of at least {duration(least)}: {duration(played.kernels * least)} of it."
    _print(
        f"The program that XLA:{played.compiler.upper()} makes of it, played on the same machine{stage}: "
        f"{duration(played.seconds)}, {more} of the closed form's {duration(closed)}.{launched if least else ''}", out,
    )  # fmt: skip
    out.print()
    rows = [
        (one.what, _duration(one.predicted), _played(one), _signed(one.seconds), _hidden(one))
        for one in _told(played)
    ]  # fmt: skip
    print_listing(out, ("of a step", "closed form", "played", "more", "hidden: closed form, played"), rows)
    for one in _apart(played):
        out.print()
        if one.part == BUBBLE:
            _print(f"{one.what}: {_signed(one.seconds)}; {MEET}", out)
            continue
        _print(f"{one.what}: {_signed(one.seconds)}; of what was played the longest are", out)
        for operation in largest(played, one.part):
            _print(f"  {operation}", out, "    ")
    if played.notes:
        out.print()
    for note in played.notes:
        _print(f"Left open: {note}.", out, "  ")


def _print(text: str, out: Console, indent: str = "") -> None:
    """A sentence over as many lines as it takes."""
    for line in wrap(text, out.width, indent):
        out.print(line, soft_wrap=True)


def _apart(played: Played) -> list[Difference]:
    """The parts whose operations are shown."""
    wide = [one for one in played.differences if abs(one.seconds) > LEAST * played.seconds]
    return [one for one in wide if one.part == BUBBLE or largest(played, one.part)][:MOST_PARTS]


def _played(one: Difference) -> str:
    return "not played" if one.part == LAUNCH else _duration(one.played)


def _signed(seconds: float) -> str:
    if abs(seconds) <= ROUNDING:
        return "0 s"
    return f"{'+' if seconds > 0 else '-'}{duration(abs(seconds))}"


def _hidden(one: Difference) -> str:
    if max(one.hidden_predicted, one.hidden_played) <= ROUNDING:
        return ""
    return f"{_duration(one.hidden_predicted)}, {_duration(one.hidden_played)}"


def _duration(seconds: float) -> str:
    return duration(seconds if seconds > ROUNDING else 0.0)
