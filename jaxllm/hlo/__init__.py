"""What the compiler decided, read from XLA's protos: module -> graph -> loops, FLOPs, collectives, memory -> Ledger."""

from jaxllm.hlo.dump import Dump
from jaxllm.hlo.measure import measure

__all__ = ["Dump", "measure"]
