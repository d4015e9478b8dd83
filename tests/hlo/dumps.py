"""What the compilers leave of the programs in foreign.py: protos and texts, each program compiled once in a process."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
from jaxlib import _hlo

from jaxllm.hlo import Dump
from tests.hlo import foreign

TARGETS = ("cpu", "gpu", "tpu")
PROGRAMS = [(name, target) for name in foreign.programs() for target in TARGETS]


@dataclass(frozen=True)
class Dumped:
    """Of one program and target: the optimized HloProto with the name of its file, the same module alone as an
    HloModuleProto, and as_text()."""

    name: str
    proto: bytes
    module: bytes
    text: bytes
    files: dict[str, bytes]  # all others of the dump, by name

    def printed(self, **options: bool) -> bytes:
        """The module as text, with XLA's own options of printing."""
        chosen = _hlo.HloPrintOptions()
        for option, value in options.items():
            setattr(chosen, option, value)
        return _hlo.HloModule.from_serialized_hlo_module_proto(self.module).to_string(chosen).encode()


@cache
def dumped(name: str, target: str) -> Dumped:
    program = foreign.programs()[name](target)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(program.mesh):
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_proto": True, "xla_dump_hlo_as_text": True}
        lowered = jax.jit(program.function, **program.options).lower(*program.arguments)
        executable = lowered.compile(compiler_options=options)
        found = Dump.find(folder, target).optimized
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
    files["lowered.mlir"] = lowered.as_text().encode()
    proto = files.pop(found.name)
    return Dumped(found.name, proto, inside(proto), executable.as_text().encode(), files)


def inside(proto: bytes) -> bytes:
    """The bytes of the module in an HloProto, all fields of it."""
    length, shift, position = 0, 0, 1
    while True:
        byte = proto[position]
        length |= (byte & 127) << shift
        shift, position = shift + 7, position + 1
        if byte < 128:
            return proto[position : position + length]
