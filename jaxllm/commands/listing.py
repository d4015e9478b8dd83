"""Tables of what is known, and all figures of one of them."""

from __future__ import annotations

import json
from typing import Any


def print_known(known: dict[str, Any], heads: tuple[str, ...], rows: list[tuple[Any, ...]], as_json: bool) -> None:
    if as_json:
        print(json.dumps({name: noun.to_json() for name, noun in known.items()}, indent=2))
        return
    from jaxllm.report.table import console, print_listing

    print_listing(console(), heads, rows)


def describe(name: str, noun: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(noun.to_json(), indent=2))
        return
    from jaxllm.report.table import console, print_figures

    print_figures(console(), name, noun.describe())
