"""What the nouns must agree on among themselves. Each sentence names the value, the limit and a way out."""

from __future__ import annotations

from typing import Any

from jaxllm.spec.errors import SpecError
from jaxllm.spec.layout import Layout
from jaxllm.spec.workload import Workload

# The longest default sequence: models that take 128k tokens are seldom trained on them from the start.
DEFAULT_SEQUENCE = 4096
# The models for trying things out are meant to run on emulated devices within seconds.
SHORT_SEQUENCES = {"llama-tiny": 128, "gpt-tiny": 128}


def default_batch(layout: Layout) -> int:
    """One sequence on each device and microbatch: replica x data x microbatches."""
    return layout.replica * layout.data * layout.microbatches


def default_sequence(model: Any) -> int:
    """The model's longest sequence, up to 4,096 tokens; 128 for llama-tiny and gpt-tiny."""
    return min(model.max_sequence, SHORT_SEQUENCES.get(model.name, DEFAULT_SEQUENCE))


def validate(model: Any, layout: Layout, mesh_devices: int, workload: Workload) -> None:
    """Raises SpecError where model, layout, mesh and workload do not go together."""
    validate_devices(layout, mesh_devices)
    validate_tensor(model, layout)
    workload.sequences_per_device(layout)
    validate_sequence(model, workload.sequence)


def validate_devices(layout: Layout, mesh_devices: int) -> None:
    """The degrees multiply to the mesh's size. Raises SpecError."""
    if layout.devices == mesh_devices:
        return
    degrees = " x ".join(f"{axis} {n}" for axis, n in layout.degrees.items() if n > 1 or axis != "pipe")
    rest = layout.pipe * layout.replica * layout.tensor
    if mesh_devices % rest == 0:
        way = f"data={mesh_devices // rest} would fill it"
    else:
        way = f"take a mesh of {layout.devices}"
    raise SpecError(
        f"layout {layout} needs {_devices(layout.devices)} ({degrees}), but the mesh has {mesh_devices:,}; {way}."
    )


def _devices(count: int) -> str:
    return f"{count:,} device{'s' if count > 1 else ''}"


def validate_tensor(model: Any, layout: Layout) -> None:
    """Tensor parallelism cuts query heads and feed-forward evenly, and shares or repeats key/value heads.

    Fewer key/value heads than `tensor` are repeated, the same number of times each; so `tensor` divides them or is
    a multiple of them. Raises SpecError.
    """
    tensor = layout.tensor
    for value, what in ((model.heads, "query heads"), (model.d_ff, "feed-forward columns")):
        if value % tensor:
            raise SpecError(
                f"tensor={tensor} does not divide the {value:,} {what} of {model.name}; {_divisors(model, tensor)}."
            )
    if model.kv_heads % tensor and tensor % model.kv_heads:
        raise SpecError(
            f"tensor={tensor} neither divides the {model.kv_heads} key/value heads of {model.name} nor is a multiple "
            f"of them; {_divisors(model, tensor)}."
        )


def validate_sequence(model: Any, sequence: int) -> None:
    """The sequence is one the model's positions reach. Raises SpecError."""
    if sequence > model.max_sequence:
        raise SpecError(
            f"sequence {sequence:,} is longer than the {model.max_sequence:,} tokens that {model.name} takes; "
            f"use --seq {model.max_sequence} or less."
        )


def _divisors(model: Any, tensor: int) -> str:
    possible = [
        n
        for n in range(1, min(model.heads, 2 * tensor) + 1)
        if model.heads % n == 0 and model.d_ff % n == 0 and (model.kv_heads % n == 0 or n % model.kv_heads == 0)
    ]
    near = sorted(possible, key=lambda n: (abs(n - tensor), n))[:3]
    return f"tensor={' or '.join(str(n) for n in sorted(near))} would do"
