"""One line of the comparison taken apart: formula with symbols and values, then the compiler's instructions."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from jaxllm.report.compare import Comparison, Row, Setup
from jaxllm.report.units import exact, human, percent, wrap
from jaxllm.spec.errors import SpecError, nearest
from jaxllm.spec.ledger import COLLECTIVES, MEMORY_LINES, PIPELINE_LINES, TRANSFERS, Term

PEAK = "peak"
_NAMES = (*MEMORY_LINES, *PIPELINE_LINES, "ticks", "matmul", *COLLECTIVES, *TRANSFERS, PEAK)


def check_name(text: str) -> None:
    """Raises SpecError when no line can have that name, so that no long work is done in vain."""
    name, slash, _ = text.partition("/")
    if not (name in _NAMES if slash else any(known.startswith(name) for known in _NAMES if name)):
        raise SpecError(f"--explain {text}: no line has such a name; {nearest(name, _NAMES)}")


def find(comparison: Comparison, text: str) -> str:
    """The label that `text` is, or is the only beginning of. Raises SpecError that lists the nearest labels."""
    labels = [row.label for row in comparison.rows] + [PEAK]
    if text in labels:
        return text
    found = [label for label in labels if text and label.startswith(text)]
    if len(found) == 1:
        return found[0]
    if found:
        raise SpecError(f"--explain {text}: {len(found)} lines begin so; choose one of {', '.join(found)}.")
    near = difflib.get_close_matches(text, labels, n=3, cutoff=0.4)
    raise SpecError(f"--explain {text}: there is no such line; the nearest are {', '.join(near or labels)}.")


def symbols(setup: Setup, row: Row | None = None) -> dict[str, Any]:
    """The letters that the closed form is written in, with their values here; in a pipeline on the stage that has the
    most of a line."""
    from jaxllm.theory.partition import stages_of  # they import NumPy, which a help text should not
    from jaxllm.theory.symbols import Symbols

    s = Symbols.of(setup.model, setup.layout, setup.workload)
    letters = "L D F N K H V r n t z m b T p c g o".split() + (["P"] if s.family == "gpt" else [])
    letters += ["q"] if setup.layout.sequence else []
    letters += ["x"] if setup.layout.context > 1 else []
    letters += ["A", "C"] if setup.layout.attention == "blockwise" else []
    more = {}
    stages = stages_of(setup.model, setup.layout, setup.workload)
    if stages is not None:
        values = row.predicted_stages if row is not None else ()
        stage = values.index(max(values)) if values else stages.first
        s = s.on_stage(stages, stage)
        more = {"stage": stage} | {name: getattr(s, name) for name in "R first last pipe ticks stash kept inbox depth".split()}
    values = {"B": setup.workload.batch, "Psi": setup.model.parameters} | {name: getattr(s, name) for name in letters}
    padded = -(-s.V // s.t) * s.t
    return values | ({"V'": padded} if padded != s.V else {}) | more


def print_explanation(comparison: Comparison, setup: Setup, text: str, out: Console) -> None:
    """What `--explain` shows. Raises SpecError for an unknown or ambiguous line."""
    label = find(comparison, text)
    row = next((row for row in comparison.rows if row.label == label), None)
    out.print()
    _line(out, label, _status(comparison, row))
    _line(out, "symbols", ", ".join(f"{name}={value}" for name, value in symbols(setup, row).items()))
    peak = comparison.peak
    if row is None:
        sides = ((peak.predicted, None, peak.predicted_terms), (peak.compiled, None, peak.compiled_terms))
    else:
        sides = (
            (row.predicted, row.wire_predicted, row.predicted_terms),
            (row.compiled, row.wire_compiled, row.compiled_terms),
        )
    unit = {"flops": "FLOPs", "pipeline": "ticks"}.get(row.section if row is not None else "", "bytes")
    for author, (value, wire, terms) in zip(comparison.authors, sides, strict=True):
        out.print()
        _line(out, author, _figures(value, wire, unit))
        _print_terms(out, value, terms)
    if row is not None and row.count:
        _line(out, "runs", f"{row.count:,} a step")
    if row is not None and row.emitted is not None and row.emitted != row.compiled:
        _line(out, "emitted", f"{row.emitted:,} bytes: what the backend made of it")
    for rule in row.rules if row is not None else ():
        _line(out, "rule", f"{rule.name}, {rule.bytes:,} bytes: {rule.why}")


def explanation(comparison: Comparison, setup: Setup, text: str) -> dict[str, Any]:
    """The same as plain dicts and lists. Raises SpecError for an unknown or ambiguous line."""
    label = find(comparison, text)
    row = next((row for row in comparison.rows if row.label == label), None)
    source = comparison.peak if row is None else row
    return {
        "line": label,
        "symbols": symbols(setup, row),
        "predicted": [_plain(term) for term in source.predicted_terms],
        "compiled": [_plain(term) for term in source.compiled_terms],
        "rules": [
            {"name": r.name, "bytes": int(r.bytes), "why": r.why} for r in (row.rules if row is not None else ())
        ],
    }


def _plain(term: Term) -> dict[str, Any]:
    return {"label": term.label, "value": int(term.value), "detail": term.detail, "source": term.source}


def _status(comparison: Comparison, row: Row | None) -> str:
    if row is not None:
        return f"{row.status}: {row.reason}" if row.reason else row.status
    error = comparison.peak.error
    return "an estimate" if error is None else f"an estimate, off by {percent(error)}"


def _figures(value: int | None, wire: int | None, unit: str) -> str:
    if value is None:
        return "unknown"
    if unit not in ("bytes", "FLOPs"):
        return f"{exact(value)} {unit}"
    short = human(value, "B" if unit == "bytes" else "FLOP")
    if wire is None:
        return f"{exact(value)} {unit} ({short})"
    return f"payload {exact(value)} {unit} ({short}), wire {exact(wire)} {unit}"


def _print_terms(out: Console, value: int | None, terms: Sequence[Term]) -> None:
    if not terms:
        # a line that is there without terms is worth a word; one that is not has nothing to explain
        out.print(Text("  no terms" if value else "  nothing", "dim"))
        return
    width = max(len(exact(int(term.value))) for term in terms)
    for term in terms:
        head = f"  {exact(int(term.value)):>{width}}  "
        indent = " " * len(head)
        body = wrap(term.label, out.width - len(head))
        out.print(Text(head + body[0]), soft_wrap=True)
        for line in body[1:]:
            out.print(Text(indent + line), soft_wrap=True)
        for text in (term.detail, term.source):
            for line in wrap(text, out.width - len(head)) if text else ():
                out.print(Text(indent + line, "dim"), soft_wrap=True)
    total = sum(int(term.value) for term in terms)
    if value is not None and total != value:
        _line(out, "", f"the terms add up to {total:,}, which is {total - value:+,} off the line")


def _line(out: Console, name: str, text: str) -> None:
    indent = max(10, len(name) + 2)
    lines = wrap(text, out.width - indent)
    for index, line in enumerate(lines):
        out.print(Text.assemble((f"{name if not index else '':<{indent}}", "bold"), line), soft_wrap=True)
