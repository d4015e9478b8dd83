"""Reports by hand: a train step of scanned layers, an empty program, and one whose names and figures are hostile."""

from __future__ import annotations

from dataclasses import replace

from jaxllm.report.inspection import (
    Buffer,
    Collective,
    Finding,
    Memory,
    Operation,
    Place,
    Product,
    Report,
)
from jaxllm.spec.machine import Machine

LOOP = (2, 16)


def place(name: str, phase: str = "forward", trips: tuple[int, ...] = (), line: int = 31, **more) -> Place:
    count = more.pop("count", 1)
    for trip in trips:
        count *= trip
    op_name = more.pop("op_name", f"jit(step)/{phase}/{name.rstrip('.0123456789')}")
    return Place(name, op_name, f"model.py:{line} < step.py:12", phase, count, trips, **more)


def product(name: str, flops: int, phase: str = "forward", trips: tuple[int, ...] = LOOP, **more) -> Product:
    made = {"kind": "dot", "dtype": "bf16", "shapes": "bf16[64,512] . bf16[512,2048] -> bf16[64,2048]"}
    made |= {key: more.pop(key) for key in ("kind", "dtype", "shapes", "declared") if key in more}
    return Product(place(name, phase, trips, **more), flops=flops, **made)


def operation(
    name: str, opcode: str, step: int | None, *figures, phase: str = "forward", trips=LOOP, **more
) -> Operation:
    flops, read, written, seconds, bound = figures
    more = {"line": {"backward": 44}.get(phase, 31)} | more
    return Operation(place(name, phase, trips, **more), opcode, flops, read, written, seconds, bound, step)


def collective(name: str, kind: str, axes: str, payload: int, wire: int, phase: str = "forward", **more) -> Collective:
    made = {key: more.pop(key) for key in ("dtype", "ranks", "asynchronous", "overlapped", "disguise") if key in more}
    made = {"dtype": "bf16", "ranks": 4} | made
    return Collective(
        place(name, phase, more.pop("trips", LOOP), **more),
        kind,
        tuple(axes.split("+")),
        payload=payload,
        wire=wire,
        **made,
    )


def buffer(
    name: str, kind: str, size: int, start: int, end: int, shape: str = "bf16[64,2048]", line: int = 31
) -> Buffer:
    return Buffer(name, kind, size, shape, f"jit(step)/{kind}/{name}", f"model.py:{line} < step.py:12", start, end)


H100 = Machine.read("h100")

LIVE = (
    buffer("params.0", "parameter", 4_000_000_000, 0, 99, "f32[1000000000]", 5),
    buffer("mu.0", "optimizer", 3_000_000_000, 0, 99, "f32[750000000]", 6),
    buffer("residual.3", "residual", 2_000_000_000, 12, 70, "bf16[16,64,976563]"),
    buffer("gather.9", "gathered weight", 900_000_000, 38, 44),
    buffer("logits.1", "logits", 800_000_000, 40, 46),
    buffer("fusion.8", "temporary", 300_000_001, 41, 43),
    buffer("x.0", "argument", 1_000_000, 0, 99, "s32[250000]", 7),
)
CLASSES = {
    "parameter": 4_000_000_000, "optimizer": 3_000_000_000, "residual": 2_000_000_000, "gathered weight": 900_000_000,
    "logits": 800_000_000, "temporary": 300_000_001, "argument": 1_000_000, "fragmentation": 12_345,
}  # fmt: skip
TIMELINE = (
    (0, 7_001_000_000), (3, 7_400_000_000), (9, 7_300_000_000), (12, 9_001_000_000), (30, 9_500_000_000),
    (38, 10_200_000_000), (40, 10_701_000_000), (41, 11_001_000_001), (44, 10_701_000_000), (45, 9_801_000_000),
    (47, 9_001_000_000), (60, 9_400_000_000), (71, 7_001_000_000), (85, 7_600_000_000), (95, 7_001_000_000),
)


def by_class(timeline: tuple[tuple[int, int], ...], live: tuple[Buffer, ...]) -> dict[str, tuple[int, ...]]:
    """The timeline by class: what is alive at the peak, while it is, and temporaries for the rest."""
    kinds = dict.fromkeys(buffer.kind for buffer in live) | {"temporary": None}
    found: dict[str, list[int]] = {kind: [] for kind in kinds}
    for step, level in timeline:
        sums = dict.fromkeys(kinds, 0)
        for item in live:
            sums[item.kind] += item.bytes if item.start <= step <= item.end else 0
        sums["temporary"] += level - sum(sums.values())
        for kind, size in sums.items():
            found[kind].append(size)
    return {kind: tuple(sizes) for kind, sizes in found.items()}


MEMORY = Memory(
    exact=True,
    peak=sum(CLASSES.values()),
    classes=CLASSES,
    at=42,
    where=place("fusion.8", "backward", LOOP, 44),
    live=LIVE,
    timeline=TIMELINE,
    by_class=by_class(TIMELINE, LIVE),
    steps=100,
    aliased=7_000_000_000,
    host=2_147_483_648,
)  # fmt: skip

STEP = Report(
    name="jit_step",
    target="gpu",
    devices=8,
    mesh={"data": 4, "tensor": 2},
    products=(
        product("dot.1", 134_217_728),
        product("dot.2", 134_217_728),
        product("dot.3", 268_435_456, "backward", line=44),
        product("conv.4", 1_000_000, "forward", (), kind="convolution", dtype="f32", line=18),
        product("flash.5", 77_000_000, "forward", LOOP, kind="__triton$flash", declared=True, line=52),
    ),
    operations=(
        operation("dot.1", "dot", 5, 134_217_728, 2_162_688, 262_144, 7.2e-7, "memory"),
        operation("all-gather-start.1", "all-gather-start", 12, 0, 1_048_576, 4_194_304, 7.0e-6, "network"),
        operation("dot.2", "dot", 20, 134_217_728, 2_162_688, 262_144, 7.2e-7, "memory"),
        operation("fusion.8", "fusion", 42, 268_435_456, 4_000_000, 1_000_000, 1.5e-6, "memory", phase="backward"),
        operation("all-reduce.2", "all-reduce", 60, 0, 4_000_000, 4_000_000, 1.3e-5, "network", phase="backward"),
        operation("update.9", "fusion", 90, 0, 7 * 10**9, 7 * 10**9, 4.2e-3, "memory", phase="update", trips=()),
    ),
    collectives=(
        collective(
            "all-gather-start.1", "all-gather", "data", 4_194_304, 3_145_728, asynchronous=True, overlapped=("dot.2",)
        ),
        collective("all-reduce.2", "all-reduce", "data+tensor", 4_000_000, 7_000_000, "backward", line=44, ranks=8,
                   dtype="f32", disguise="reduce-scatter"),
    ),
    memory=MEMORY,
    warnings=(
        Finding(
            "all-reduce-then-slice",
            "an all-reduce of 128 MB, of which each device keeps a slice: 224 MB are sent where 112 MB would do",
            "give the result of the product a sharding with jax.lax.with_sharding_constraint",
            "model.py:44 < step.py:12",
            "jit(step)/backward/all-reduce",
            112_000_000,
        ),
    ),
    not_understood=("FLOPs of custom-call.3 (model.py:52): its target `my_kernel` is unknown",),
    matmul_flops_range=(17_180_869_184, 17_180_869_184),
    assumed=("a loop whose trip count is unknown counts once: while.7 (model.py:60)",),
    machine=H100,
    seconds={"read": 0.21, "measure": 0.05},
)  # fmt: skip

NOTHING = Report(
    name="", target="", devices=1, mesh={}, products=(), operations=(), collectives=(),
    memory=Memory(False, 0, {}, 0, None, (), ((0, 0),), {}, 0), warnings=(), not_understood=(),
    matmul_flops_range=(0, 0), assumed=(),
)  # fmt: skip

HUGE = 2_488_320_000_000_000_000_123

_STRANGE = "[red]Straße\x1b[31m\r\n\u202e層[/red]"
HOSTILE = replace(
    STEP,
    name=_STRANGE,
    mesh={_STRANGE: 8},
    products=tuple(
        replace(p, place=replace(p.place, source=_STRANGE, op_name=_STRANGE), flops=HUGE) for p in STEP.products
    ),
    operations=tuple(
        replace(o, place=replace(o.place, name=f"{o.place.name}{_STRANGE}", op_name=_STRANGE * 20, source=""))
        for o in STEP.operations
    ),
    collectives=tuple(
        replace(c, axes=(_STRANGE,), payload=HUGE, wire=HUGE, place=replace(c.place, name=f"{c.place.name}{_STRANGE}"))
        for c in STEP.collectives
    ),
    memory=replace(
        MEMORY,
        peak=HUGE,
        classes={"parameter": HUGE - 5, "fragmentation": 5},
        live=tuple(replace(b, name=_STRANGE, shape=_STRANGE, source=_STRANGE, op_name=_STRANGE) for b in LIVE),
        where=replace(MEMORY.where, name=_STRANGE, source=_STRANGE, op_name=_STRANGE),
    ),
    warnings=tuple(
        replace(w, kind=_STRANGE, message=_STRANGE, advice=_STRANGE, source=_STRANGE) for w in STEP.warnings
    ),
    not_understood=(_STRANGE,),
    assumed=(_STRANGE,),
    matmul_flops_range=(HUGE, HUGE),
)
