"""What follows from one layout of a plan: its MFU, an event simulation of it, and what to type next."""

from __future__ import annotations

import shlex

from jaxllm.plan.plan import Plan
from jaxllm.plan.search import Scored
from jaxllm.theory.symbols import Symbols
from jaxllm.theory.time import model_flops, simulated as by_simulation


def mfu(plan: Plan, scored: Scored) -> float:
    """The share of the peak that the model's own matmuls take, as StepTime.mfu has it."""
    layout = scored.layout
    whole = Symbols.of(plan.space.model, layout, plan.workload)  # all stages together
    return float(model_flops(whole)) / layout.pipe / scored.seconds / plan.rates.peak


def simulated(plan: Plan, scored: Scored) -> float | None:
    """Seconds by event simulation, each stage with its own layers and ends; None without a pipeline."""
    if scored.layout.pipe == 1:
        return None
    return by_simulation(plan.space.model, scored.layout, plan.mesh, plan.workload)


def check_arguments(plan: Plan, scored: Scored) -> list[str]:
    """What `check` is asked of a layout."""
    work = plan.workload
    return [
        plan.name, "--mesh", plan.mesh.text, "--layout", f"{scored.layout}", "--batch", f"{work.batch}", "--seq", f"{work.sequence}",
        "--precision", work.precision, "--optimizer", work.optimizer,
        *(("--gradient-dtype", work.gradient_dtype) if work.gradient_dtype else ()),
    ]  # fmt: skip


def commands(plan: Plan, scored: Scored) -> dict[str, str]:
    """What checks a layout with the compiler, what trains with it where the devices are, and the same in Python."""
    work, layout = plan.workload, f"{scored.layout}"
    asked = shlex.join(check_arguments(plan, scored))
    reduced = f", {work.gradient_dtype!r}" if work.gradient_dtype else ""
    return {
        "check": f"jaxllm check {asked}",
        "train": f"jaxllm train {asked} --text FILE",
        "python": "\n".join(
            (
                "from jaxllm import Layout, Machine, ModelConfig, Workload, predict, step_time",
                "",
                f"model, mesh = ModelConfig.load({plan.name!r}), Machine.load({plan.mesh.text!r})",
                f"layout = Layout.parse({layout!r})",
                f"workload = Workload({work.batch}, {work.sequence}, {work.precision!r}, {work.optimizer!r}{reduced})",
                "print(predict(model, layout, workload, target=mesh.target).peak, step_time(model, layout, mesh, workload).seconds)",
            )
        ),
    }
