"""Warnings: what costs a program time or memory without need, with the line that causes it and what to try.

A finder is a function `find_...` of a module of this package. It takes a Walk and gives Findings.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import replace

from jaxllm.hlo.view import View
from jaxllm.hlo.warn.walk import Walk
from jaxllm.report.inspection import Finding

Finder = Callable[[Walk], Iterator[Finding]]


def finders() -> dict[str, Finder]:
    """All finders by name."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return {name: finder for module in modules for name, finder in vars(module).items() if name.startswith("find_")}


def kinds() -> tuple[str, ...]:
    """All kinds of warnings: the finders' names."""
    return tuple(sorted(name.removeprefix("find_").replace("_", "-") for name in finders()))


def findings(view: View) -> tuple[Finding, ...]:
    """What all finders find, most bytes at stake first. What one line of the program causes again and again is told
    once, of the largest, with the bytes of all."""
    walk = Walk(view)
    found: dict[tuple[str, str], list[Finding]] = {}
    for finder in finders().values():
        for finding in finder(walk):
            found.setdefault((finding.kind, finding.source or finding.message), []).append(finding)
    return tuple(sorted(map(_one, found.values()), key=lambda finding: -finding.bytes))


def _one(alike: list[Finding]) -> Finding:
    largest = max(alike, key=lambda finding: finding.bytes)
    if len(alike) == 1:
        return largest
    more = f" The same line does so {f'{len(alike) - 1:,} times' if len(alike) > 2 else 'once'} more."
    return replace(largest, message=largest.message + more, bytes=sum(finding.bytes for finding in alike))
