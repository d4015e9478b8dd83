"""Names in the policies of jax.checkpoint that no checkpoint_name of a traced function gives."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jaxllm.hlo.graph import LIBRARIES

_DEEPEST = 8  # policies made of policies
_FRAMES = 20  # of the stack, from the inside


def unmatched_names(
    function: Any, arguments: Sequence[Any] = (), keywords: Mapping[str, Any] = MappingProxyType({})
) -> tuple[tuple[str, str], ...]:
    """Each name that a policy of jax.checkpoint lists and no checkpoint_name gives, with the `file:line` where the
    checkpoint is applied, or else of the function that it is applied to.

    Args: a function, jitted or not, with its arguments; it is traced, which JAX does once for the same ones. The
    policies are JAX's own, those that offload among them: of a policy that somebody wrote nothing is known.
    """
    import jax

    jitted = function if hasattr(function, "lower") else jax.jit(function)
    if not hasattr(jitted, "trace"):  # jax.pmap's have none
        return ()
    traced = jitted.trace(*arguments, **keywords)
    traced = getattr(traced, "traced", traced)  # flax.nnx wraps it
    given: set[str] = set()
    listed: dict[str, str] = {}
    for equation in _equations(traced.jaxpr):
        if equation.primitive.name == "name":
            given.add(equation.params["name"])
        elif "policy" in equation.params:
            for name in _names(equation.params["policy"]):
                listed[name] = listed.get(name) or _source(equation)
    return tuple((name, source) for name, source in sorted(listed.items()) if name not in given)


def _equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a jaxpr and of all that are in it, each jaxpr once."""
    waiting, seen = [jaxpr], set()
    while waiting:
        inner = waiting.pop()
        inner = getattr(inner, "jaxpr", inner)  # of a closed one
        if id(inner) in seen or not hasattr(inner, "eqns"):
            continue
        seen.add(id(inner))
        for equation in inner.eqns:
            yield equation
            for value in equation.params.values():
                waiting += value if isinstance(value, (tuple, list)) else [value]


def _names(policy: Any, depth: int = 0) -> Iterator[str]:
    """The names that a policy is made of: JAX keeps them in a set, in a closure (0.12) or in a dataclass (0.10)."""
    if depth > _DEEPEST or not callable(policy):
        return
    if isinstance(policy, partial):
        held = [policy.func, *policy.args, *policy.keywords.values()]
    else:
        held = [cell.cell_contents for cell in getattr(policy, "__closure__", None) or ()]
        held += getattr(policy, "__dict__", {}).values()
    own = str(getattr(policy, "__module__", "")).startswith("jax.")
    for value in held:
        if own and isinstance(value, (set, frozenset)):
            yield from (name for name in value if isinstance(name, str))
        else:
            yield from _names(value, depth + 1)


def _source(equation: Any) -> str:
    """`file:line` of the innermost frame of no library's; within a scan none is kept, and the function's own line
    stands."""
    from jax.extend import source_info_util

    frames = source_info_util.summarize(equation.source_info, num_frames=_FRAMES).splitlines()[::-1]
    info = getattr(equation.params.get("jaxpr"), "debug_info", None)
    frames.append(getattr(info, "func_src_info", "").rpartition(" at ")[2])
    found = [place for frame in frames if (place := re.match(r"(.+?):(\d+)", frame))]
    own = [place for place in found if not LIBRARIES.search(place[1])] or found
    return f"{Path(own[0][1]).name}:{own[0][2]}" if own else ""
