"""check: the closed form beside what a compiler makes of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.options import count, progress
from jaxllm.spec.errors import SpecError

if TYPE_CHECKING:
    from jaxllm.report import Comparison, Setup


def run(
    model_text: str,
    mesh_text: str,
    layout_text: str,
    *,
    batch: str | None,
    seq: str | None,
    precision: str | None,
    optimizer: str,
    gradient_dtype: str | None,
    target: str | None,
    run_it: bool,
    explain: str | None,
    by: str | None,
    strict: bool,
    as_json: bool,
    plot: str | None,
    bundle: str | None,
) -> int:
    from jaxllm import targets
    from jaxllm.report.files import plot_path
    from jaxllm.spec.layout import Layout
    from jaxllm.spec.machine import Machine
    from jaxllm.spec.model import ModelConfig
    from jaxllm.spec.validate import default_batch, default_sequence, validate, validate_target
    from jaxllm.spec.workload import Workload

    model = ModelConfig.load(model_text)
    mesh = Machine.load(mesh_text)
    layout = Layout.parse(layout_text)
    target = _target(target, mesh, run_it)
    batch_size, sequence = (
        count(option, value, None, word="max") for option, value in (("--batch", batch), ("--seq", seq))
    )
    for option, value in (("--precision", precision), ("--gradient-dtype", gradient_dtype)):
        if value is not None and not value.strip():
            raise SpecError(f"{option} is blank; leave it out for the default, or name one as in jaxllm check --help.")
    precision = precision or ("f32" if target == "cpu" else "bf16-f32")
    if explain is not None:
        from jaxllm.report.explain import check_name

        check_name(explain)
    if by is not None:
        from jaxllm.report.layers import check_by

        check_by(by, layout.remat)
    path = plot_path(plot)
    parcel = _bundle_path(bundle)

    # All that can be wrong is found before the long work; `max` is at least the default.
    least = Workload(
        batch=batch_size if isinstance(batch_size, int) else default_batch(layout),
        sequence=sequence if isinstance(sequence, int) else default_sequence(model, layout),
        precision=precision,
        optimizer=optimizer,
        gradient_dtype=gradient_dtype or "",
    )
    validate(model, layout, mesh.devices, least)
    validate_target(target, layout, least)
    from jaxllm import check as pipeline

    def resolved(factor: float = 1.0) -> Workload:
        return pipeline.resolve(
            model, layout, mesh, batch_size, sequence, precision, optimizer, gradient_dtype or "", target=target, factor=factor
        )

    workload = resolved()
    with progress() as say:
        say("starting JAX")
        from jaxllm.targets import start

        start.prepare(target, mesh.devices)  # some of it is read when JAX is imported
        with start.quiet():
            options: dict[str, Any] = {"target": target, "run": run_it, "progress": say, "bundle": parcel}
            if "max" in (batch_size, sequence):
                workload, comparison = pipeline.check_largest(model, layout, mesh, resolved, **options)
            else:
                comparison = pipeline.check(model, layout, mesh, workload, **options)

    from jaxllm.report import Setup, exit_code
    from jaxllm.report.document import versions

    setup = Setup(model, layout, mesh, workload, target, versions(target))
    _show(comparison, setup, explain=explain, by=by, as_json=as_json)
    if path is not None:
        from jaxllm.report.plot import save_plot

        save_plot(comparison, setup, path, by)
        print(f"jaxllm: wrote {path}", file=sys.stderr)
    if parcel is not None:
        from jaxllm.bundle import save_comparison

        save_comparison(parcel, comparison, setup)
        print(f"jaxllm: wrote {parcel}", file=sys.stderr)
    return exit_code(comparison, strict=strict)


def _show(comparison: Comparison, setup: Setup, *, explain: str | None, by: str | None, as_json: bool) -> None:
    from jaxllm.report import explain as explaining

    if as_json:
        from jaxllm.report.document import document

        result = document(comparison, setup)
        if explain is not None:
            result["explain"] = explaining.explanation(comparison, setup, explain)
        if by is not None:
            from jaxllm.report import layers

            result["parts"] = layers.document(setup, by)
        print(json.dumps(result, indent=2))
        return
    from jaxllm.report.table import console, print_comparison

    out = console()
    if explain is not None:
        explaining.find(comparison, explain)  # an unknown line is told before the table, not under it
    print_comparison(comparison, setup, out)
    if by is not None:
        from jaxllm.report import layers

        layers.print_parts(setup, by, out)
    if explain is not None:
        explaining.print_explanation(comparison, setup, explain, out)


def _target(text: str | None, mesh: Any, run: bool) -> str:
    """The compiler to ask. Raises SpecError where machine, size, target and --run do not go together."""
    from jaxllm import targets

    target = mesh.machine.target if text is None else text
    targets.validate(target, mesh)
    if run and target not in ("cpu", "local"):
        raise SpecError(
            f"--run needs devices that are here and --target {target} only compiles; use --target cpu or local."
        )
    return target


def _bundle_path(text: str | None) -> Path | None:
    if text is None:
        return None
    from jaxllm.bundle import check_folder

    return check_folder(text)
