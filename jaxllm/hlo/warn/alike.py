"""Which arrays are the same on all devices of a group: what follows from shardings of arguments, ids of devices and
collectives.

An array is taken to differ when anything that it is made from does, wherever that may be. So no answer depends on how
often a loop runs, and each instruction is looked at once.
"""

from __future__ import annotations

from jaxllm.hlo.collectives import kind_of
from jaxllm.hlo.graph import Instruction
from jaxllm.hlo.groups import Groups, groups_of, pairs_of
from jaxllm.hlo.warn.walk import DONE, Spot, Walk

_EQUALISE = ("all-reduce", "all-gather", "collective-broadcast")
_SPREAD = ("reduce-scatter", "all-to-all", "ragged-all-to-all")
_OWN = frozenset(("partition-id", "replica-id", "rng", "rng-get-and-update-state", "infeed", "recv"))
_ENOUGH = 20_000  # instructions that one question may look at


class Alike:
    """Answers whether arrays differ between the devices of any of the `groups`.

    gathered  whether what a collective made the same counts as the same; without it, only what every device makes alone
    """

    def __init__(self, walk: Walk, groups: Groups, *, gathered: bool = True) -> None:
        self.walk = walk
        self.groups = tuple(group for group in groups if len(group) > 1 and max(group) < walk.devices)
        self.gathered = gathered
        self.same: set[tuple[int, tuple[int, ...]]] = set()  # arrays that are known not to differ
        self.joined: dict[Groups, bool] = {}

    def differs(self, spot: Spot) -> bool:
        """Whether an array may differ; so it is, too, where that would take too long to tell."""
        seen: set[tuple[int, tuple[int, ...]]] = set()
        waiting = [spot]
        while waiting:
            here = waiting.pop()
            key = (here.instruction.id, here.index)
            if key in seen or key in self.same:
                continue
            seen.add(key)
            self.walk.left -= 1
            if len(seen) > _ENOUGH or self.walk.left < 0:
                return True
            made_from = self._made_from(here)
            if made_from is None:
                return True
            waiting += made_from
        self.same |= seen
        return False

    def _made_from(self, spot: Spot) -> list[Spot] | None:
        """What decides over an array; None when it differs by itself."""
        computation, instruction, index = spot
        opcode = instruction.opcode
        module = self.walk.module
        if opcode == "parameter":
            return self._given(spot)
        if opcode in _OWN:
            return None
        if opcode == "get-tuple-element":
            return [Spot(computation, computation.operand(instruction), (instruction.proto.tuple_index, *index))]
        if opcode == "tuple" and index:
            return [Spot(computation, computation.operand(instruction, index[0]), index[1:])]
        if opcode == "opt-barrier":
            return [Spot(computation, computation.operand(instruction), index)]
        if opcode == "while":
            body, _ = module.while_parts(instruction)
            return [Spot(computation, computation.operand(instruction), index), Spot(body, body.root, index)]
        if opcode in ("fusion", "call", "conditional", "async-start") and instruction.called_ids:
            inside = index if opcode != "async-start" else ()
            roots = [Spot(called, called.root, inside) for called in module.called(instruction)]
            return roots if opcode != "conditional" else [spot.operand(), *roots]
        if opcode == "custom-call" and instruction.proto.custom_call_target == DONE:
            return [operand for operand in spot.operands() if kind_of(operand.instruction)]
        kind = opcode.removesuffix("-start")
        if kind in _EQUALISE or kind in _SPREAD or kind == "collective-permute":
            self.walk.left -= self.walk.devices // 8
        if kind in _EQUALISE and self._joins(groups_of(instruction, self.walk.devices)):
            return [] if self.gathered else None
        if kind in _SPREAD and self._meets(groups_of(instruction, self.walk.devices)):
            return None
        if kind == "collective-permute" and not self._maps(
            {target: source for source, target in pairs_of(instruction)}
        ):
            return None
        return spot.operands()

    def _given(self, parameter: Spot) -> list[Spot] | None:
        computation, instruction, index = parameter
        if computation is self.walk.module.entry:
            return None if self._argument_differs(instruction) else []
        made_from = []
        for caller in self.walk.callers[computation.id]:
            number = instruction.proto.parameter_number
            if caller.opcode == "while":
                body, _ = self.walk.module.while_parts(caller.instruction)
                made_from += [Spot(*caller.operand()[:2], index), Spot(body, body.root, index)]
            elif caller.opcode == "conditional":
                branches = [at for at, id_ in enumerate(caller.instruction.called_ids) if id_ == computation.id]
                made_from += [Spot(*caller.operand(at + 1)[:2], index) for at in branches] + [caller.operand()]
            elif number < len(caller.instruction.operand_ids):
                made_from.append(Spot(*caller.operand(number)[:2], index))
            else:
                return None
        return made_from

    def _argument_differs(self, parameter: Instruction) -> bool:
        pieces = self.walk.pieces(parameter)
        self.walk.left -= self.walk.devices // 8
        return pieces is None or any(len({pieces[device] for device in group}) > 1 for group in self.groups)

    def _joins(self, groups: Groups) -> bool:
        """Whether each of our groups lies within one of these."""
        if groups not in self.joined:
            where = {device: number for number, group in enumerate(groups) for device in group}
            held = [{where.get(device) for device in group} for group in self.groups]
            self.joined[groups] = all(len(numbers) == 1 and None not in numbers for numbers in held)
        return self.joined[groups]

    def _meets(self, groups: Groups) -> bool:
        """Whether two devices of one of our groups are in one of these."""
        where = {device: number for number, group in enumerate(groups) for device in group}
        held = [[where.get(device) for device in group] for group in self.groups]
        return any(len(set(numbers)) < len(numbers) for numbers in held)

    def _maps(self, source_of: dict[int, int]) -> bool:
        """Whether all devices of each of our groups receive from one of our groups, or none of them anything."""
        where = {device: number for number, group in enumerate(self.groups) for device in group}
        return all(len({where.get(source_of.get(device, -1), -1) for device in group}) == 1 for group in self.groups)
