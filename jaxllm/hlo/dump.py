"""The files of a compiler's dump that a ledger is measured from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxllm.spec.errors import TargetError, nearest

# The module after SPMD partitioning, and the HloProto that carries the buffer assignment.
_FILES = {
    "cpu": ("*.after_spmd-partitioning.before_*.hlo.pb", "*.cpu_after_optimizations.hlo.pb"),
    "gpu": ("*.after_spmd_partitioner.hlo.pb", "*gpu_after_optimizations.hlo.pb"),
    "tpu": ("*.after_tpu-spmd-partitioning.before_*.hlo.pb", "*.after_optimizations.hlo.pb"),
}

# A program for one device is not partitioned: what XLA was given is what each device, the only one, does.
_GIVEN = "*.before_optimizations.hlo.pb"


@dataclass(frozen=True)
class Dump:
    """What one compilation left behind: paths of HloProtos.

    partitioned  the module after SPMD partitioning, or as it was given when there is one device and nothing to
                 partition; None when the compiler did not get so far
    optimized    the optimized module with its buffer assignment; None when the compiler refused the program for memory
    target       cpu, gpu or tpu
    """

    partitioned: Path | None
    optimized: Path | None
    target: str

    @classmethod
    def find(cls, folder: Path | str, target: str, *, devices: int | None = None) -> Dump:
        """Picks the files among those that `xla_dump_to=folder` gave, with `xla_dump_hlo_as_proto`. Of several modules
        the one of the largest optimized file is taken: the step, and not a helper compiled beside it. `devices` is how
        many the program is for; it matters when there is but one.

        Raises TargetError for an unknown target.
        """
        if target not in _FILES:
            raise TargetError(f"dump: unknown target {target!r}; {nearest(target, _FILES)}")
        partitioned, optimized, given = (
            sorted(Path(folder).glob(pattern), key=lambda path: path.stat().st_size)
            for pattern in (*_FILES[target], _GIVEN)
        )
        if devices == 1:
            partitioned = given
        return cls(partitioned[-1] if partitioned else None, optimized[-1] if optimized else None, target)
