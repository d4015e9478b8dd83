"""Which layouts there are: all that the nouns' own rules allow, as open grids that formulas are spread over.

A block has one number of stages and one exchange. Its axes are rows (degrees of the mesh axes
and microbatches), schedules, ZeRO stages, what of the state is in host memory, and what of the activations is kept: each
formula is computed over the axes that it depends on, and spread over the others at the end.

Of layouts that are the same program one stands for all: without slices zero=1 to 3 are zero=0; without ZeRO replica is data;
and without scores remat=selective is remat=none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

import numpy as np

from jaxllm import schedules
from jaxllm.plan.conditions import INPUT_AWAY, REMATS, SAVES, STATES, Condition, allowed
from jaxllm.schedules.named import registry
from jaxllm.spec import attention
from jaxllm.spec.errors import SpecError, TargetError
from jaxllm.spec.layout import EXCHANGES, Layout
from jaxllm.spec.machine import Mesh
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.validate import validate_attention, validate_fp8, validate_offload, validate_target, validate_tensor
from jaxllm.spec.workload import Workload

ROWS, SCHEDULES, ZEROS, STATE, KEPT, STAGE = range(6)  # axes of a block's arrays
COLUMNS = ("replica", "data", "context", "tensor", "sequence", "microbatches")
PLACEMENTS = {"zb-v": "v", "dualpipev": "v"}  # of schedules; of all others ring
MOST_CELLS = 1_500_000  # of a block, so that its arrays stay small


@dataclass(frozen=True)
class Kept:
    """What of a block's activations is kept, and where."""

    attention: str
    remat: str
    save: str = "none"
    away: bool = False  # each block's input in host memory


@dataclass(frozen=True)
class Block:
    """Layouts on an open grid.

    rows       a column of one entry a row for each name in COLUMNS
    schedules  (name, chunks) of each; without a pipeline one without a name
    allowed    whether a layout is one, spread over all axes
    """

    pipe: int
    exchange: str
    rows: dict[str, np.ndarray]
    schedules: tuple[tuple[str, int], ...]
    zeros: tuple[int, ...]
    states: tuple[str, ...]
    kept: tuple[Kept, ...]
    allowed: Any = True

    @property
    def placements(self) -> tuple[str, ...]:
        """How each schedule lays the parts of the model on the stages."""
        return tuple(PLACEMENTS.get(name, "ring") for name, _ in self.schedules)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows["data"]), len(self.schedules), len(self.zeros), len(self.states), len(self.kept))

    def column(self, name: str) -> np.ndarray:
        """A column of the rows, to be spread over the other axes."""
        return along(ROWS, self.rows[name])

    def layout(self, index: tuple[int, ...]) -> Layout:
        """The layout at a place of the grid."""
        row, schedule, zero, state, kept = map(int, index)
        columns = {name: self.rows[name][row].item() for name in COLUMNS}
        name, chunks = self.schedules[schedule]
        own = self.kept[kept]
        return Layout(
            pipe=self.pipe,
            **columns,
            zero=self.zeros[zero],
            remat=own.remat,
            save="" if own.save == "none" else own.save,
            offload=offload(self.states[state], own),
            attention=own.attention,
            exchange=self.exchange if columns["context"] > 1 else "ring",
            schedule=name,
            virtual=chunks if name and registry()[name].chunks[1] is None else 0,
        )


def along(axis: int, values: Any) -> np.ndarray:
    """Values along one axis of a block, stages included."""
    shape = [1] * 6
    shape[axis] = -1
    return np.asarray(values).reshape(shape)


def offload(state: str, kept: Kept) -> str:
    """The layout's word for what is in host memory."""
    names = ([] if state == "none" else [state]) + [INPUT_AWAY] * kept.away
    return "+".join(names) or "none"


@dataclass(frozen=True)
class Space:
    """What is searched: the nouns, what a user demands, and the values that the nouns' rules leave of each choice.

    refused  (name, value) -> the sentence that refuses it
    """

    model: ModelConfig
    mesh: Mesh
    workload: Workload
    conditions: tuple[Condition, ...]
    tensors: tuple[int, ...]
    states: tuple[str, ...]
    kept: tuple[Kept, ...]
    refused: dict[tuple[str, Any], str]

    @classmethod
    def of(cls, model: ModelConfig, mesh: Mesh, workload: Workload, conditions: tuple[Condition, ...] = ()) -> Space:
        """The space of layouts for these nouns."""
        refused: dict[tuple[str, Any], str] = {}

        def possible(name: str, value: Any, *checks: Callable[[], Any]) -> bool:
            try:
                for check in checks:
                    check()
            except (SpecError, TargetError) as error:
                refused[name, value] = str(error)
                return False
            return True

        def tensor(value: int) -> bool:
            layout = Layout(tensor=value)
            return possible(
                "tensor", value, lambda: validate_tensor(model, layout), lambda: validate_fp8(model, layout, workload)
            )

        def host(text: str) -> bool:
            layout = Layout(offload=text, zero=3, remat="full")
            if text != "none" and "links.host" not in mesh.machine.figures:
                refused["offload", text] = f"{mesh.machine.name} has no figure links.host, over which it would be copied."
                return False
            return possible(
                "offload", text, lambda: validate_offload(layout, workload), lambda: validate_target(mesh.target, layout, workload)
            )

        def kernel(kind: str) -> bool:
            layout = Layout(attention=kind)
            return possible(
                "attention", kind, lambda: validate_attention(layout), lambda: validate_target(mesh.target, layout, workload)
            )

        away = (False, True) if host(INPUT_AWAY) else (False,)
        return cls(
            model,
            mesh,
            workload,
            conditions,
            tensors=tuple(filter(tensor, divisors(mesh.devices))),
            states=tuple(filter(host, STATES)),
            kept=tuple(
                Kept(kind, remat, save, on_host)
                for kind in filter(kernel, attention.KINDS)
                for remat in REMATS
                if remat != "selective" or kind == "xla"
                for save in SAVES
                if save == "none" or remat == "full"
                for on_host in away
                if not on_host or remat == "full"
            ),
            refused=refused,
        )

    def allows(self, name: str, value: Any) -> bool:
        return allowed(self.conditions, name, value)

    def free(self, *names: str) -> bool:
        """Whether nothing is demanded of these."""
        return not any(condition.name in names for condition in self.conditions)

    def blocks(self) -> Iterator[Block]:
        """All layouts, block by block."""
        for pipe in divisors(self.mesh.devices):
            if pipe > self.model.layers or not self.allows("pipe", pipe):
                continue
            if pipe > 1 and self.workload.dtypes.fp8:
                continue  # validate_fp8
            for exchange in EXCHANGES:
                if exchange == "ring" and pipe > 1:
                    continue  # Layout._check_context
                rows = self._rows(pipe, exchange)
                named = self._schedules(pipe)
                if rows is not None and named:
                    yield from self._parts(pipe, exchange, named, rows)

    def _rows(self, pipe: int, exchange: str) -> dict[str, np.ndarray] | None:
        """Degrees and microbatches that fill the mesh and divide what they share out; of exchange=ring only those with a
        ring."""
        found: list[tuple[int, ...]] = []
        devices, batch, sequence = self.mesh.devices // pipe, self.workload.batch, self.workload.sequence
        ring = exchange == "ring"
        for tensor in self.tensors:
            if devices % tensor or not self.allows("tensor", tensor):
                continue
            for context in divisors(devices // tensor):
                ranks = devices // tensor // context
                if batch % ranks or (ring and context == 1) or not self._shares(tensor, context, exchange):
                    continue
                cuts = [
                    cut
                    for cut in (False, True)
                    if (tensor > 1 or not cut)
                    and self.allows("sequence", cut)
                    and sequence % (context * lcm(tensor if cut else 1, 2 if ring else 1)) == 0
                ]
                parts = [count for count in divisors(batch // ranks) if self.allows("microbatches", count)]
                found += [
                    (replica, ranks // replica, context, tensor, cut, microbatches)
                    for replica in divisors(ranks)
                    if self.allows("replica", replica) and self.allows("data", ranks // replica)
                    for cut in cuts
                    for microbatches in parts
                ]
        if not found:
            return None
        return dict(zip(COLUMNS, map(np.array, zip(*found, strict=True)), strict=True))

    def _shares(self, tensor: int, context: int, exchange: str) -> bool:
        """Whether so many devices can share out what a tensor rank has of a sequence: its tokens in a ring, or its heads."""
        if not self.allows("context", context):
            return False
        if context == 1:
            return True
        if not self.allows("exchange", exchange):
            return False
        heads = self.model.heads // tensor, max(1, self.model.kv_heads // tensor)
        return exchange == "ring" or not any(count % context for count in heads)  # validate_context

    def _schedules(self, pipe: int) -> list[tuple[str, int]]:
        """(name, chunks) of the schedules of so many stages."""
        if pipe == 1:
            return [("", 1)] if self.free("schedule") and self.allows("virtual", 1) else []
        found = []
        layers = self.model.layers
        for name, named in registry().items():
            if not self.allows("schedule", name):
                continue
            least, most = named.chunks
            for chunks in range(least, (most or layers // pipe) + 1):
                parts = pipe * chunks
                even = name not in PLACEMENTS and chunks > 1
                if parts > min(layers, schedules.MOST_PARTS) or (even and layers % parts) or not self.allows("virtual", chunks):
                    continue
                found.append((name, chunks))
        return found

    def _parts(
        self, pipe: int, exchange: str, named: list[tuple[str, int]], rows: dict[str, np.ndarray]
    ) -> Iterator[Block]:
        """The block of these rows and schedules, in parts that are not too large."""
        staged = pipe > 1
        whole = Block(
            pipe, exchange, rows, tuple(named),
            zeros=tuple(zero for zero in range(4) if self.allows("zero", zero)),
            states=tuple(state for state in self.states if not staged or "parameters" not in state),  # Layout._check_offload
            kept=tuple(
                own
                for own in self.kept
                if not (staged and own.away)  # Layout._check_offloaded_activations
                and (exchange != "ring" or own.attention == "blockwise")  # Layout._check_context
                and self.allows("attention", own.attention)
                and self.allows("remat", own.remat)
                and self.allows("save", own.save)
            ),
        )  # fmt: skip
        if 0 in whole.shape:
            return
        size = max(1, MOST_CELLS // int(np.prod(whole.shape[1:])))
        for start in range(0, whole.shape[0], size):
            block = replace(whole, rows={name: column[start : start + size] for name, column in rows.items()})
            yield replace(block, allowed=np.broadcast_to(self._allowed(block), block.shape))

    def _allowed(self, block: Block) -> Any:
        """Which places of the grid are layouts, and no other's double."""
        column = {name: block.column(name)[..., 0] for name in COLUMNS}
        zero = along(ZEROS, block.zeros)[..., 0]
        found: Any = np.array(
            [[self.allows("offload", offload(state, kept)) for kept in block.kept] for state in block.states]
        ).reshape(1, 1, 1, len(block.states), len(block.kept))
        all_away = along(STATE, ["parameters" in state for state in block.states])[..., 0]
        found = found & ~(all_away & ((zero == 1) | (zero == 2)))  # Layout._check_offload
        if 0 in block.zeros:
            found = found & ((zero == 0) | (column["data"] * column["context"] > 1) | (not self.free("zero")))
        if self.free("replica", "data"):
            found = found & ((zero > 0) | (column["replica"] == 1))
        if block.pipe > 1:
            found = found & self._runs(block, column["microbatches"])
        return found

    @staticmethod
    def _runs(block: Block, microbatches: np.ndarray) -> np.ndarray:
        """Which schedules can have so many microbatches."""
        each = []
        for name, chunks in block.schedules:
            cells = 3 * block.pipe * chunks * microbatches
            each.append((cells <= schedules.MOST_CELLS) & ((microbatches >= block.pipe) | (not registry()[name].fills)))
        return np.concatenate(each, axis=SCHEDULES)


def divisors(number: int) -> list[int]:
    """All divisors, from 1 on."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
