"""Ledgers by hand, shaped like those of a 7B model at data=4, tensor=2, zero=3."""

from __future__ import annotations

from types import SimpleNamespace

from jaxllm.report import RunResult, Setup
from jaxllm.spec.layout import Layout
from jaxllm.spec.ledger import Ledger, Line, Rule, Term, wire_bytes
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.workload import Workload

PADDED = Rule("tile-padding", 96, "arrays are padded to tiles of 8 x 128")
WINDOWED = Rule("windowed-einsum", 1_400, "a gather followed by a matmul is sent window by window")


def memory(name: str, value: int | None, **more) -> Line:
    return Line("memory", name, value, **more)


def flops(phase: str, value: int | None, **more) -> Line:
    return Line("flops", "matmul", value, phase=phase, **more)


def collective(
    kind: str, axes: str, phase: str, payload: int | None, *, n: int = 4, dtype: str = "bf16", **more
) -> Line:
    wire = wire_bytes(kind, payload, n) if payload is not None else 0
    return Line("collectives", kind, payload, phase=phase, axes=tuple(axes.split("+")), dtype=dtype, wire=wire, **more)


LINES = (
    memory(
        "parameters",
        3_369_209_856,
        terms=(
            Term("embed", 65_536_000, "V D / (data tensor) x 4 bytes", "ZeRO, section 5"),
            Term(
                "layers",
                3_303_673_856,
                "L (2 D N H + 2 D K H + 3 D F + 2 D) / (data tensor) x 4 bytes",
                "ZeRO, section 5",
            ),
        ),
    ),
    memory("optimizer", 6_738_419_720),
    memory("batch", 65_536),
    memory("gradients", 3_369_209_856),
    memory("residuals", 2_155_872_256),
    memory("padding", 0),
    flops("forward", 56_444_829_040_640),
    flops("recompute", 42_781_604_020_224),
    flops("backward", 112_889_658_081_280),
    collective("all-gather", "data", "forward", 6_738_415_616, count=291),
    collective("all-gather", "data", "backward", 6_476_267_520, count=289),
    collective("reduce-scatter", "data", "backward", 13_476_831_232, dtype="f32", count=291),
    collective("all-reduce", "tensor", "forward", 4_294_967_296, n=2, count=64),
    collective("all-reduce", "tensor", "backward", 4_294_967_296, n=2, count=64),
    collective("all-reduce", "data+tensor", "update", 4, n=8, dtype="f32", count=1),
)

PREDICTED = Ledger("closed form", LINES, peak=20_100_000_000, peak_terms=(Term("state", 20_100_000_000),))
COMPILED = Ledger("XLA:GPU", LINES, peak=20_900_000_000)


def ledger(author: str, *lines: Line, peak: int | None = None, **more) -> Ledger:
    return Ledger(author, lines, peak=peak, **more)


class Mesh(SimpleNamespace):
    def __str__(self) -> str:
        return "h100:8"


MODEL = ModelConfig.load("llama-2-7b")
MESH = Mesh(
    devices=8,
    machine=SimpleNamespace(
        name="h100", target="gpu", memory_bytes=85_520_809_984, usable_fraction=0.92, reserve_bytes=2_000_000_000
    ),
    to_json=lambda: {"name": "h100:8", "devices": 8},
)
SETUP = Setup(
    MODEL, Layout(data=4, tensor=2, zero=3, remat="full"), MESH, Workload(8, 4096, "bf16-f32"), "gpu", {"jax": "0.10.2"}
)


def ran(error: float, losses: tuple[float, ...] = (6.25, 6.0, 5.75)) -> RunResult:
    """Three steps whose worst tensor is off by `error`."""
    return RunResult(3, losses, losses, {"gradient/embed": 0.0, "change/layers.q": error, "loss/1": 0.0})
