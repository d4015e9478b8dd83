"""A plan as plain dicts and lists, for --json: docs/plan.schema.json says what is in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxllm.plan import follow
from jaxllm.plan.compiled import Verified
from jaxllm.plan.cost import Cost
from jaxllm.plan.plan import Plan
from jaxllm.plan.reasons import choices, reasons
from jaxllm.plan.search import Scored


def document(plan: Plan, *, would_fit: tuple[str, ...] = (), costs: Sequence[Cost] = (), verified: Sequence[Verified] | None = None) -> dict[str, Any]:
    """All of it: bytes, seconds, shares. `would_fit` is what `changes` found, and `verified` what compilers made of the first."""
    found, work = plan.found, plan.workload
    best = plan.best[0] if plan.best else None
    return {
        "schema": 1,
        "model": plan.space.model.name,
        "mesh": plan.mesh.text,
        "batch": work.batch,
        "sequence": work.sequence,
        "precision": work.precision,
        "gradient_dtype": work.dtypes.gradients,
        "optimizer": work.optimizer,
        "conditions": [str(condition) for condition in plan.space.conditions],
        "objective": plan.objective,
        "scored": found.scored,
        "unscored": found.unscored,
        "fits": found.fits,
        "seconds": plan.elapsed,
        "capacity": plan.mesh.capacity,
        "measured": plan.rates.measured,
        "layouts": [_scored(plan, scored) for scored in plan.best],
        "near": plan.near,
        "front": [_scored(plan, scored) for scored in found.front],
        "least": None if found.least is None else _scored(plan, found.least),
        "choices": [
            {
                "name": choice.name,
                "value": choice.value,
                "scored": choice.scored,
                "fits": choice.fits,
                "least": int(choice.least),
                "seconds": choice.seconds if np.isfinite(choice.seconds) else None,
            }
            for each in choices(plan).values()
            for choice in each
        ],
        "reasons": [{"name": each.name, "value": each.value, "reason": each.sentence} for each in reasons(plan)],
        "would_fit": list(would_fit),
        "costs": [
            {
                "mesh": cost.mesh.text,
                "devices": cost.mesh.devices,
                "layout": f"{cost.best.layout}",
                "seconds": cost.best.seconds,
                "tokens_per_dollar": cost.tokens_per_dollar,
            }
            for cost in costs
        ],
        "simulated": None if best is None else follow.simulated(plan, best),
        "next": None if best is None else follow.commands(plan, best),
        "verified": None if verified is None else [one.to_json() for one in verified],
    }


def _scored(plan: Plan, scored: Scored) -> dict[str, Any]:
    low, high = scored.interval
    found = {
        "layout": f"{scored.layout}",
        "seconds": scored.seconds,
        "interval": {"level": 0.8, "low": low, "high": high},
        "peak": scored.peak,
        "mfu": follow.mfu(plan, scored),
        "tokens_per_second": plan.tokens / scored.seconds,
    }
    return found if plan.price is None else found | {"tokens_per_dollar": plan.tokens_per_dollar(scored)}
