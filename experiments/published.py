"""Step times that others measured on A100s, and what the closed form says of them: what two experiments share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from experiments import common
from jaxllm import Layout, Machine, ModelConfig, Workload
from jaxllm.spec.machine import Mesh
from jaxllm.theory.partition import stages_of
from jaxllm.theory.rates import Rates
from jaxllm.theory.stages import Stages
from jaxllm.theory.symbols import Symbols
from jaxllm.theory.time import StepTime, of_stages, of_symbols

TABLE = common.ROOT / "docs" / "published" / "step_times.csv"
VOCABULARY = 51200
PRECISION = "f16-master"


@dataclass(frozen=True)
class Step:
    """A measured step: a GPT of Megatron-LM, its layout, and the seconds that it took."""

    source: str
    calibration: bool
    model: ModelConfig
    layout: Layout
    mesh: Mesh
    workload: Workload
    seconds: float

    @property
    def name(self) -> str:
        return f"{self.model.name} {self.mesh} {self.layout}"

    @cached_property
    def symbols(self) -> Symbols:
        """Megatron-LM runs each kernel as it is written: it computes a block's last matmul again as well."""
        return replace(Symbols.of(self.model, self.layout, self.workload), eager=1)

    @cached_property
    def stages(self) -> Stages | None:
        return stages_of(self.model, self.layout, self.workload)

    @cached_property
    def rates(self) -> Rates:
        return Rates.of(self.mesh, self.workload)

    def time(self, rates: Rates | None = None) -> StepTime:
        rates = rates or self.rates
        return of_symbols(self.symbols, rates) if self.stages is None else of_stages(self.symbols, self.stages, rates)


def steps(*, calibration: bool | None = None) -> list[Step]:
    """All of them, or those that constants are fitted on, or the others."""
    return [step for step in _read() if calibration in (None, step.calibration)]


def _read() -> Iterator[Step]:
    for row in common.read_csv(TABLE):
        devices, microbatches = row["devices"], row["batch"] // row["data"] // row["each"]
        keys: dict[str, Any] = {name: row[name] for name in ("pipe", "data", "tensor")} | {"microbatches": microbatches}
        keys |= {"remat": row["remat"], "sequence": str(bool(row["cut"])).lower()}
        if row["pipe"] > 1:
            keys |= {"schedule": "interleaved", "virtual": row["virtual"]} if row["virtual"] > 1 else {"schedule": "1f1b"}
        mesh = f"a100-80:{devices}" if devices <= 8 else f"a100-80:{devices // 8}x8"
        yield Step(
            source=row["source"],
            calibration=bool(row["calibration"]),
            model=_gpt(str(row["model"] or f"{row['layers']} x {row['hidden']}"), row),
            layout=Layout.parse(",".join(f"{key}={value}" for key, value in keys.items())),
            mesh=Machine.load(mesh),
            workload=Workload(row["batch"], row["sequence"], PRECISION),
            seconds=float(row["seconds"]),
        )


def _gpt(name: str, row: dict[str, Any]) -> ModelConfig:
    hidden, heads = row["hidden"], row["heads"]
    return ModelConfig(
        name=name, layers=row["layers"], d_model=hidden, d_ff=4 * hidden, heads=heads, kv_heads=heads,
        head_dim=hidden // heads, vocab=VOCABULARY, tied=True, norm_epsilon=1e-5, max_sequence=row["sequence"],
        source=row["source"], family="gpt",
    )  # fmt: skip


def by_source(found: Sequence[Step]) -> dict[str, list[Step]]:
    """The steps of each source, in the order of the table."""
    sources: dict[str, list[Step]] = {}
    for step in found:
        sources.setdefault(step.source, []).append(step)
    return sources
