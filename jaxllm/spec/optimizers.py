"""The optimizers: what each keeps of every weight between steps, and where it is published.

One entry here and one in jaxllm/program/transformations make an optimizer; all else follows from the two.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """An array that an optimizer keeps of a weight, in the precision's dtype of state.

    name    as optax has it
    holds   what it is
    degree  in the gradient: 1 of a mean of gradients, 2 of one of their squares
    of      what it has the shape of: the `weight`. Of a layer's matrix that is factored, `rows` and `columns` have the
            lesser dim and the other; `rest` has the shape of a weight that is not. One element stands where there is none.
            `others` are weights that are no matrix of a layer, and there is nothing for those that are
    """

    name: str
    holds: str
    degree: int
    of: str = "weight"


@dataclass(frozen=True)
class Optimizer:
    """What is kept beside the number of updates so far.

    paper  where it is published
    rate   the highest learning rate that `jaxllm train` takes where none is given
    """

    name: str
    paper: str
    slots: tuple[Slot, ...]
    rate: float


# A matrix of a layer, or outside of the layers, is factored when its lesser dim is at least this: optax's default.
FACTORED = 128

MOMENTS = (Slot("mu", "first moment m", 1), Slot("nu", "second moment v", 2))

OPTIMIZERS = {
    optimizer.name: optimizer
    for optimizer in (
        # He et al. 2016, section 3.4
        Optimizer("sgd", "Robbins and Monro 1951", (), 0.1),
        # Krizhevsky et al. 2012, section 5
        Optimizer("momentum", "Polyak 1964", (Slot("trace", "momentum", 1),), 0.01),
        # PyTorch's default
        Optimizer("adagrad", "Duchi et al. 2011", (Slot("sum_of_squares", "sum of squares", 2),), 0.01),
        # The Llama papers' peaks are 3e-4 to 1.5e-4.
        Optimizer("adam", "Kingma and Ba 2015", MOMENTS, 3e-4),
        Optimizer("adamw", "Loshchilov and Hutter 2019", MOMENTS, 3e-4),
        # The relative step of section 8, which is of a weight's root mean square.
        Optimizer(
            "adafactor",
            "Shazeer and Stern 2018",
            (
                Slot("v_row", "means of squares by row", 2, "rows"),
                Slot("v_col", "means of squares by column", 2, "columns"),
                Slot("v", "mean of squares", 2, "rest"),
            ),
            0.01,
        ),
        # A third of AdamW's, with three times its decay: section 5 says 3 to 10.
        Optimizer("lion", "Chen et al. 2023", (Slot("mu", "momentum", 1),), 1e-4),
        # One rate for matrices and others, by the scale of Liu et al. 2025: AdamW's.
        Optimizer(
            "muon", "Jordan 2024", (Slot("mu", "momentum", 1), Slot("nu", "second moment v", 2, "others")), 3e-4
        ),
    )
}
