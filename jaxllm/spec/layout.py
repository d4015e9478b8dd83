"""Layout: how a training step is split over a device mesh."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from math import lcm

from jaxllm.spec import activations, attention
from jaxllm.spec.errors import SpecError, nearest

# Outermost to innermost: the innermost axis takes neighbouring devices.
AXES = ("pipe", "replica", "data", "context", "tensor")
ZERO_AXES = ("data", "context")  # those that ZeRO shards over
TOKEN_AXES = ("replica", "data", "context")  # those that the tokens of a batch are shared out over

REMAT = ("none", "selective", "full", "jax")
PARTITIONS = ("even", "time", "memory")
EXCHANGES = ("ring", "ulysses")
STATE = ("optimizer", "parameters")  # what of the state offload can keep in host memory


@dataclass(frozen=True)
class Layout:
    """Degrees of the mesh axes, and how state and activations are kept.

    pipe          pipeline stages, each holding a part of the layers or, with chunks, several
    replica       copies of everything; gradients are all-reduced over it (hybrid sharding)
    data          data-parallel degree; ZeRO shards over this axis and the next
    context       devices that share out the tokens of each sequence
    tensor        Megatron tensor-parallel degree, over heads, feed-forward and vocabulary
    zero          ZeRO stage 0 to 3 (Rajbhandari et al. 2020, section 5)
    remat         none: all activations with a name are saved; selective: all but the scores of attention (Korthikanti
                  et al. 2022, section 5); full: only each block's input; jax: whatever plain autodiff saves, measured
                  and not predicted
    sequence      with tensor, the residual stream between the products is cut along the sequence (Korthikanti et al. 2022,
                  section 4.2.2)
    save          with remat=full, activations that are saved on the device nevertheless, as in `qkv+mlp`
    offload       none: all state is in device memory; optimizer: the optimizer's arrays and the master copy are in host
                  memory, from where an update takes them layer by layer (Ren et al. 2021, ZeRO-Offload, whose update is
                  the host's); optimizer+parameters: parameters too, which come to the device a layer at a time whenever
                  they are used (Rajbhandari et al. 2021, ZeRO-Infinity). Activations, beside these or alone, as in
                  `optimizer+qkv+mlp`: they are saved in host memory and not on the device, from where the backward pass
                  takes them layer by layer; `input` is each block's (Rajbhandari et al. 2021, section 5.1.2)
    attention     xla: the scores of all pairs of positions are there at once; blockwise: those of two blocks of positions
                  at a time, and none is saved (FlashAttention-2, Dao 2023); cudnn: NVIDIA's kernel; splash: Pallas's for
                  TPUs, which no step can hold yet
    exchange      how context gets its keys and values together. ring: they go round from device to device, each of which has
                  two parts of the sequence, one from the front and one from the back, so that all have as much to do (Liu
                  et al. 2023, Ring Attention; the parts: Llama Team 2024, section 3.3.2). ulysses: each device gets all
                  positions of some heads (Jacobs et al. 2023, DeepSpeed-Ulysses)
    microbatches  how many parts the batch is cut into; gradients are accumulated over them
    schedule      the order of a pipeline's steps: a name that `jaxllm schedule` knows, or the path of a table as CSV
    virtual       chunks of layers on each stage, for the schedules that interleave them; 0: the schedule's own number
    partition     how layers are shared out among stages: even; or by what the embedding and the head take as well, in
                  time or in memory
    """

    pipe: int = 1
    replica: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1
    zero: int = 0
    remat: str = "none"
    save: str = ""
    offload: str = "none"
    sequence: bool = False
    attention: str = "xla"
    exchange: str = "ring"
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
        if self.attention not in attention.KINDS:
            raise SpecError(f"layout: attention={self.attention!r} is unknown; {nearest(str(self.attention), attention.KINDS)}")
        self._check_save()
        self._check_offload()
        if not isinstance(self.sequence, bool):
            raise SpecError(f"layout: sequence={self.sequence!r} is neither true nor false.")
        if self.sequence and self.tensor == 1:
            raise SpecError(
                "layout: sequence=true cuts what tensor parallelism repeats, and tensor is 1; set tensor to 2 or more, or "
                "leave out sequence."
            )
        self._check_context()
        self._check_pipe()

    def _check_context(self) -> None:
        if self.exchange not in EXCHANGES:
            raise SpecError(f"layout: exchange={self.exchange!r} is unknown; {nearest(str(self.exchange), EXCHANGES)}")
        if self.context == 1:
            if self.exchange != "ring":
                raise SpecError(
                    f"layout: exchange={self.exchange} says how context parallelism works, and context is 1; set context to 2 "
                    "or more, or leave out exchange."
                )
        elif self.exchange == "ring":
            if self.attention != "blockwise":
                raise SpecError(
                    f"layout: context={self.context} passes keys and values round a ring, a part of the sequence at a time, "
                    f"and attention={self.attention} takes all of it at once; set attention=blockwise, or exchange=ulysses."
                )
            if self.pipe > 1:
                raise SpecError(
                    f"layout: with pipe={self.pipe} the stages do different work at a tick, and to pass keys and values on is "
                    "one operation of all of them (docs/context.md); set exchange=ulysses, or leave out pipe."
                )

    def _check_save(self) -> None:
        if not isinstance(self.save, str):
            raise SpecError(f"layout: save={self.save!r} is not a text; write it like 'qkv+mlp'.")
        if self.save:
            if self.remat != "full":
                raise SpecError(
                    f"layout: save={self.save} adds to what remat=full saves, and remat is {self.remat}; set remat=full, "
                    "or leave out save."
                )
            if "scores" in activations.parse(self.save) and self.attention != "xla":
                raise SpecError(
                    f"layout: save={self.save}: with attention={self.attention} the scores are never there to be saved; "
                    "leave out scores, or set attention=xla."
                )

    def _check_offload(self) -> None:
        if not isinstance(self.offload, str):
            raise SpecError(f"layout: offload={self.offload!r} is not a text; write it like 'optimizer+qkv+mlp'.")
        if self._offload:
            known = (*STATE, activations.INPUT, *activations.GROUPS, *activations.NAMES)
            activations.check_names("offload", self.offload, known)
        if self.parameters_on_host and not self.state_on_host:
            raise SpecError(
                f"layout: offload={self.offload} takes weights to host memory and leaves the optimizer's arrays of them on the "
                f"device; write offload=optimizer+{self.offload}."
            )
        self._check_offloaded_activations()
        if not self.parameters_on_host:
            return
        if self.zero in (1, 2):
            raise SpecError(
                f"layout: zero={self.zero} gathers whole parameters after an update, and offload={self.offload} has no "
                "device memory for them; set zero=3 or 0, or offload=optimizer."
            )
        if self.pipe > 1:
            raise SpecError(
                f"layout: with pipe={self.pipe} a stage picks its layers by a table, and offload={self.offload} brings them "
                "to the device in the order of the model; leave out pipe, or set offload=optimizer."
            )
        if self.remat == "jax":
            raise SpecError(
                f"layout: remat=jax is plain autodiff, which keeps all weights that came to the device, and "
                f"offload={self.offload} is to keep none; choose remat=none, selective or full."
            )

    def _check_offloaded_activations(self) -> None:
        if not self.offloaded:
            return
        if twice := sorted(self.offloaded & activations.named(self.save.split("+"))):
            raise SpecError(
                f"layout: save={self.save} keeps {' and '.join(twice)} on the device, and offload={self.offload} in host "
                "memory; name each once."
            )
        if "scores" in self.offloaded and self.attention != "xla":
            raise SpecError(
                f"layout: offload={self.offload}: with attention={self.attention} the scores are never there to be copied; "
                "leave out scores, or set attention=xla."
            )
        if self.remat == "jax":
            raise SpecError(
                f"layout: remat=jax is plain autodiff, which saves what it likes, and offload={self.offload} names what to "
                "save in host memory; choose remat=none, selective or full."
            )
        if self.pipe > 1:
            raise SpecError(
                f"layout: with pipe={self.pipe} what a stage saves lies in slots, filled and read as a table says, and "
                f"offload={self.offload} takes a stack that one loop fills and the next reads; leave out pipe, or the "
                "activations."
            )

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
                "choose remat=none, selective or full."
            )

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Reads `data=8,tensor=4,zero=3,remat=full`. Raises SpecError on anything else."""
        known = {field.name: field for field in fields(cls)}
        values: dict[str, int | bool | str] = {}
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
            if "=" in value:
                raise SpecError(f"layout: {item.strip()!r} has two values; put a comma between them, as in data=8,zero=3.")
            if key in values:
                raise SpecError(f"layout: {key!r} is given twice in {text!r}; keep one of them.")
            if known[key].type == "int":
                # isdecimal also takes digits of other scripts, which int() reads too: insist on ASCII
                if not (value.isascii() and value.isdecimal()) or len(value) > 9:
                    raise SpecError(f"layout: {key}={value} is not a whole number below 10^9; write it like {key}=2.")
                values[key] = int(value)
                if key == "virtual" and not values[key]:
                    raise SpecError("layout: virtual=0 is not a number of chunks; choose 1 or more, or leave it out.")
            elif known[key].type == "bool":
                if value not in ("true", "false"):
                    raise SpecError(f"layout: {key}={value} is neither true nor false; write {key}=true, or leave it out.")
                values[key] = value == "true"
            else:
                values[key] = value
        return cls(**values)  # type: ignore[arg-type]

    @cached_property
    def saved(self) -> frozenset[str]:
        """Names of the activations of a block that are saved beside its input, on the device or in host memory, of whatever
        family it is; and with `attention`, where it goes block by block, the statistics that stand for its scores."""
        if self.remat == "full":
            names = activations.parse(self.save) if self.save else frozenset()
        else:
            names = frozenset(activations.NAMES) - ({"scores"} if self.remat == "selective" else set())
        names |= self.offloaded - {activations.INPUT}
        return names if self.attention == "xla" else self._with_statistics(names - {"scores"})

    @cached_property
    def offloaded(self) -> frozenset[str]:
        """Those of them that are saved in host memory, and `input`, where the block's input is."""
        names = activations.named(name for name in self._offload if name not in STATE)
        return names if self.attention == "xla" else self._with_statistics(names)

    def _with_statistics(self, names: frozenset[str]) -> frozenset[str]:
        statistics = self.attention == "blockwise" and "attention" in names
        return names | ({activations.STATISTICS} if statistics else set())

    @property
    def _offload(self) -> tuple[str, ...]:
        """The names in `offload`."""
        return () if self.offload == "none" else tuple(self.offload.split("+"))

    @property
    def state_on_host(self) -> bool:
        """Whether the optimizer's arrays and the master copy are in host memory."""
        return "optimizer" in self._offload

    @property
    def parameters_on_host(self) -> bool:
        """Whether parameters are."""
        return "parameters" in self._offload

    @property
    def cut(self) -> int:
        """Ways in which the residual stream is cut along the sequence."""
        return self.tensor if self.sequence else 1

    @property
    def ring(self) -> bool:
        """Whether keys and values go round a ring."""
        return self.context > 1 and self.exchange == "ring"

    @property
    def sequence_parts(self) -> int:
        """Parts of one size that a sequence has to divide into: those of its devices, and two of each in a ring."""
        return self.context * lcm(self.cut, 2 if self.ring else 1)

    @property
    def zero_ways(self) -> int:
        """Slices that ZeRO makes."""
        return self.data * self.context

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
            f"{field.name}={_written(getattr(self, field.name))}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(plain, field.name)
        ]
        return ",".join(parts) or "data=1"


def _written(value: int | bool | str) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
