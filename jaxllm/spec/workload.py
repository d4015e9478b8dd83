"""Workload: how much is trained on in a step, and in which precision."""

from __future__ import annotations

from dataclasses import dataclass

from jaxllm.spec.errors import SpecError, nearest
from jaxllm.spec.layout import Layout

OPTIMIZERS = ("adamw",)


@dataclass(frozen=True)
class Precision:
    """What is held and computed in which dtype, by HLO's names ("f32", "bf16")."""

    name: str
    parameters: str  # held between steps
    compute: str  # matmuls, activations, residuals; what ZeRO 3 gathers
    gradients: str  # reduced and accumulated
    master: bool  # the optimizer keeps an f32 copy of the parameters beside m and v

    def __str__(self) -> str:
        return self.name


PRECISIONS = {
    "f32": Precision("f32", "f32", "f32", "f32", master=False),
    # JAX's habit: bf16 compute over f32 parameters, f32 gradients and moments.
    "bf16-f32": Precision("bf16-f32", "f32", "bf16", "f32", master=False),
    # The ZeRO paper's and Megatron's 2 + 2 + 12 bytes a parameter.
    "bf16-master": Precision("bf16-master", "bf16", "bf16", "bf16", master=True),
}


@dataclass(frozen=True)
class Workload:
    """Batch is in sequences per step over all devices and microbatches, sequence in tokens.

    `gradient_dtype` is the dtype in which gradients are reduced and accumulated; left out, it is the
    precision's own: f32 for f32 and bf16-f32, bf16 for bf16-master.
    """

    batch: int
    sequence: int
    precision: str = "f32"
    optimizer: str = "adamw"
    gradient_dtype: str = ""

    def __post_init__(self) -> None:
        for name in ("batch", "sequence"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SpecError(f"workload: {name}={value} is not a whole number of 1 or more.")
        if self.precision not in tuple(PRECISIONS):
            raise SpecError(f"workload: unknown precision {self.precision!r}; {nearest(self.precision, PRECISIONS)}")
        if self.optimizer not in OPTIMIZERS:
            raise SpecError(f"workload: unknown optimizer {self.optimizer!r}; {nearest(self.optimizer, OPTIMIZERS)}")
        if self.gradient_dtype not in ("", "f32", "bf16"):
            raise SpecError(f"workload: gradients in {self.gradient_dtype!r} are not built; choose f32 or bf16.")

    @property
    def dtypes(self) -> Precision:
        """The precision, with the dtype of the gradients resolved."""
        base = PRECISIONS[self.precision]
        gradients = self.gradient_dtype or base.gradients
        return Precision(base.name, base.parameters, base.compute, gradients, base.master)

    def sequences_per_device(self, layout: Layout) -> int:
        """Sequences in one microbatch on one device: B / (replica x data x microbatches). Raises SpecError."""
        parts = layout.replica * layout.data * layout.microbatches
        if self.batch % parts:
            near = max(1, self.batch // parts) * parts
            raise SpecError(
                f"batch {self.batch} leaves no whole number of sequences for replica {layout.replica} x data "
                f"{layout.data} x microbatches {layout.microbatches} = {parts}; {near} would do."
            )
        return self.batch // parts
