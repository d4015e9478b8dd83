"""FLOPs of a token, and the days that training takes: by the papers' rules of thumb, and from the exact count.

A rule counts 6 FLOPs for each parameter and token, 2 forward and 4 backward, and 8 where the forward pass is computed
again (Narayanan et al. 2021, equation 4). The exact count is that of the matmuls that are done: the embedding is looked
up and not multiplied, attention grows with the sequence, and recomputation leaves out the last matmul of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxllm.spec.errors import SpecError
from jaxllm.spec.layout import Layout
from jaxllm.spec.ledger import Term
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.validate import validate
from jaxllm.spec.workload import Workload
from jaxllm.theory.flops import lines
from jaxllm.theory.symbols import Symbols

SECONDS_A_DAY = 86_400
ATTENTION = ("scores", "attention")  # the two matmuls over the square of positions


@dataclass(frozen=True)
class Count:
    """FLOPs of a token in training, counted in one way.

    model       what the loss and its gradients need
    hardware    what is computed: recomputation as well
    """

    name: str
    model: int
    hardware: int


def flops_per_token(model: ModelConfig, sequence: int, *, causal: bool = False, remat: str = "none") -> int:
    """FLOPs of one token's forward and backward pass, and of its recomputation with remat="full" or "selective".

    Those of the matmuls, 2 for each multiply-add, attention and head included. `causal` counts of attention what a mask
    leaves: (T + 1)/2 of T positions in the mean. Raises SpecError where model, sequence and remat do not go together.
    """
    if remat == "jax":
        raise SpecError("remat=jax has no closed form to count with; choose remat=none, selective or full.")
    workload, layout = Workload(batch=1, sequence=sequence), Layout(remat=remat)
    validate(model, layout, 1, workload)
    terms = [term for line in lines(Symbols.of(model, layout, workload)) for term in line.terms]
    return sum(_of_a_token(term, sequence, causal) for term in terms)


def _of_a_token(term: Term, sequence: int, causal: bool) -> int:
    each = int(term.value) // sequence
    # A token's row of the square has T entries of 2 N H FLOPs; T + 1 is even or 2 N H is: nothing is rounded.
    return each // sequence * (sequence + 1) // 2 if causal and term.label in ATTENTION else each


def counts(model: ModelConfig, sequence: int, remat: str) -> tuple[Count, ...]:
    """The rule of thumb, the exact count, and that of causal attention."""
    rule, again = 6 * model.parameters, 2 * model.parameters if remat == "full" else 0
    found = [Count("6 P" if not again else "8 P", rule, rule + again)]
    for name, causal in (("exact", False), ("exact, causal", True)):
        of = [flops_per_token(model, sequence, causal=causal, remat=way) for way in ("none", remat)]
        found.append(Count(name, *of))
    return tuple(found)


def training_days(flops_per_token: float, tokens: float, devices: int, rate: float) -> float:
    """Days for so many tokens on `devices` that each do `rate` FLOP/s: 6TP/(nX) and 8TP/(nX) with 6P and 8P a token.

    Narayanan et al. 2021, section 5.1, equation 4. Raises SpecError for a value that is not above 0.
    """
    given = {"flops_per_token": flops_per_token, "tokens": tokens, "devices": devices, "rate": rate}
    for name, value in given.items():
        if not value > 0:
            raise SpecError(f"training_days: {name}={value} is not above 0; give what a training run has of it.")
    return flops_per_token * tokens / (devices * rate) / SECONDS_A_DAY
