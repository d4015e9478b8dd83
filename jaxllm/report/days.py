"""Training days for people and for programs: a row for each way to count the FLOPs of a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from jaxllm.report.table import print_fields, print_listing
from jaxllm.report.units import human
from jaxllm.spec.machine import Mesh
from jaxllm.spec.model import ModelConfig
from jaxllm.theory.training import Count, training_days


RECOMPUTED = {
    "none": "none",
    "selective": "selective: the scores of attention are computed again, and the rate counts that as well, where 6 P has none "
    "of it",
    "full": "full: each block is computed again, and the rate counts that as well",
}


@dataclass(frozen=True)
class Plan:
    """What is trained, on what, and how well it is used.

    rate   the dtype whose peak is taken, and its FLOP/s on one device
    used   share of that peak which the FLOPs of a row take, between 0 and 1
    """

    model: ModelConfig
    mesh: Mesh
    tokens: float
    sequence: int
    remat: str
    rate: tuple[str, int]
    used: float

    def days(self, count: Count) -> float:
        return training_days(count.hardware, self.tokens, self.mesh.devices, self.used * self.rate[1])

    def model_share(self, count: Count) -> float:
        """MFU: what of the peak goes into the model's own FLOPs (Chowdhery et al. 2022, PaLM, appendix B)."""
        return self.used * count.model / count.hardware


def document(plan: Plan, counts: Sequence[Count]) -> dict[str, Any]:
    """All of it as plain dicts and lists, for --json. FLOPs are those of a token, a rate is that of one device."""
    dtype, peak = plan.rate
    return {
        "schema": 1,
        "model": plan.model.name,
        "parameters": plan.model.parameters,
        "mesh": plan.mesh.text,
        "devices": plan.mesh.devices,
        "tokens": plan.tokens,
        "sequence": plan.sequence,
        "remat": plan.remat,
        "dtype": dtype,
        "peak": peak,
        "rate": plan.used * peak,
        "rows": [
            {
                "counted": count.name,
                "model_flops": count.model,
                "hardware_flops": count.hardware,
                "days": plan.days(count),
                "mfu": plan.model_share(count),
                "hfu": plan.used,
            }
            for count in counts
        ],
    }


def print_days(plan: Plan, counts: Sequence[Count], out: Console) -> None:
    """What is trained on what, then a row for each way to count."""
    dtype, peak = plan.rate
    print_fields(
        out,
        [
            ("model", f"{plan.model.name}, P = {plan.model.parameters:,} parameters, sequences of {plan.sequence:,} tokens"),
            ("tokens", f"T = {plan.tokens:,.10g}"),
            ("devices", f"n = {plan.mesh.devices:,} of {plan.mesh.machine.name}, {human(peak, 'FLOP/s')} each in {dtype}"),
            ("rate", f"X = {plan.used:.4g} of it, {human(plan.used * peak, 'FLOP/s')}"),
            ("remat", RECOMPUTED[plan.remat]),
        ],
    )
    out.print()
    rows = [
        (count.name, count.hardware, f"{plan.days(count):,.4g}", _share(plan.model_share(count)), _share(plan.used))
        for count in counts
    ]
    print_listing(out, ("a token counted as", "FLOPs", "days", "MFU", "HFU"), rows)
    out.print()
    print_fields(
        out,
        [
            ("days", "FLOPs T/(nX): with 6 P, 6TP/(nX); with 8 P, 8TP/(nX) (Narayanan et al. 2021, equation 4)"),
            ("exact", "the matmuls that are done: no embedding, attention over T x T, or over what a causal mask leaves"),
            ("MFU", "of the peak, what goes into the model's FLOPs; HFU: into recomputation as well"),
        ],
    )


def _share(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"
