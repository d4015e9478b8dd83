"""How long the cells of a schedule take."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

from jaxllm.schedules.table import Schedule
from jaxllm.spec.errors import SpecError, nearest


@dataclass(frozen=True)
class Times:
    """Times of one microbatch on a whole stage, all its chunks together, in any unit.

    f     forward
    b     backward, the gradient of the inputs
    w     backward, the gradient of the weights
    comm  how long a result travels to another stage; both stages go on meanwhile
    """

    f: float = 1.0
    b: float = 1.0
    w: float = 1.0
    comm: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            known = isinstance(value, int | float) and not isinstance(value, bool)
            if not known or not 0 <= value <= 1e9:  # nor is NaN
                raise SpecError(f"times: {name}={value} is no number from 0 to 10^9; write it like {name}=1.")
        if not self.stage:
            raise SpecError("times: f, b and w are all 0, and a step takes no time; give one of them, as f=1.")

    @classmethod
    def parse(cls, text: str) -> Times:
        """Reads `f=1,b=1,w=1,comm=0.05`; what is left out is 1, and comm 0. Raises SpecError on anything else."""
        names = [field.name for field in fields(cls)]
        values: dict[str, float] = {}
        for item in text.split(","):
            name, equals, value = (part.strip() for part in item.partition("="))
            if not equals or not name or not value:
                raise SpecError(f"times: {item.strip()!r} in {text!r} is not key=value, as in f=1,b=1,w=1,comm=0.05.")
            if name not in names:
                raise SpecError(f"times: unknown key {name!r}; {nearest(name, names)}")
            if name in values:
                raise SpecError(f"times: {name!r} is given twice in {text!r}; keep one of them.")
            try:
                values[name] = float(value) if value.isascii() and "_" not in value else math.nan
            except ValueError:
                values[name] = math.nan
            if not math.isfinite(values[name]):
                apart = "commas between them" if ";" in value or "=" in value else f"it like {name}=1"
                raise SpecError(f"times: {name}={value} is no number from 0 to 10^9; write {apart}.")
        return cls(**values)

    @property
    def stage(self) -> float:
        """Work of a stage for one microbatch."""
        return self.f + self.b + self.w

    def of_kinds(self, schedule: Schedule) -> dict[str, float]:
        """How long a cell of each kind takes: a chunk is that part of the stage."""
        chunk = {"F": self.f, "B": self.b, "W": self.w, "BW": self.b + self.w}
        return {kind: time / schedule.chunks for kind, time in chunk.items()}
