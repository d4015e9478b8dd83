"""The phase of an operation, read from the scopes in its op_name."""

from __future__ import annotations

import re
from functools import cache

_WORD = re.compile(r"[^/()]+")
_SCOPE = re.compile(r"(?<![^/(])(?<!jit\()(forward|backward|update)(?![^/)])")  # a scope, and no function of that name


@cache
def phase_of(op_name: str) -> str:
    """forward, recompute, backward, update, or "" when the name tells nothing.

    A step of our own marks its parts with `jax.named_scope("forward" | "backward" | "update")`; the outermost counts.
    Below `backward`, what `jax.vjp` runs to linearise (in the name: `jvp(` without `transpose(`) is a second forward
    pass: recompute. Without those scopes the marks of JAX's own autodiff decide: `rematted_computation` is what
    `jax.checkpoint` repeats, `transpose(` the backward pass, and `jvp(` or the scope `autodiff` alone the forward pass.
    """
    words = _WORD.findall(op_name)
    found = _SCOPE.search(op_name)
    scope = found[1] if found else ""
    if scope in ("forward", "update"):
        return scope
    if "rematted_computation" in words:
        return "recompute"
    if scope == "backward":
        return "recompute" if "jvp" in words and "transpose(" not in op_name else "backward"
    if "transpose(" in op_name:
        return "backward"
    return "forward" if "autodiff" in words or "jvp" in words else ""


def join(caller: str, op_name: str) -> str:
    """The full name of an operation of a called function: names in it are relative to the `call`, unless inlined."""
    return op_name if not caller or op_name.startswith("jit(") else f"{caller}/{op_name}"
