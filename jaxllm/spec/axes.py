"""Mesh axes of anybody's program, as a text: `data=4,tensor=2`, outermost first."""

from __future__ import annotations

from jaxllm.spec.errors import SpecError

MOST = 2**20  # devices: far more than any machine has


def parse_axes(option: str, text: str) -> dict[str, int]:
    """Name -> degree. `option` is named in errors. Raises SpecError on anything that is not axes."""
    axes: dict[str, int] = {}
    devices = 1
    for item in text.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not name or not equals or not value:
            raise SpecError(f"{option}: {item.strip()!r} in {text!r} is not axis=degree; write it like data=4,tensor=2.")
        if name in axes:
            raise SpecError(f"{option}: the axis {name!r} is given twice in {text!r}; keep one of them.")
        if not (value.isascii() and value.isdecimal()) or len(value) > 9 or not int(value):
            raise SpecError(f"{option}: {name}={value} is not a whole number from 1; write it like {name}=2.")
        axes[name] = int(value)
        devices *= axes[name]
    if devices > MOST:
        raise SpecError(f"{option}: {text} has {devices:,} devices, more than {MOST:,}; correct a degree.")
    return axes
