"""A model's shapes for people and for programs: module by module, and its cache of keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from rich.console import Console

from jaxllm.report.table import print_fields, print_listing
from jaxllm.report.units import human
from jaxllm.spec.ledger import DTYPE_BYTES
from jaxllm.spec.model import ModelConfig
from jaxllm.theory.shapes import Module, Shape, cache_bytes, modules

DTYPES = ("bf16", "f32", "f16", "f8e4m3fn")  # what weights and activations are served in


@dataclass(frozen=True)
class Prefill:
    """A forward pass over `batch` sequences of `sequence` tokens, all of it in one dtype."""

    model: ModelConfig
    batch: int
    sequence: int
    dtype: str

    @property
    def element(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @cached_property
    def modules(self) -> tuple[Module, ...]:
        return modules(self.model, self.batch, self.sequence)

    @property
    def caches(self) -> dict[str, tuple[int, int]]:
        """Of each grouping of heads the key/value heads and the bytes."""
        model = self.model
        groupings = {"as the model": model.kv_heads, "one a query head": model.heads, "one for all": 1}
        return {
            name: (heads, cache_bytes(model, self.batch, self.sequence, self.element, heads))
            for name, heads in groupings.items()
        }


def document(prefill: Prefill) -> dict[str, Any]:
    """All of it as plain dicts and lists, for --json; bytes in the dtype, of a block's module those of one block."""
    return {
        "schema": 1,
        "model": prefill.model.name,
        "parameters": prefill.model.parameters,
        "batch": prefill.batch,
        "sequence": prefill.sequence,
        "dtype": prefill.dtype,
        "modules": [
            {
                "name": module.name,
                "times": module.times,
                "weights": [list(shape) for shape in module.weights],
                "parameters": module.parameters,
                "output": list(module.output),
                "output_bytes": prod(module.output) * prefill.element,
            }
            for module in prefill.modules
        ],
        "cache": [
            {"grouping": name, "kv_heads": heads, "bytes": size, "bytes_per_token": size // (prefill.batch * prefill.sequence)}
            for name, (heads, size) in prefill.caches.items()
        ],
    }


def print_shapes(prefill: Prefill, out: Console) -> None:
    """What is asked, a row for each module, and the cache by grouping of heads."""
    model, dtype, steps = prefill.model, prefill.dtype, prefill.modules
    print_fields(
        out,
        [
            ("model", f"{model.name}, {model.parameters:,} parameters, {human(model.parameters * prefill.element)} in {dtype}"),
            ("input", f"{prefill.batch:,} x {prefill.sequence:,} tokens"),
        ],
    )
    out.print()
    rows = []
    for module in steps:
        weights = " + ".join(map(_shape, module.weights)) or ("the embedding's" if module.name == "head" else "")
        if module.name == "attention_norm":
            rows.append((f"{model.layers} blocks, each", "", "", ""))
        inside = module.name not in ("embed", "positions", "final_norm", "head")
        size = human(prod(module.output) * prefill.element)
        rows.append((f"{'  ' * inside}{module.name}", weights, _shape(module.output), size))
    print_listing(out, ("module", "weights", "output", f"in {dtype}"), rows)
    out.print()
    rows = [(name, heads, f"{size:,}", human(size)) for name, (heads, size) in prefill.caches.items()]
    print_listing(out, ("key/value heads", "K", f"cache in bytes, {dtype}", ""), rows)
    out.print()
    formula = f"2 L b T K H values: {2 * model.layers * model.kv_heads * model.head_dim * prefill.element:,} bytes a token"
    print_fields(out, [("cache", formula)])


def _shape(shape: Shape) -> str:
    return " x ".join(map(str, shape))
