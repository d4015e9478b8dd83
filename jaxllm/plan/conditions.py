"""What a user demands of a layout: `tensor=4,zero=1|3,pipe<=8`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jaxllm import schedules
from jaxllm.spec.attention import KINDS
from jaxllm.spec.errors import SpecError, nearest
from jaxllm.spec.layout import EXCHANGES

# What a search looks through, in the order in which layouts name it.
NUMBERS = ("pipe", "replica", "data", "context", "tensor", "zero", "microbatches", "virtual")
SEARCHED = (
    "pipe", "replica", "data", "context", "tensor", "zero", "remat", "save", "offload", "sequence", "attention", "exchange",
    "microbatches", "schedule", "virtual",
)  # fmt: skip
REMATS = ("none", "selective", "full")
# With remat=full: nothing, all of the feed-forward, or all of attention but its scores.
SAVES = ("none", "mlp", "qkv+attention+residual")
STATES = ("none", "optimizer", "optimizer+parameters")
INPUT_AWAY = "input"
OFFLOADS = (*STATES, INPUT_AWAY, *(f"{state}+{INPUT_AWAY}" for state in STATES[1:]))

_ITEM = re.compile(r"\s*([a-z]+)\s*(<=|>=|=)\s*(.+?)\s*")


@dataclass(frozen=True)
class Condition:
    """One of them: the value is one of these, or a bound on it."""

    name: str
    sign: str  # "=", "<=" or ">="
    values: tuple[Any, ...]

    def allows(self, value: Any) -> bool:
        if self.sign == "=":
            return value in self.values
        return value <= self.values[0] if self.sign == "<=" else value >= self.values[0]

    def __str__(self) -> str:
        return f"{self.name}{self.sign}{'|'.join(str(value).lower() for value in self.values)}"


def parse(text: str) -> tuple[Condition, ...]:
    """Reads conditions with commas between them. Raises SpecError where one is none, or two exclude each other."""
    found = tuple(_condition(item, text) for item in text.split(","))
    for index, later in enumerate(found):
        for earlier in found[:index]:
            if earlier.name == later.name and not _together(earlier, later):
                raise SpecError(f"--fix: {earlier} and {later} exclude each other; leave one of them out.")
    return found


def allowed(conditions: Iterable[Condition], name: str, value: Any) -> bool:
    """Whether a value of that name meets all conditions on it."""
    return all(condition.allows(value) for condition in conditions if condition.name == name)


def _condition(item: str, text: str) -> Condition:
    match = _ITEM.fullmatch(item)
    if match is None:
        raise SpecError(f"--fix: {item.strip()!r} in {text!r} is no condition; write it like tensor=4, zero=1|3 or pipe<=8.")
    name, sign, given = match.groups()
    if name not in SEARCHED:
        if name == "partition":
            raise SpecError("--fix: partition is not searched, a plan shares layers out evenly; leave it out, and ask jaxllm time of others.")
        raise SpecError(f"--fix: {name!r} is nothing that a plan searches; {nearest(name, SEARCHED)}")
    texts = given.split("|")
    if sign != "=" and (name not in NUMBERS or len(texts) > 1):
        raise SpecError(f"--fix: {item.strip()!r} bounds what is no single number; write {name}= and the values, as {name}={texts[0]}.")
    return Condition(name, sign, tuple(_value(name, each.strip()) for each in texts))


def _value(name: str, text: str) -> Any:
    if name in NUMBERS:
        least, most = (0, 3) if name == "zero" else (1, 10**9)
        if not (text.isascii() and text.isdecimal()) or len(text) > 10 or not least <= int(text) <= most:
            raise SpecError(f"--fix: {name}={text} is no whole number from {least} to {most:,}; write it like {name}=2.")
        return int(text)
    known = {
        "remat": REMATS,
        "save": SAVES,
        "offload": OFFLOADS,
        "sequence": ("true", "false"),
        "attention": KINDS,
        "exchange": EXCHANGES,
        "schedule": schedules.names(),
    }[name]
    if text not in known:
        raise SpecError(f"--fix: {name}={text} is nothing that a plan searches; {nearest(text, known)}")
    return text == "true" if name == "sequence" else text


def _together(one: Condition, other: Condition) -> bool:
    """Whether some value meets both."""
    for each, of in ((one, other), (other, one)):
        if each.sign == "=":
            return any(of.allows(value) for value in each.values)
    if one.sign == other.sign:
        return True
    low, high = sorted((one, other), key=lambda each: each.sign == "<=")
    return low.values[0] <= high.values[0]
