"""compile: a built step through a target's compiler, with XLA's own protos dumped on the way."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm import targets
from jaxllm.spec.errors import TargetError
from jaxllm.targets.start import quiet

# jax's name of a platform -> whose file names and habits the dump has
COMPILERS = {"cpu": "cpu", "cuda": "gpu", "gpu": "gpu", "rocm": "gpu", "tpu": "tpu"}


@dataclass(frozen=True)
class Lowered:
    """The traced and lowered step of a built program, for one target."""

    built: Any
    target: str
    stages: Any  # jax.stages.Lowered
    seconds: float

    @property
    def compiler(self) -> str:
        """Whose compiler it is: cpu, gpu or tpu."""
        return COMPILERS[self.built.mesh.devices.flat[0].platform]


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a step.

    folder      XLA's dump, to be read by jaxllm.hlo
    executable  jax.stages.Compiled, or None when the compiler refused
    refused     what the compiler said when the program does not fit, else ""
    """

    lowered: Lowered
    folder: Path
    executable: Any
    refused: str
    seconds: float


def lower(built: Any, target: str) -> Lowered:
    """Traces and lowers the step. Raises TargetError with the compiler's reason when its platform cannot."""
    start = time.perf_counter()
    with quiet():
        try:
            stages = built.lower()
        except NotImplementedError as error:
            raise TargetError(f"the {target} target cannot lower this step: {first_line(error)}") from error
    return Lowered(built, target, stages, time.perf_counter() - start)


@contextlib.contextmanager
def compile(lowered: Lowered) -> Any:
    """Compiles a lowered step; a context, because the dump is removed when it ends.

    Raises TargetError when the compiler fails for a reason other than memory.
    """
    folder = Path(tempfile.mkdtemp(prefix="jaxllm-"))
    options = {
        "xla_dump_to": str(folder),
        "xla_dump_hlo_as_proto": True,
        "xla_dump_hlo_module_re": ".*train_step.*",
        "xla_dump_hlo_pass_re": f".*{targets.module(lowered.target).PARTITIONED}.*",
    }
    executable, refused, start = None, "", time.perf_counter()
    try:
        with quiet():
            try:
                executable = lowered.stages.compile(compiler_options=options)
            except Exception as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise TargetError(f"XLA:{lowered.compiler.upper()} refused the step: {first_line(error)}") from error
                refused = memory_message(str(error))
        yield Compiled(lowered, folder, executable, refused, time.perf_counter() - start)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def memory_message(text: str) -> str:
    """The sentence of a RESOURCE_EXHAUSTED error that has the totals."""
    sentences = [part.strip() for part in text.replace("\n", " ").split(". ")]
    return next((part for part in sentences if "exceed" in part.lower() or "hbm" in part.lower()), sentences[0])[:300]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, short enough for one sentence."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
