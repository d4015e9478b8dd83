"""The time of a step for people and for programs: its parts, how sure they are, and what they were reckoned with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from jaxllm.report.table import print_fields, print_listing
from jaxllm.report.units import duration, human
from jaxllm.spec.layout import Layout
from jaxllm.spec.machine import Mesh
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.workload import Workload
from jaxllm.theory.rates import REFERENCE, UNSURE
from jaxllm.theory.time import StepTime, strange

NAMES = {
    "products": "matmuls",
    "memory": "what else goes through memory",
    "launch": "waiting for the host",
    "bubble": "bubble of the pipeline",
    "optimizer": "optimizer",
    "host": "copies from and to host memory",
    "other": "what grows with nothing",
}
ROUNDING = 1e-9  # seconds: less is what a float leaves of a difference


@dataclass(frozen=True)
class Timed:
    """The nouns of a step, its time, and the bytes of a device at the peak by closed form."""

    model: ModelConfig
    layout: Layout
    mesh: Mesh
    workload: Workload
    time: StepTime
    peak: int

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within what a device offers; None where that is not known."""
        return None if self.mesh.capacity is None else self.peak <= self.mesh.capacity


def parts(time: StepTime) -> list[tuple[str, float, float]]:
    """(what, seconds that are waited for, seconds that blocks hide) of each part that takes any time, the largest first."""
    own = [(NAMES[name], float(seconds), 0.0) for name, seconds in time.parts.items() if name in NAMES]
    sent = [(f"collectives over {'+'.join(each.axes)}", float(each.exposed), float(each.hidden)) for each in time.traffic]
    found = [(what, *(seconds if seconds > ROUNDING else 0.0 for seconds in both)) for what, *both in own + sent]
    return sorted((part for part in found if part[1] or part[2]), key=lambda part: (-part[1], -part[2]))


def note(timed: Timed) -> str:
    """What the rates stand on."""
    name = timed.mesh.machine.name
    unlike = "; no measured step had all that this one has, so that the interval is wider" if strange(timed.time.counted[0]) else ""
    if timed.time.rates.measured:
        source = timed.mesh.machine.figures["efficiency.matmul"].source
        return f"efficiencies and latencies of {name}: {source}{unlike}"
    return (
        f"{name} has figures of a data sheet alone: it is taken to reach as much of them as {REFERENCE}, where that was "
        f"measured, and the interval is {UNSURE} times as wide{unlike}"
    )


def document(timed: Timed) -> dict[str, Any]:
    """All of it as plain dicts and lists, for --json: seconds, FLOPs of one device, shares."""
    time, (low, high) = timed.time, timed.time.interval
    return {
        "schema": 1,
        "model": timed.model.name,
        "mesh": timed.mesh.text,
        "layout": f"{timed.layout}",
        "batch": timed.workload.batch,
        "sequence": timed.workload.sequence,
        "precision": timed.workload.precision,
        "gradient_dtype": timed.workload.dtypes.gradients,
        "seconds": float(time.seconds),
        "interval": {"level": 0.8, "low": float(low), "high": float(high)},
        "parts": [{"part": what, "seconds": waited, "hidden": hidden} for what, waited, hidden in parts(time)],
        "model_flops": int(time.model_flops),
        "hardware_flops": int(time.hardware_flops),
        "mfu": float(time.mfu),
        "hfu": float(time.hfu),
        "tokens_per_second": timed.workload.batch * timed.workload.sequence / float(time.seconds),
        "peak": timed.peak,
        "fits": timed.fits,
        "measured": time.rates.measured,
        "note": note(timed),
    }


def print_time(timed: Timed, out: Console) -> None:
    """What is timed, the seconds of a step and its parts."""
    time, work, (low, high) = timed.time, timed.workload, timed.time.interval
    seconds, rate = float(time.seconds), time.rates.peak
    tokens = work.batch * work.sequence
    fields = [
        ("model", f"{timed.model.name}, {timed.model.parameters:,} parameters"),
        ("mesh", f"{timed.mesh}, {timed.mesh.devices:,} device{'s' * (timed.mesh.devices > 1)} of {human(rate, 'FLOP/s')}"),
        ("layout", f"{timed.layout}"),
        ("workload", work.words),
        ("step", f"{duration(seconds)}; four of five between {duration(low)} and {duration(high)}"),
        ("tokens", f"{tokens / seconds:,.0f} a second, {tokens / seconds / timed.mesh.devices:,.0f} on each device"),
        ("MFU", f"{_share(time.mfu)} of the peak, matmuls of the model alone, attention over all pairs of positions"),
        ("HFU", f"{_share(time.hfu)}, with what is computed again"),
        ("memory", _memory(timed)),
        ("rates", note(timed)),
    ]
    print_fields(out, fields)
    out.print()
    rows = [
        (what, duration(waited), _share(waited / seconds), duration(hidden) if hidden else "")
        for what, waited, hidden in parts(time)
    ]
    print_listing(out, ("part of a step", "waited for", "share", "hidden behind blocks"), rows)


def _memory(timed: Timed) -> str:
    peak = f"{human(timed.peak)} at the peak, an estimate"
    if timed.fits is None:
        return peak
    verdict = "fits" if timed.fits else "does not fit, so that no step is taken"
    return f"{peak}: {verdict} in the {human(timed.mesh.capacity)} of a device"


def _share(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"
