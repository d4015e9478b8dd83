"""days: how long a training run takes, by the rules of thumb."""

from __future__ import annotations

import json
from typing import Any

from jaxllm.options import count, number
from jaxllm.spec.errors import SpecError


def run(model_text: str, tokens: str, mesh_text: str, mfu: str, *, remat: str, seq: str | None, as_json: bool) -> int:
    from jaxllm.report.days import RECOMPUTED, Plan, document, print_days
    from jaxllm.spec.machine import Machine
    from jaxllm.spec.model import ModelConfig
    from jaxllm.spec.validate import default_sequence
    from jaxllm.theory.training import counts

    model = ModelConfig.load(model_text)
    wanted = number("--tokens", tokens, most=1e18, example="2e12")
    mesh = Machine.load(mesh_text)
    used = number("--mfu", mfu, most=1, example="0.45")
    if remat not in RECOMPUTED:
        raise SpecError(f"--remat {remat!r} is none of {', '.join(RECOMPUTED)}; leave it out for none.")
    sequence = count("--seq", seq, default_sequence(model))
    plan = Plan(model, mesh, wanted, sequence, remat, _rate(mesh.machine), used)
    found = counts(model, sequence, remat)
    if as_json:
        print(json.dumps(document(plan, found), indent=2))
    else:
        from jaxllm.report.table import console

        print_days(plan, found, console())
    return 0


def _rate(machine: Any) -> tuple[str, int]:
    """The dtype that a machine trains in, and its peak in FLOP/s. Raises SpecError where no peak is stated."""
    peak = machine.peak_flops
    dtype = next((dtype for dtype in ("bf16", "f16") if dtype in peak), None)
    if dtype is None:
        raise SpecError(f"--mesh {machine.name}: its file states no peak rate; take a machine that does, as h100:8.")
    return dtype, peak[dtype]
