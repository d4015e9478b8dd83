"""What an array in memory is for: parameter, optimizer, gradient, residual, gathered weight, logits, activation.

Arguments are told by their names, what a step makes by its phase, by who reads it, and by its shape. Of a program that
says nothing of itself, arguments stay `argument` and arrays `temporary`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from jaxllm.hlo.graph import PASSES, Computation, Instruction, Module, Shape
from jaxllm.hlo.lifetimes import Lifetimes, sequential
from jaxllm.hlo.loops import Executions
from jaxllm.hlo.phases import phase_of

_NAMES = (
    ("optimizer", re.compile(r"opt|adam|moment|\bmu\b|\bnu\b|[.'](m|v)\b|\bmaster\b|\bema\b|\btrace\b", re.I)),
    ("gradient", re.compile(r"grad|accum", re.I)),
    ("parameter", re.compile(r"param|weight|kernel|\bmodel\b|variables|embed|\bbias\b|\btheta\b|\b[wWbu]\d*\b")),
)
_STATE = re.compile(r"\bstates?\b")
_LOGITS = re.compile(r"logits|log_softmax|logsumexp|cross_entropy|unembed|lm_head")

_MOVES = PASSES | {"dynamic-slice", "slice", "transpose", "broadcast"}  # a weight on its way to where it is gathered
_REDUCTIONS = ("reduce-scatter", "all-reduce")
_MULTIPLIES = frozenset(("dot", "convolution", "ragged-dot", "custom-call"))
_FORWARD, _BACKWARD = frozenset(("forward",)), frozenset(("backward", "recompute"))


def argument_kind(name: str) -> str:
    """The class of an argument by its name, as `state.opt_state[0].mu['w']`: what is named first counts, so that a `v` of
    the parameters is none of Adam's. A state that says no more holds parameters."""
    found = [(match.start(), kind) for kind, pattern in _NAMES if (match := pattern.search(name))]
    if found:
        return min(found)[1]
    return "parameter" if _STATE.search(name) else "argument"


@dataclass
class _Facts:
    """What is known of one piece of memory, from all that write and read it."""

    made: set[str] = field(default_factory=set)  # phases
    read: set[str] = field(default_factory=set)
    logits: bool = False
    gathered: bool = False
    reduced: bool = False  # over devices, in the backward pass, to the shape of a parameter


@dataclass(frozen=True)
class Classes:
    """Looks up the class of a piece of memory, by the array that stands for it (Lifetimes.of)."""

    facts: dict[int, _Facts]
    parameters: frozenset[tuple[int, ...]]  # dims of parameters, and of one layer of those that are stacked
    vocabulary: int  # the last dim of the largest array of logits; 0 when there is none
    inference: bool  # nothing is differentiated: all of it is a forward pass

    def of(self, memory: int, shape: Shape) -> str:
        facts = self.facts.get(memory)
        if facts is None:
            return "temporary"
        if facts.gathered:
            return "gathered weight"
        real = shape.dtype.startswith(("f", "bf", "c")) and len(shape.dims) > 0
        if real and facts.logits and self.vocabulary and self.vocabulary in shape.dims:
            return "logits"
        if facts.made & _FORWARD and facts.read & _BACKWARD:
            return "residual"
        if real and facts.made & _BACKWARD and shape.dims in self.parameters:
            return "gradient"
        if real and facts.reduced:
            return "gradient"
        return "activation" if real and (self.inference or facts.made & (_FORWARD | _BACKWARD)) else "temporary"


def classes(module: Module, runs: Executions, lives: Lifetimes) -> Classes:
    """Gathers what is known of every piece of memory of a scheduled module."""
    facts: dict[int, _Facts] = {}
    logits: list[Shape] = []
    weights = _Weights(module)
    parameters = _parameter_dims(module)

    def memory(instruction: Instruction) -> list[int]:
        if instruction.id not in lives.base:
            return []
        return [lives.memory(instruction.id, leaf) for leaf in range(len(instruction.shape.leaves))]

    phases: dict[int, str] = {}
    for computation, instruction in lives.order:
        if instruction.opcode in ("tuple", "get-tuple-element", "parameter", "bitcast", "constant"):
            phases[instruction.id] = _handed_on(instruction, phases)
            continue
        contexts = runs.of(computation)
        op_name = contexts[0].op_name(instruction) if contexts else instruction.op_name
        phase = phases[instruction.id] = phase_of(op_name) or _handed_on(instruction, phases)
        told = bool(_LOGITS.search(op_name))
        gathers = instruction.opcode.startswith("all-gather") and weights.is_weight(computation, instruction)
        loop = instruction.opcode in ("while", "conditional", "call")
        for node in memory(instruction):
            fact = facts.setdefault(node, _Facts())
            if phase and not loop:
                fact.made.add(phase)
            fact.logits |= told and not loop
            fact.gathered |= gathers
        if told and not loop:
            logits += [leaf for leaf in instruction.shape.leaves if len(leaf.dims) > 1]
        reduces = phase in _BACKWARD and instruction.opcode.startswith(_REDUCTIONS) and any(
            leaf.dims in parameters for leaf in instruction.shape.leaves
        )
        for operand in computation.operands(instruction):
            for node in memory(operand):
                fact = facts.setdefault(node, _Facts())
                fact.reduced |= reduces
                if phase and not (loop and instruction.opcode != "while"):
                    fact.read.add(phase)
                if told and not loop:
                    fact.logits = True
                    logits += [leaf for leaf in operand.shape.leaves if len(leaf.dims) > 1]
    largest = max(logits, key=lambda shape: shape.size, default=None)
    # without marks of autodiff, what multiplies is a forward pass; what does not, an update perhaps
    multiplies = bool(_MULTIPLIES & module.by_opcode.keys())
    inference = multiplies and not any(fact.made for fact in facts.values())
    return Classes(facts, parameters, largest.dims[-1] if largest else 0, inference)


def _handed_on(instruction: Instruction, phases: dict[int, str]) -> str:
    """The phase of what a compiler made without a name, as a conversion: that of the first operand that has one."""
    if instruction.op_name:
        return ""
    return next((phase for operand in instruction.operand_ids if (phase := phases.get(operand))), "")


def _parameter_dims(module: Module) -> frozenset[tuple[int, ...]]:
    dims = set()
    for parameter in module.entry.parameters.values():
        if argument_kind(parameter.op_name) == "parameter":
            for leaf in parameter.shape.leaves:
                dims |= {leaf.dims, leaf.dims[1:]}
    return frozenset(dims - {()})


class _Weights:
    """Tells whether an array is a weight on its way: an argument of class parameter, moved, cast or sliced."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.callers: dict[int, tuple[Computation, Instruction]] = {}
        for computation in module.computations.values():
            for instruction in computation.instructions:
                for called in sequential(module, instruction):
                    self.callers.setdefault(called.id, (computation, instruction))

    def is_weight(self, computation: Computation, gather: Instruction) -> bool:
        if gather.opcode.endswith("-done") or not gather.operand_ids:
            return False
        return any(self._from_parameter(computation, operand) for operand in computation.operands(gather))

    def _from_parameter(self, computation: Computation, instruction: Instruction) -> bool:
        index: tuple[int, ...] = ()
        for _ in range(64):  # as deep as loops nest, with some copies on the way
            opcode = instruction.opcode
            if opcode == "parameter":
                if computation is self.module.entry:
                    return argument_kind(instruction.op_name) == "parameter"
                caller = self.callers.get(computation.id)
                if caller is None:
                    return False
                number = instruction.proto.parameter_number
                computation, calls = caller
                position = number + 1 if calls.opcode == "conditional" else number
                if position >= len(calls.operand_ids):
                    return False
                instruction = computation.operand(calls, position)
            elif opcode == "get-tuple-element":
                index = (instruction.proto.tuple_index, *index)
                instruction = computation.operand(instruction)
            elif opcode == "tuple" and index and index[0] < len(instruction.operand_ids):
                instruction, index = computation.operand(instruction, index[0]), index[1:]
            elif opcode == "while":
                instruction = computation.operand(instruction)
            elif opcode in _MOVES and instruction.operand_ids:
                instruction = computation.operand(instruction)
            elif opcode == "fusion" and instruction.operand_ids and not index:
                operands = computation.operands(instruction)
                instruction = max(operands, key=lambda operand: operand.shape.bytes)
            else:
                return False
        return False
