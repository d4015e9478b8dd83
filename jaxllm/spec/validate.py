"""What the nouns must agree on among themselves. Each sentence names the value, the limit and a way out."""

from __future__ import annotations

from typing import Any

from jaxllm.spec import activations
from jaxllm.spec.errors import SpecError, TargetError
from jaxllm.spec.layout import STATE, Layout
from jaxllm.spec.workload import Workload

PLAIN = Layout()

# The longest default sequence: models that take 128k tokens are seldom trained on them from the start.
DEFAULT_SEQUENCE = 4096
MOST_POSITIONS = 2**24  # whole numbers up to it are numbers in f32, in which angles are computed
# The models for trying things out are meant to run on emulated devices within seconds.
SHORT_SEQUENCES = {"llama-tiny": 128, "gpt-tiny": 128}


def default_batch(layout: Layout) -> int:
    """One sequence on each device and microbatch: replica x data x microbatches."""
    return layout.replica * layout.data * layout.microbatches


def default_sequence(model: Any, layout: Layout = PLAIN) -> int:
    """The model's longest sequence, up to 4,096 tokens, that the layout can cut; 128 for llama-tiny and gpt-tiny."""
    longest = min(model.max_sequence, SHORT_SEQUENCES.get(model.name, DEFAULT_SEQUENCE))
    return max(1, longest // layout.sequence_parts) * layout.sequence_parts


def validate(model: Any, layout: Layout, mesh_devices: int, workload: Workload) -> None:
    """Raises SpecError where model, layout, mesh and workload do not go together, TargetError where no target can be used."""
    validate_devices(layout, mesh_devices)
    validate_tensor(model, layout)
    validate_context(model, layout)
    validate_save(model, layout)
    validate_attention(layout)
    validate_offload(layout, workload)
    validate_fp8(model, layout, workload)
    workload.sequences_per_device(layout)
    validate_sequence(model, layout, workload.sequence)


def validate_target(target: str, layout: Layout, workload: Workload) -> None:
    """What a compiler's devices cannot have, before jax starts. Raises SpecError or TargetError with the reason."""
    validate_kernel(target, layout, workload)
    validate_host(target, layout)


def validate_devices(layout: Layout, mesh_devices: int) -> None:
    """The degrees multiply to the mesh's size. Raises SpecError."""
    if layout.devices == mesh_devices:
        return
    degrees = " x ".join(f"{axis} {n}" for axis, n in layout.degrees.items() if n > 1 or axis not in ("pipe", "context"))
    rest = layout.devices // layout.data
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


def validate_context(model: Any, layout: Layout) -> None:
    """With exchange=ulysses the devices share out the heads of each tensor rank. Raises SpecError."""
    if layout.context == 1 or layout.ring:
        return
    queries, keys = model.heads // layout.tensor, max(1, model.kv_heads // layout.tensor)
    for heads, what in ((queries, "query"), (keys, "key/value")):
        if heads % layout.context:
            each = f" of each of tensor={layout.tensor} ranks" if layout.tensor > 1 else ""
            raise SpecError(
                f"layout: exchange=ulysses shares out heads, and context={layout.context} does not divide the {heads} {what} "
                f"heads{each} of {model.name}; set exchange=ring with attention=blockwise, or "
                + (f"a context that divides {keys}." if keys > 1 else "a smaller tensor.")
            )


def validate_save(model: Any, layout: Layout) -> None:
    """The activations to be saved are those of the model's blocks. Raises SpecError."""
    own = activations.BY_FAMILY[model.family]
    for key, text, known in (
        ("save", layout.save, own),
        ("offload", layout.offload if layout.offload != "none" else "", (*STATE, activations.INPUT, *own)),
    ):
        names = [name for name, of in activations.GROUPS.items() if {*of} & {*known}] + [*known]
        for name in text.split("+") if text else ():
            if not activations.named((name,)) & {*known}:
                raise SpecError(
                    f"layout: {key}={text}: the blocks of {model.name} have no activation {name!r}; theirs are "
                    f"{', '.join(name for name in names if name not in STATE)}."
                )


def validate_attention(layout: Layout) -> None:
    """There is a program with that attention. Raises TargetError."""
    if layout.attention == "splash":
        raise TargetError(
            "attention=splash: no step can hold the Pallas kernel that jax has, for it does not say over which mesh axes its "
            "results vary, as a checked jax.shard_map asks of it (docs/attention.md); choose attention=blockwise."
        )


def validate_offload(layout: Layout, workload: Workload) -> None:
    """There is something to offload, and it can be updated layer by layer. Raises SpecError."""
    if not layout.state_on_host:
        return
    kept = workload.keeps
    if not kept.slots and not workload.dtypes.master and not layout.parameters_on_host:
        raise SpecError(
            f"layout: offload={layout.offload}: optimizer {kept.name} keeps nothing of a weight, and precision "
            f"{workload.precision} no master copy; leave optimizer out of offload, or use --precision bf16-master."
        )
    if any(slot.of != "weight" for slot in kept.slots):
        raise SpecError(
            f"layout: offload={layout.offload}: optimizer {kept.name} looks at whole matrices, and state comes from host "
            "memory to be updated element by element; use --optimizer adamw, or leave optimizer out of offload."
        )


def validate_fp8(model: Any, layout: Layout, workload: Workload) -> None:
    """Products in 8 bits can be had with the layout, and what they quantize is whole. Raises SpecError."""
    if not workload.dtypes.fp8:
        return
    way = "or use --precision bf16-f32"
    if layout.pipe > 1:
        raise SpecError(
            f"precision {workload.precision} with pipe={layout.pipe} is not built: the cells of a schedule hand their layers no "
            f"scales, and take no amaxes from them; leave out pipe, {way}."
        )
    if model.kv_heads % layout.tensor:
        raise SpecError(
            f"precision {workload.precision}: with tensor={layout.tensor} each of the {model.kv_heads} key/value heads of "
            f"{model.name} is on several ranks, and the gradient of each of them would be rounded to 8 bits in parts before it "
            f"is summed; choose {f'a tensor that divides {model.kv_heads}' if model.kv_heads > 1 else 'tensor=1'}, {way}."
        )


def validate_sequence(model: Any, layout: Layout, sequence: int) -> None:
    """The sequence is one the model's positions reach, and the layout can cut. Raises SpecError.

    Positions that are learned end; an angle is there for every one, as far as an f32 tells them apart. Longer sequences
    than a model was trained for are how its context is extended (Llama Team 2024, section 3.4.2).
    """
    most = model.max_sequence if model.family == "gpt" else MOST_POSITIONS
    if sequence > most:
        why = f"that {model.name} takes" if model.family == "gpt" else "whose positions an f32 tells apart"
        raise SpecError(f"sequence {sequence:,} is longer than the {most:,} tokens {why}; use --seq {most} or less.")
    parts = layout.sequence_parts
    if sequence % parts:
        by = [f"context={layout.context}, in a ring of two parts each" if layout.ring else f"context={layout.context}"]
        by = by[: layout.context > 1] + [f"tensor={layout.tensor} with sequence=true"] * layout.sequence
        near = max(1, sequence // parts) * parts
        raise SpecError(
            f"{' and '.join(by)}: {sequence:,} tokens do not divide into the {parts} parts of a sequence; "
            + (f"--seq {near} would do." if near <= most else f"{model.name} takes {most:,} at most.")
        )


def validate_kernel(target: str, layout: Layout, workload: Workload) -> None:
    """Checks that the target can have the layout's attention, before jax starts. Raises TargetError with the reason."""
    if layout.attention != "cudnn":
        return
    way = "choose attention=blockwise"
    if target in ("cpu", "tpu"):
        raise TargetError(f"attention=cudnn is a kernel for NVIDIA's cards, and the target is {target}; {way}.")
    if (dtype := workload.dtypes.compute) != "bf16":
        raise TargetError(
            f"attention=cudnn is built for bf16, and precision {workload.precision} computes in {dtype}; use --precision bf16-f32, or "
            f"{way}."
        )


def validate_host(platform: str, layout: Layout) -> None:
    """Checks that devices of the platform have a memory of their own beside their host's. Raises SpecError."""
    if layout.offload != "none" and platform == "cpu":
        what = "state" if layout.state_on_host else "activations"
        raise SpecError(
            f"layout: offload={layout.offload} keeps {what} in the memory of a device's host, and the memory of a cpu is its "
            "host's; take a mesh of GPUs or TPUs such as h100:8 or v5e:2x4 without --target cpu, or leave out offload."
        )


def _divisors(model: Any, tensor: int) -> str:
    possible = [
        n
        for n in range(1, min(model.heads, 2 * tensor) + 1)
        if model.heads % n == 0 and model.d_ff % n == 0 and (model.kv_heads % n == 0 or n % model.kv_heads == 0)
    ]
    near = sorted(possible, key=lambda n: (abs(n - tensor), n))[:3]
    return f"tensor={' or '.join(str(n) for n in sorted(near))} would do"
