"""The activations of a block that its forward pass can save: the names that users type, and that the models call them by."""

from __future__ import annotations

from collections.abc import Iterable

from jaxllm.spec.errors import SpecError

# In the order in which a token meets them. Each is the output of a matmul or of a reduction over devices (or, for
# "residual", of both), so that with all of them saved the backward pass computes only elementwise work again.
BY_FAMILY = {
    "llama": ("q", "k", "v", "scores", "attention", "residual", "gate", "up"),
    "gpt": ("q", "k", "v", "scores", "attention", "residual", "up"),
}
NAMES = tuple(dict.fromkeys(name for names in BY_FAMILY.values() for name in names))

# The block's input, which is saved whatever the layout: offload can keep it in host memory.
INPUT = "input"

# What attention without scores keeps of its softmax: for each query the logarithm of the sum of the exponentials of its
# scores. Its output is of no use to the backward pass without them, nor they without it, so "attention" means both.
STATISTICS = "lse"

# Names for several, for whichever of them a block has.
GROUPS = {"qkv": ("q", "k", "v"), "mlp": ("gate", "up")}


def parse(text: str) -> frozenset[str]:
    """The activations in a text like `qkv+mlp`. Raises SpecError on an unknown name."""
    check_names("save", text, (*GROUPS, *NAMES))
    return named(text.split("+"))


def check_names(key: str, text: str, known: tuple[str, ...]) -> None:
    """The names in a text like `qkv+mlp` are known ones, and each is there once. Raises SpecError."""
    seen: set[str] = set()
    for name in text.split("+"):
        if name not in known:
            what = f"there is nothing named {name!r}" if name else "a name is missing beside a +"
            raise SpecError(f"layout: {key}={text}: {what}; known: {', '.join(known)}.")
        if twice := seen & named([name]):
            raise SpecError(f"layout: {key}={text} names {min(twice)} twice; name each once.")
        seen |= named([name])


def named(names: Iterable[str]) -> frozenset[str]:
    """The activations of these names, some of which may be those of groups."""
    return frozenset(name for group in names for name in GROUPS.get(group, (group,)))
