"""inspect and measure: the report of any compiled program, out of a function, an executable or a file.

The mesh of a function or an executable is that of its arguments' shardings, whose devices stand in the program's own order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.spec.errors import SpecError, TargetError

if TYPE_CHECKING:
    from jaxllm.hlo.read import Program
    from jaxllm.report.inspection import Report
    from jaxllm.spec.machine import Machine

def inspect(
    function: Callable[..., Any],
    *arguments: Any,
    mesh: Any = None,
    machine: Machine | str | None = None,
    **keywords: Any,
) -> Report:
    """Compiles a function for its arguments and reports what the compiler made of it.

    Args:
        function: what `jax.jit` gives, or a function, which is jitted then.
        arguments, keywords: its arguments, arrays or jax.ShapeDtypeStructs with shardings; they are not computed on. The
            compiler is that of the devices of their shardings, or of jax's default device.
        mesh: degree of each mesh axis, outermost first, or a jax.sharding.Mesh; default: that of the arguments' shardings.
        machine: a Machine or its name, as "h100", for the least time of each operation.

    Raises TargetError when the compiler refuses the program, SpecError when mesh or machine do not fit it.
    """
    import jax

    from jaxllm.hlo.policies import unmatched_names
    from jaxllm.targets.compiler import compile_any

    known, given = _machine(machine), _given(mesh)
    if hasattr(function, "as_text"):
        raise SpecError(f"{type(function).__name__} is compiled or lowered already; call jaxllm.measure(compiled).")
    if not callable(function):
        raise SpecError(f"{function!r} is no function; give what jax.jit returns, and its arguments behind it.")
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    lowered = jitted.lower(*arguments, **keywords)
    lowered = getattr(lowered, "lowered", lowered)  # flax.nnx wraps it
    unmatched = unmatched_names(function, arguments, keywords)
    platform = _platform(lowered, arguments)
    dumped = compile_any(lowered, platform)
    report = _report(
        _program_of(dumped), given or _axes(dumped.executable), known, sure=given is not None, messages=dumped.said,
        unmatched=unmatched,
    )  # fmt: skip
    return _timed(report, compile=dumped.seconds)


def measure(
    compiled: Any, *, mesh: Any = None, machine: Machine | str | None = None
) -> Report:
    """The report of a `jax.stages.Compiled` of any backend.

    XLA keeps the buffer assignment of such an object on CPU only: elsewhere the peak is a lower bound, from lifetimes.
    `inspect` compiles anew and has it everywhere. Raises SpecError when mesh or machine do not fit the program.
    """
    known, given = _machine(machine), _given(mesh)
    program = _program(compiled)
    return _report(program, given or _axes(compiled), known, sure=given is not None)


def inspect_file(
    path: str | Path, *, mesh: Any = None, machine: Machine | str | None = None
) -> Report:
    """The report of an HLO dump: HLO text, an HloProto or an HloModuleProto. Needs no JAX.

    Raises ParseError (a SpecError) with the byte at which the file is not what it should be.
    """
    from jaxllm.hlo.read import read_file

    known, given = _machine(machine), _given(mesh)
    return _report(read_file(path, scheduled=True), given, known)


def _report(
    program: Program,
    axes: dict[str, int] | None,
    machine: Machine | None,
    *,
    sure: bool = True,
    messages: str = "",
    unmatched: tuple[tuple[str, str], ...] = (),
) -> Report:
    from jaxllm.hlo.inspect import inspect_program

    return inspect_program(
        program, mesh=axes, sure=sure, machine=machine, messages=messages, unmatched=unmatched
    )


def _timed(report: Report, **seconds: float) -> Report:
    spent = {name: round(value, 3) for name, value in seconds.items()}
    return dataclasses.replace(report, seconds=spent | report.seconds)


def _machine(machine: Machine | str | None) -> Machine | None:
    from jaxllm.spec.machine import Machine as Known

    if machine is None or isinstance(machine, Known):
        return machine
    if not isinstance(machine, str):
        raise SpecError(f"machine: {machine!r} is neither a Machine nor the name of one, as 'h100'.")
    return Known.read(machine)


def _given(mesh: Any) -> dict[str, int] | None:
    """A mesh as the caller gave it, as axes with degrees or as jax's own. Raises SpecError on anything else."""
    if mesh is None:
        return None
    axes = getattr(mesh, "shape", mesh)  # of a jax.sharding.Mesh
    if not isinstance(axes, Mapping) or not axes:
        raise SpecError(f"mesh: {mesh!r} is no mesh; give its axes as {{'data': 4, 'tensor': 2}}, outermost first.")
    for name, degree in axes.items():
        if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
            raise SpecError(f"mesh: {name}={degree!r} is not a whole number from 1; write it like {{'{name}': 2}}.")
    return {str(name): degree for name, degree in axes.items()}


def _platform(lowered: Any, arguments: Any) -> str:
    """Whose compiler the devices of a program have: cpu, gpu or tpu."""
    import jax

    from jaxllm.targets.compiler import COMPILERS

    for leaf in jax.tree.leaves(arguments):
        sharding = getattr(leaf, "sharding", None)
        devices = getattr(sharding, "device_set", None)
        if devices:
            return COMPILERS.get(next(iter(devices)).platform, "cpu")
    return COMPILERS.get(jax.default_backend(), "cpu")


def _axes(compiled: Any) -> dict[str, int] | None:
    """The axes of the largest mesh of the shardings of a program's arguments and results; None when they have none."""
    import jax

    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    meshes = [sharding.mesh for sharding in shardings if hasattr(sharding, "mesh")]
    largest = max(meshes, key=lambda mesh: prod(mesh.shape.values()), default=None)
    return dict(largest.shape) if largest is not None else None


def _program_of(dumped: Any) -> Program:
    from jaxllm.hlo.dump import Dump
    from jaxllm.hlo.read import read_file

    found = Dump.find(dumped.folder.name, dumped.compiler).optimized
    if found is None:  # a compiler that dumps nothing leaves the executable
        return _program(dumped.executable)
    return read_file(found, scheduled=True)


def _program(compiled: Any) -> Program:
    """Out of an executable: its module as a proto, else as text; its buffer assignment where there is one."""
    from jaxllm.hlo.protos import classes
    from jaxllm.hlo.read import read_bytes

    if not hasattr(compiled, "as_text") or hasattr(compiled, "compile"):
        raise SpecError(
            f"{type(compiled).__name__} is no compiled program; give what jitted.lower(...).compile() returns, or call "
            "jaxllm.inspect(jitted, ...), or jaxllm.inspect_file(path) for a dump."
        )
    try:  # not every backend keeps its module as a proto, and each says so in its own way: its text will do
        modules = compiled.runtime_executable().hlo_modules()
        data = modules[0].as_serialized_hlo_module_proto()
    except (AttributeError, IndexError, NotImplementedError, RuntimeError):
        data = (compiled.as_text() or "").encode()
    if not data:
        raise TargetError("this executable keeps no HLO; call jaxllm.inspect(jitted, ...), which compiles it anew.")
    program = read_bytes(data, "the executable's module", scheduled=True)
    statistics = compiled.memory_analysis()
    wire = getattr(statistics, "serialized_buffer_assignment_proto", b"")
    if not wire or program.buffers is not None:
        return program
    return dataclasses.replace(program, buffers=classes()["BufferAssignmentProto"].FromString(wire))
