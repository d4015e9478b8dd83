"""compile: a built step through a target's compiler, with XLA's own protos dumped on the way."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

from jaxllm import cache
from jaxllm.spec.errors import TargetError
from jaxllm.targets.start import quiet

# jax's name of a platform -> whose file names and habits the dump has
COMPILERS = {"cpu": "cpu", "cuda": "gpu", "gpu": "gpu", "rocm": "gpu", "tpu": "tpu"}

TELL_EVERY = 30  # seconds

# The passes after which each compiler is told to dump; XLA:GPU dumps the partitioned module by itself.
PARTITIONED = {"cpu": "spmd-partitioning", "gpu": "spmd-partitioner", "tpu": "tpu-spmd-partitioning"}


@dataclass(frozen=True)
class Lowered:
    """The traced and lowered step of a built program."""

    built: Any
    stages: Any  # jax.stages.Lowered
    seconds: float

    @property
    def compiler(self) -> str:
        """Whose compiler it is: cpu, gpu or tpu."""
        return COMPILERS[self.built.mesh.devices.flat[0].platform]


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a step.

    dump        XLA's protos, in a temporary folder that goes when this object does
    executable  jax.stages.Compiled, or None when the compiler refused
    refused     what the compiler said when the program does not fit, else ""
    """

    lowered: Lowered
    dump: tempfile.TemporaryDirectory[str]
    executable: Any
    refused: str
    seconds: float


def lower(built: Any) -> Lowered:
    """Traces and lowers the step. Raises TargetError with the reason when its platform cannot."""
    start = time.perf_counter()
    with quiet():
        try:
            stages = built.lower()
        except NotImplementedError as error:
            raise TargetError(f"this step cannot be lowered for {built.target}: {first_line(error)}") from error
        except RuntimeError as error:
            if "cudnn" not in str(error).lower():
                raise
            raise TargetError(
                f"attention=cudnn: {first_line(error).strip('.')}: pip install nvidia-cudnn-cu12 installs it; or choose "
                "attention=blockwise."
            ) from error
    return Lowered(built, stages, time.perf_counter() - start)


@dataclass(frozen=True)
class Dumped:
    """What the compiler made of anybody's program: the folder of XLA's protos, and what the compiler said meanwhile."""

    folder: tempfile.TemporaryDirectory[str]
    executable: Any
    compiler: str
    said: str
    seconds: float


def compile_any(lowered: Any, compiler: str) -> Dumped:
    """Compiles a jax.stages.Lowered. Raises TargetError when the compiler refuses it."""
    folder = tempfile.TemporaryDirectory(prefix=f"jaxllm-{os.getpid()}-", ignore_cleanup_errors=True)
    options = {"xla_dump_to": folder.name, "xla_dump_hlo_as_proto": True}
    start = time.perf_counter()
    with quiet() as said, _afresh():
        try:
            executable = lowered.compile(compiler_options=options)
        except Exception as error:
            text = memory_message(str(error)) if _is_memory(str(error)) else first_line(error)
            raise TargetError(f"XLA:{compiler.upper()} refused the program: {text}") from error
        heard = said()
    return Dumped(folder, executable, compiler, heard, time.perf_counter() - start)


def compile(program: Any, progress: Callable[[str], None] = lambda message: None) -> Compiled:
    """Compiles a step that `build` made, or that `lower` has lowered already. `progress` hears of a long one.

    Raises TargetError when the compiler fails for a reason other than memory.
    """
    lowered = program if isinstance(program, Lowered) else lower(program)
    folder = tempfile.TemporaryDirectory(prefix=f"jaxllm-{os.getpid()}-", ignore_cleanup_errors=True)
    options = {
        "xla_dump_to": folder.name,
        "xla_dump_hlo_as_proto": True,
        "xla_dump_hlo_module_re": ".*train_step.*",
        "xla_dump_hlo_pass_re": f".*{PARTITIONED[lowered.compiler]}.*",
    }
    executable, refused, start = None, "", time.perf_counter()
    absent = lowered.built.target == "gpu"  # a card that is here tries its kernels out
    kernels = cache.kernels(lowered.built.hardware) if absent else contextlib.nullcontext({})
    with quiet(), _afresh(), kernels as more:
        try:
            executable = _interruptible(lambda: lowered.stages.compile(compiler_options=options | more), progress)
        except Exception as error:
            if not _is_memory(str(error)):
                raise TargetError(f"XLA:{lowered.compiler.upper()} refused the step: {first_line(error)}") from error
            refused = memory_message(str(error))
    return Compiled(lowered, folder, executable, refused, time.perf_counter() - start)


@contextlib.contextmanager
def _afresh() -> Iterator[None]:
    """Without JAX's own cache on disk, if the user has one: a program that comes from there leaves no dump."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # whether it is used is asked once in a process
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _is_memory(text: str) -> bool:
    """Whether an error says that the program needs more memory than the device has, and not a unit of its own less."""
    return "RESOURCE_EXHAUSTED" in text and bool(re.search(r"\bhbm\b|out of memory", text, re.I))


def _interruptible(work: Callable[[], Any], progress: Callable[[str], None]) -> Any:
    """Does the work in a thread of its own, so that an interrupt need not wait until XLA returns, and tells the time."""
    outcome: Future[Any] = Future()

    def body() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=body, daemon=True).start()
    begin = time.perf_counter()
    while not wait((outcome,), timeout=TELL_EVERY).done:
        progress(f"still compiling, for {time.perf_counter() - begin:.0f} s now")
    return outcome.result()


def memory_message(text: str) -> str:
    """The sentence of a RESOURCE_EXHAUSTED error that has the totals."""
    sentences = [part.strip() for part in text.replace("\n", " ").split(". ")]
    return next((part for part in sentences if "exceed" in part.lower() or "hbm" in part.lower()), sentences[0])[:300]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, short enough for one sentence."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
