"""Layout: how a training step is split over a device mesh."""

from __future__ import annotations

from dataclasses import dataclass, fields

from jaxllm.spec.errors import SpecError, nearest

# Outermost to innermost: the innermost axis takes neighbouring devices.
AXES = ("pipe", "replica", "data", "tensor")

REMAT = ("none", "full", "jax")
PARTITIONS = ("even", "time", "memory")


@dataclass(frozen=True)
class Layout:
    """Degrees of the mesh axes, and how state and activations are kept.

    pipe          pipeline stages, each holding a part of the layers or, with chunks, several
    replica       copies of everything; gradients are all-reduced over it (hybrid sharding)
    data          data-parallel degree; ZeRO shards over this axis
    tensor        Megatron tensor-parallel degree, over heads, feed-forward and vocabulary
    zero          ZeRO stage 0 to 3 (Rajbhandari et al. 2020, section 5)
    remat         none: a declared list of named activations is saved; full: only each block's input;
                  jax: whatever plain autodiff saves, measured and not predicted
    microbatches  how many parts the batch is cut into; gradients are accumulated over them
    schedule      the order of a pipeline's steps: a name that `jaxllm schedule` knows, or the path of a table as CSV
    virtual       chunks of layers on each stage, for the schedules that interleave them; 0: the schedule's own number
    partition     how layers are shared out among stages: even; or by what the embedding and the head take as well, in
                  time or in memory
    """

    pipe: int = 1
    replica: int = 1
    data: int = 1
    tensor: int = 1
    zero: int = 0
    remat: str = "none"
    microbatches: int = 1
    schedule: str = ""
    virtual: int = 0
    partition: str = "even"

    def __post_init__(self) -> None:
        for name in (*AXES, "microbatches"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SpecError(f"layout: {name}={value} is not a whole number of 1 or more; leave it out for 1.")
        if not isinstance(self.zero, int) or isinstance(self.zero, bool) or self.zero not in (0, 1, 2, 3):
            raise SpecError(f"layout: zero={self.zero} is not a ZeRO stage; choose 0, 1, 2 or 3.")
        if self.remat not in REMAT:
            raise SpecError(f"layout: remat={self.remat!r} is unknown; {nearest(str(self.remat), REMAT)}")
        self._check_pipe()

    def _check_pipe(self) -> None:
        if self.partition not in PARTITIONS:
            raise SpecError(f"layout: partition={self.partition!r} is unknown; {nearest(str(self.partition), PARTITIONS)}")
        if not isinstance(self.virtual, int) or isinstance(self.virtual, bool) or self.virtual < 0:
            raise SpecError(f"layout: virtual={self.virtual} is not a number of chunks; choose 1 or more.")
        if not isinstance(self.schedule, str):
            raise SpecError(f"layout: schedule={self.schedule!r} is not a name or the path of a table.")
        if self.pipe == 1:
            for name, plain in (("schedule", ""), ("virtual", 0), ("partition", "even")):
                if getattr(self, name) not in (plain, 1):
                    raise SpecError(
                        f"layout: {name}={getattr(self, name)} says how a pipeline works, and pipe is 1; set pipe to 2 "
                        f"or more, or leave out {name}."
                    )
        elif self.remat == "jax":
            raise SpecError(
                "layout: remat=jax is plain autodiff of the whole step, and a pipeline has a backward pass of its own; "
                "choose remat=none or remat=full."
            )

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Reads `data=8,tensor=4,zero=3,remat=full`. Raises SpecError on anything else."""
        known = {field.name: field for field in fields(cls)}
        values: dict[str, int | str] = {}
        if not isinstance(text, str):
            raise SpecError(f"layout: {text!r} is not a text; write it like 'data=4,tensor=2'.")
        if not text.strip():
            raise SpecError("layout: it is blank; write data=1 for a single device, or degrees as in data=4,tensor=2.")
        for item in text.split(","):
            key, equals, value = (part.strip() for part in item.partition("="))
            if not key or not equals or not value:
                more = "; the path of a table has no comma" if ".csv" in text else ""
                raise SpecError(f"layout: {item.strip()!r} in {text!r} is not key=value, as in data=8,tensor=4,zero=3{more}.")
            if key not in known:
                raise SpecError(f"layout: unknown key {key!r}; {nearest(key, known)}")
            if key in values:
                raise SpecError(f"layout: {key!r} is given twice in {text!r}; keep one of them.")
            if known[key].type == "int":
                # isdecimal also takes digits of other scripts, which int() reads too: insist on ASCII
                if not (value.isascii() and value.isdecimal()) or len(value) > 9:
                    raise SpecError(f"layout: {key}={value} is not a whole number below 10^9; write it like {key}=2.")
                values[key] = int(value)
                if key == "virtual" and not values[key]:
                    raise SpecError("layout: virtual=0 is not a number of chunks; choose 1 or more, or leave it out.")
            else:
                values[key] = value
        return cls(**values)  # type: ignore[arg-type]

    @property
    def degrees(self) -> dict[str, int]:
        """Degree of each mesh axis, outermost first."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def devices(self) -> int:
        """Devices the layout needs: the product of its degrees."""
        product = 1
        for degree in self.degrees.values():
            product *= degree
        return product

    def __str__(self) -> str:
        plain = Layout()
        parts = [
            f"{field.name}={getattr(self, field.name)}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(plain, field.name)
        ]
        return ",".join(parts) or "data=1"
