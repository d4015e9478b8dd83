"""Workload: how much is trained on in a step, and in which precision."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxllm.spec.errors import SpecError, nearest
from jaxllm.spec.layout import Layout
from jaxllm.spec.optimizers import OPTIMIZERS, Optimizer


@dataclass(frozen=True)
class Precision:
    """What is held and computed in which dtype, by HLO's names ("f32", "bf16", "f16")."""

    name: str
    parameters: str  # held between steps
    compute: str  # matmuls, activations, residuals; what ZeRO 3 gathers
    gradients: str  # reduced and accumulated
    master: bool  # the optimizer keeps an f32 copy of the parameters beside its own arrays
    state: str = "f32"  # of the optimizer's own arrays
    # The loss is scaled so that its gradients stay in f16's range: by a factor that grows while all of them are finite, and
    # shrinks when one is not; then the step changes nothing.
    scaled: bool = False
    # The products of the blocks multiply two arrays of 8 bits, see spec.fp8.
    fp8: bool = False

    def __str__(self) -> str:
        return self.name


PRECISIONS = {
    "f32": Precision("f32", "f32", "f32", "f32", master=False),
    # JAX's habit: bf16 compute over f32 parameters, f32 gradients and moments.
    "bf16-f32": Precision("bf16-f32", "f32", "bf16", "f32", master=False),
    # The ZeRO paper's and Megatron's 2 + 2 + 12 bytes a parameter.
    "bf16-master": Precision("bf16-master", "bf16", "bf16", "bf16", master=True),
    # All of it in 16 bits. What is less than 1/512 of a weight is lost where it is added, up to twice that of some.
    "bf16": Precision("bf16", "bf16", "bf16", "bf16", master=False, state="bf16"),
    # DeepSeek-AI 2024 (DeepSeek-V3), section 3.3.3: moments in bf16, master copy and gradients in f32.
    "bf16-moments": Precision("bf16-moments", "bf16", "bf16", "f32", master=True, state="bf16"),
    # Micikevicius et al. 2018 (mixed precision), sections 3.1 and 3.2.
    "f16-master": Precision("f16-master", "f16", "f16", "f16", master=True, scaled=True),
    # Micikevicius et al. 2022 (FP8 formats), section 3: all that is held and stored is as in bf16-f32.
    "fp8": Precision("fp8", "f32", "bf16", "f32", master=False, fp8=True),
}


@dataclass(frozen=True)
class Workload:
    """Batch is in sequences per step over all devices and microbatches, sequence in tokens.

    `gradient_dtype` is the dtype in which gradients are reduced and accumulated; left out, it is the
    precision's own: f32 for f32, bf16-f32, bf16-moments and fp8, else that of the parameters.
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
        if self.precision == "f16":
            raise SpecError(
                "workload: precision 'f16' has no loss scaling, and gradients below 6e-8 would be lost; f16-master scales the loss."
            )
        if self.precision not in tuple(PRECISIONS):
            raise SpecError(f"workload: unknown precision {self.precision!r}; {nearest(self.precision, PRECISIONS)}")
        if self.optimizer not in tuple(OPTIMIZERS):
            raise SpecError(f"workload: unknown optimizer {self.optimizer!r}; {nearest(self.optimizer, OPTIMIZERS)}")
        if self.gradient_dtype not in ("", "f32", "bf16"):
            raise SpecError(f"workload: gradients in {self.gradient_dtype!r} are not built; choose f32 or bf16.")
        if self.gradient_dtype == "bf16" and PRECISIONS[self.precision].scaled:
            raise SpecError(
                f"workload: gradients in bf16 need no scaled loss, and {self.precision} scales it; leave --gradient-dtype out "
                "for f16, or choose f32."
            )

    @property
    def dtypes(self) -> Precision:
        """The precision, with the dtype of the gradients resolved."""
        base = PRECISIONS[self.precision]
        return replace(base, gradients=self.gradient_dtype or base.gradients)

    @property
    def words(self) -> str:
        """What is asked for, for a person to read."""
        reduced = f", gradients in {self.gradient_dtype}" if self.gradient_dtype else ""
        return f"batch {self.batch:,}, sequence {self.sequence:,}, {self.precision}{reduced}, optimizer {self.optimizer}"

    @property
    def keeps(self) -> Optimizer:
        """What the optimizer keeps."""
        return OPTIMIZERS[self.optimizer]

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
