"""plan: the best layouts of a model on a mesh."""

from __future__ import annotations

import json
import sys
from typing import Any

from jaxllm.options import count, number, progress
from jaxllm.spec.errors import SpecError

TOP, MOST = 10, 1000


def run(
    model_text: str,
    mesh_text: str,
    *,
    batch: str,
    seq: str | None,
    precision: str,
    optimizer: str,
    gradient_dtype: str | None,
    fix: str | None,
    objective: str,
    price: str | None,
    top: str | None,
    why: str | None,
    verify: str | None,
    as_json: bool,
    plot: str | None,
) -> int:
    from jaxllm.plan import changes, conditions
    from jaxllm.plan.cost import costs
    from jaxllm.plan.plan import plan
    from jaxllm.plan.search import keep_memory
    from jaxllm.report.files import plot_path
    from jaxllm.report.table import console
    from jaxllm.spec.layout import Layout
    from jaxllm.spec.machine import Machine
    from jaxllm.spec.model import ModelConfig
    from jaxllm.spec.validate import default_sequence
    from jaxllm.spec.workload import Workload

    model, mesh = ModelConfig.load(model_text), Machine.load(mesh_text)
    workload = Workload(
        count("--batch", batch, None), count("--seq", seq, default_sequence(model)), precision, optimizer, gradient_dtype or ""
    )
    demanded = () if fix is None else conditions.parse(fix)
    layout = None if why is None else Layout.parse(why)
    compiled = 0 if verify is None else count("--verify", verify, 0)
    best = max(count("--top", top, TOP), compiled)
    if best > MOST:
        raise SpecError(f"--top and --verify list up to {MOST:,} layouts, and not {best:,}; --plot and --json have the whole front.")
    picture = plot_path(plot)
    if layout is not None and (compiled or picture is not None):
        raise SpecError("--why explains one layout, and --verify and --plot are about the best; leave it out, or them.")
    keep_memory()
    with progress() as say:
        found = plan(
            model, mesh, workload, conditions=demanded, objective=objective, top=best, price=_price(price), name=model_text,
            origin=layout, progress=say,
        )  # fmt: skip
        would_fit = changes.changes(found, say) if not found.best and layout is None else ()
        cheaper = costs(found, say) if layout is None else ()
    if layout is not None:
        return _explain(found, layout, as_json)
    outcome: Any = None
    if compiled and found.best:
        from jaxllm.verify import reordered
        from jaxllm.verify import verify as compile_first

        with progress() as say:
            outcome = compile_first(found, compiled, say)
        found = reordered(found, outcome)
    if picture is not None:
        from jaxllm.plan.drawing import save_plan

        save_plan(found, picture)
        print(f"jaxllm: wrote {picture}", file=sys.stderr)
    if as_json:
        from jaxllm.plan.document import document

        print(json.dumps(document(found, would_fit=would_fit, costs=cheaper, verified=outcome), indent=2))
    else:
        from jaxllm.plan.table import print_nothing, print_plan, print_verified

        if found.best:
            print_plan(found, cheaper, console())
        else:
            print_nothing(found, would_fit, console())
        if outcome is not None:
            print_verified(outcome, console())
    return 0 if found.best else 4


def _price(text: str | None) -> float | None:
    return None if text is None else number("--price", text, most=1e6, example="2.5")


def _explain(found: Any, layout: Any, as_json: bool) -> int:
    from jaxllm.plan.why import explain, print_why
    from jaxllm.report.table import console

    answer = explain(found, layout)
    if as_json:
        print(json.dumps(answer.to_json(), indent=2))
    else:
        print_why(answer, console())
    return 0
