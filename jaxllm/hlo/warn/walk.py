"""Following an array through a module: who makes it and who reads it, past what only hands it on and into fusions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from math import prod
from typing import NamedTuple

from jaxllm.hlo.collectives import chain_of, kind_of
from jaxllm.hlo.graph import PASSES, Computation, Instruction, Module, Shape
from jaxllm.hlo.view import View
from jaxllm.hlo.warn.shardings import Pieces, pieces_of

# A collective of less costs its latency whatever it carries: at 100 GB/s it is sent in 10 us.
TRAFFIC = 2**20
# An array of less is below a thousandth of a device's memory, which begins at 16 GiB.
MEMORY = 2**24

HANDED_ON = PASSES | {"transpose", "copy-done", "async-update"}
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_LISTED = frozenset((*_COLLECTIVES, *(f"{opcode}-start" for opcode in _COLLECTIVES))) | {
    "while", "conditional", "copy", "dot", "convolution"
}  # fmt: skip
_RUN_AS_ONE = ("fusion", "call", "async-start")  # what runs a computation once, its operands the parameters
_START, DONE = "AsyncCollectiveStart", "AsyncCollectiveDone"  # custom calls of XLA:TPU around a collective in a fusion
_ENOUGH = 512  # steps after which following one array stops: compilers need a few dozen
_ALL = 2_000_000  # steps for all arrays together, some seconds: no module of a compiler comes near


class Spot(NamedTuple):
    """An instruction in its computation, and which array of its result is meant, as an index into nested tuples."""

    computation: Computation
    instruction: Instruction
    index: tuple[int, ...] = ()

    @property
    def opcode(self) -> str:
        return self.instruction.opcode

    @property
    def shape(self) -> Shape:
        return self.instruction.shape.at(self.index)

    def operand(self, position: int = 0) -> Spot:
        return Spot(self.computation, self.computation.operand(self.instruction, position))

    def operands(self) -> list[Spot]:
        return [Spot(self.computation, operand) for operand in self.computation.operands(self.instruction)]


class Walk:
    """A view with the instructions that finders begin with by opcode, and the callers of its computations, looked up
    once for all of them."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.by_opcode: dict[str, list[Spot]] = defaultdict(list)
        self.callers: dict[int, list[Spot]] = defaultdict(list)
        self.left = _ALL
        self._orders: dict[int, tuple[dict[int, int], list[int]]] = {}
        self._readers: dict[tuple, list[Spot]] = {}
        self._pieces: dict[bytes, Pieces | None] = {}
        self.begun: dict[int, Spot] = {}
        self._places: dict[int, dict[int, list[int]]] = {}
        for computation, instruction in view.module.instructions():
            if instruction.opcode in _LISTED:
                self.by_opcode[instruction.opcode].append(Spot(computation, instruction))
            for called in instruction.called_ids:
                self.callers[called].append(Spot(computation, instruction))

    @property
    def module(self) -> Module:
        return self.view.module

    @property
    def devices(self) -> int:
        return self.module.devices or prod(self.view.axes.values())

    @cached_property
    def by_name(self) -> dict[str, Spot]:
        return {
            instruction.name: Spot(computation, instruction) for computation, instruction in self.module.instructions()
        }

    def collectives(self, *kinds: str) -> Iterator[tuple[Spot, str]]:
        """Collectives of some kinds, with their kind: starts of asynchronous ones too, each once. A reduce-scatter of
        XLA:TPU is an all-reduce in a fusion of that name. Of a collective that it spreads over fusions, the one in the
        last of them stands, and the one in the first is what it `begins` with."""
        chains: dict[tuple[str, str], dict[str, Spot]] = {}
        for opcode in _COLLECTIVES:
            for spot in (*self.by_opcode[opcode], *self.by_opcode[f"{opcode}-start"]):
                scatters = "all-reduce-scatter" in spot.computation.name
                kind = "reduce-scatter" if scatters else kind_of(spot.instruction)
                if kind not in kinds or not self.count(spot):
                    continue
                chain = chain_of(spot.computation, spot.instruction)
                if not chain:
                    yield spot, kind
                    continue
                for user in spot.computation.users.get(spot.instruction.id, ()):
                    chains.setdefault((chain, kind), {})[user.proto.custom_call_target] = spot
        for (_, kind), parts in chains.items():
            if DONE in parts and _START in parts:
                self.begun[parts[DONE].instruction.id] = parts[_START]
                yield parts[DONE], kind

    def operands(self, collective: Spot) -> list[Spot]:
        """What a collective sends."""
        return self.begun.get(collective.instruction.id, collective).operands()

    def pieces(self, argument: Instruction) -> Pieces | None:
        """Of each device, which piece of an argument of the program it holds; None when nothing tells.

        Its sharding stands with the parameter, or since jax 0.12 beside the module; a text has none any more.
        """
        shardings, number = self.module.shardings, argument.proto.parameter_number
        if number >= len(shardings) and not argument.proto.HasField("sharding"):
            return None
        sharding = shardings[number] if number < len(shardings) else argument.proto.sharding
        key = sharding.SerializeToString()
        if key not in self._pieces:
            self.left -= self.devices
            self._pieces[key] = pieces_of(sharding, self.devices) if self.left > 0 else None
        return self._pieces[key]

    def order(self, computation: Computation) -> tuple[dict[int, int], list[int]]:
        """The place of each instruction of a computation, and the places of its loops."""
        if computation.id not in self._orders:
            places = {instruction.id: place for place, instruction in enumerate(computation.instructions)}
            loops = [place for place, i in enumerate(computation.instructions) if i.opcode == "while"]
            self._orders[computation.id] = places, loops
        return self._orders[computation.id]

    def count(self, spot: Spot) -> int:
        """How often an instruction runs in a step; 0 for one that never does."""
        return sum(context.count for context in self.view.runs.of(spot.computation))

    def op_name(self, spot: Spot) -> str:
        contexts = self.view.runs.of(spot.computation)
        return contexts[0].op_name(spot.instruction) if contexts else spot.instruction.op_name

    def caller(self, computation: Computation) -> Spot | None:
        """What runs a computation, when one instruction alone does."""
        callers = self.callers[computation.id]
        return callers[0] if len(callers) == 1 else None

    def path(self, spot: Spot, passes: frozenset[str] = HANDED_ON) -> Iterator[Spot]:
        """An array, and what it was before each step that only hands it on. The last one makes it: never a fusion, but
        what is in it; of an asynchronous collective its start, with the place of the array in the result of its end."""
        computation, instruction, index = spot
        for _ in range(min(_ENOUGH, max(1, self.left))):
            self.left -= 1
            yield Spot(computation, instruction, index)
            opcode = instruction.opcode
            if opcode == "get-tuple-element":
                index = (instruction.proto.tuple_index, *index)
                instruction = computation.operand(instruction)
            elif opcode == "tuple" and index:
                instruction, index = computation.operand(instruction, index[0]), index[1:]
            elif opcode in ("fusion", "call") and instruction.called_ids:
                computation = self.module.called(instruction)[0]
                instruction = computation.root
            elif opcode == "async-done" and computation.operand(instruction).called_ids:
                computation = self.module.called(computation.operand(instruction))[0]
                instruction = computation.root
            elif (opcode in passes or opcode.endswith("-done")) and instruction.operand_ids:
                instruction = computation.operand(instruction)
            elif opcode == "custom-call" and instruction.proto.custom_call_target == DONE:
                sent = [operand for operand in computation.operands(instruction) if kind_of(operand)]
                if not sent:
                    return
                instruction = sent[0]
            elif opcode == "parameter":
                outside = self.argument(Spot(computation, instruction))
                if outside is None:
                    return
                computation, instruction, _ = outside
            else:
                return

    def origin(self, spot: Spot, passes: frozenset[str] = HANDED_ON) -> Spot:
        """The instruction that makes an array: the end of its path."""
        *_, last = self.path(spot, passes)
        return last

    def argument(self, parameter: Spot) -> Spot | None:
        """What a fusion or a function got for its parameter; None for a parameter of anything else."""
        caller = self.caller(parameter.computation)
        number = parameter.instruction.proto.parameter_number
        if caller is None or caller.opcode not in _RUN_AS_ONE or number >= len(caller.instruction.operand_ids):
            return None
        return caller.operand(number)

    def readers(self, spot: Spot, passes: frozenset[str] = HANDED_ON, *, loops: bool = False) -> list[Spot]:
        """Who computes on an array. A conditional, a loop or the result of a computation that takes it is a reader too,
        with the place that it takes there as its index; with `loops`, who reads it in the loop's body is one instead.
        Where there are too many to look at, the array itself stands among them."""
        key = (spot.instruction.id, spot.index, passes, loops)
        if key not in self._readers:
            self._readers[key] = self._find_readers(spot, passes, loops)
        return self._readers[key]

    def _find_readers(self, spot: Spot, passes: frozenset[str], loops: bool) -> list[Spot]:
        found, waiting, seen = [], [spot], set()
        while waiting:
            here = waiting.pop()
            computation, instruction, index = here
            if (instruction.id, index) in seen:
                continue
            seen.add((instruction.id, index))
            self.left -= 1
            if max(len(seen), len(found)) > _ENOUGH or self.left < 0:
                return [spot]
            if instruction.id == computation.root_id:
                caller = self.caller(computation)
                if caller is not None and caller.opcode in _RUN_AS_ONE:
                    waiting.append(Spot(caller.computation, caller.instruction, index))
                elif not loops or caller is None or caller.opcode != "while":
                    found.append(here)
            for user in computation.users.get(instruction.id, ()):
                opcode = user.opcode
                if opcode == "get-tuple-element":
                    if not index or index[0] == user.proto.tuple_index:
                        waiting.append(Spot(computation, user, index[1:]))
                elif (
                    opcode in passes
                    or opcode.endswith("-done")
                    or (opcode == "custom-call" and user.proto.custom_call_target == DONE)
                ):
                    waiting.append(Spot(computation, user, index if user.shape.dtype == "tuple" else ()))
                elif opcode == "tuple":
                    waiting += [Spot(computation, user, (at, *index)) for at in self._positions(user, instruction)]
                elif (opcode in _RUN_AS_ONE and user.called_ids) or (loops and self.keeps(user, index)):
                    inside = self.module.called(user)[0]
                    numbers = [number for number in self._positions(user, instruction) if number in inside.parameters]
                    waiting += [Spot(inside, inside.parameters[number], index) for number in numbers]
                else:
                    found.append(Spot(computation, user, index))
        return found

    def _positions(self, user: Instruction, operand: Instruction) -> list[int]:
        """At which places an instruction takes an operand."""
        if user.id not in self._places:
            places = self._places[user.id] = {}
            for position, id_ in enumerate(user.operand_ids):
                places.setdefault(id_, []).append(position)
        return self._places[user.id].get(operand.id, [])

    def keeps(self, loop: Instruction, index: tuple[int, ...]) -> bool:
        """Whether an instruction is a loop that hands what stands at an index of its state on as it got it."""
        if loop.opcode != "while" or not index:
            return False
        body = self.module.called(loop)[0]
        end = self.origin(Spot(body, body.root, index))
        return end.computation is body and end.opcode == "parameter" and end.index == index

    def outside(self, parameter: Spot) -> Spot | None:
        """What a parameter stands for: what a fusion or a function got, or what a loop began with and hands on
        unchanged."""
        argument = self.argument(parameter)
        loop = self.caller(parameter.computation)
        if argument is not None or loop is None or not self.keeps(loop.instruction, parameter.index):
            return argument
        return Spot(*loop.operand()[:2], parameter.index)

    def by_device(self, slice_: Spot) -> bool:
        """Whether a dynamic-slice takes another part on each device: an index of it is computed from the device's
        id."""
        if slice_.opcode != "dynamic-slice":
            return False
        waiting, seen = slice_.operands()[1:], set()
        while waiting and len(seen) < _ENOUGH and self.left > 0:
            spot = self.origin(waiting.pop())
            if spot.opcode in ("partition-id", "replica-id"):
                return True
            if (spot.instruction.id, spot.index) in seen:
                continue
            seen.add((spot.instruction.id, spot.index))
            outside = self.outside(spot) if spot.opcode == "parameter" else None
            waiting += [outside] if outside is not None else spot.operands()
        return False

    def source(self, spot: Spot) -> str:
        """The user's line of an instruction; of one that a compiler made without saying from what, that of what is in
        it, of what it takes, or of who reads it."""
        here = spot
        for _ in range(8):
            source = self.module.source(here.instruction)
            if not source and here.opcode == "fusion" and here.instruction.called_ids:
                source = self.module.source(self.module.called(here.instruction)[0].root)
            if source:
                return source
            outside = self.argument(here) if here.opcode == "parameter" else None
            if outside is None and not here.instruction.operand_ids:
                break
            here = outside or here.operand()
        readers = list(self.readers(spot))
        for reader in [reader for reader in readers if reader.opcode == "while" and reader.index]:
            body = self.module.called(reader.instruction)[0]
            readers += self.readers(Spot(body, body.parameters[0], reader.index))
        return next(filter(None, (self.module.source(reader.instruction) for reader in readers)), "")


def times(count: int) -> str:
    """`, 32 times a step`, or nothing for once."""
    return f", {count:,} times a step" if count > 1 else ""


def listed(names: list[str]) -> str:
    """The first three, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
