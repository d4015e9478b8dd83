"""What is kept by version: measured ledgers, so that the same step is compiled once, and kernels of XLA:GPU.

The key of a ledger is the lowered program itself with everything that reads it: a change of jaxllm, jax or a compiler is
a new key. A damaged or unwritable cache is as good as none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxllm.spec.ledger import Ledger, Line, Rule, Term

Measured = tuple[Ledger, str, dict[str, float]]  # the ledger, what the compiler refused with, seconds

PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cuda-nvcc-cu12", "protobuf")

DIGEST = hashlib.sha256().digest_size
MOST_KERNELS = 2**26  # bytes of them that are kept for one machine: each compilation reads and writes all of them


def folder() -> Path:
    """$JAXLLM_CACHE, or jaxllm in the user's cache folder."""
    if own := os.environ.get("JAXLLM_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxllm"


def recalled(lowered: Any, measured: Callable[[], Measured]) -> tuple[Measured, bool]:
    """What was measured of this lowered program, and whether that was before. JAXLLM_CACHE= (empty) turns it off.

    The text of a program does not say what it is for: `lowered.built.hardware` does, and is a part of the key.
    """
    if os.environ.get("JAXLLM_CACHE") == "":
        return measured(), False
    path = folder() / f"{_key(lowered)}.json"
    try:
        stored = json.loads(path.read_text())
        return (_ledger(stored["ledger"]), stored["refused"], stored["seconds"]), True
    except (OSError, ValueError, KeyError, TypeError):
        pass
    ledger, refused, seconds = measured()
    stored = {"ledger": dataclasses.asdict(ledger), "refused": refused, "seconds": seconds}
    _replace(path, json.dumps(stored).encode())
    return (ledger, refused, seconds), False


@contextlib.contextmanager
def kernels(hardware: str) -> Iterator[dict[str, str]]:
    """Options of XLA:GPU by which it takes the kernels that it has written before for this hardware, and adds its own.

    What it makes of the program is settled before and does not depend on them: a layout that differs from another in a
    few kernels has those written alone, which is most of its compiler's time (llama-tiny with jax 0.10: of 16 s 5 are left,
    with 0.12 of 28 s 18). XLA reads and writes its file without a lock and fails on a damaged one, so each compilation has a
    copy, of what has the digest that it begins with; of two at a time the last one's is kept. JAXLLM_CACHE= (empty) turns it
    off.
    """
    if os.environ.get("JAXLLM_CACHE") == "":
        yield {}
        return
    name = hashlib.sha256(repr((hardware, _flags(), _versions())).encode()).hexdigest()[:40]
    kept = folder() / "kernels" / name
    with tempfile.TemporaryDirectory(prefix=f"jaxllm-{os.getpid()}-", ignore_cleanup_errors=True) as own:
        copy = Path(own) / "kernels"
        try:
            read = kept.read_bytes()
            if read[:DIGEST] == hashlib.sha256(read[DIGEST:]).digest():
                copy.write_bytes(read[DIGEST:])
        except OSError:
            copy.unlink(missing_ok=True)
        yield {"xla_gpu_kernel_cache_file": str(copy)}
        with contextlib.suppress(OSError):
            written = copy.read_bytes()
            # Too many: the next ones are kept anew.
            _replace(kept, hashlib.sha256(written).digest() + written if len(written) <= MOST_KERNELS else b"")


def _replace(path: Path, content: bytes) -> None:
    """Written beside and moved into place, so that no other process reads a half."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError:
        pass


def _key(lowered: Any) -> str:
    digest = hashlib.sha256()
    built = lowered.built
    machine = lowered.stages.as_text(debug_info=True)
    # With names and source lines: they are what the ledger tells phases and origins by.
    parts = (machine, lowered.compiler, built.hardware, repr(built.axes), repr(_flags()), repr(_versions()))
    for part in parts:
        digest.update(part.encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        if path.parent.name in ("spec", "program", "hlo", "targets"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:40]


def _flags() -> dict[str, str]:
    return {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _ledger(stored: dict[str, Any]) -> Ledger:
    return Ledger(
        author=stored["author"],
        lines=tuple(
            Line(
                **{key: value for key, value in line.items() if key not in ("axes", "stages", "terms", "rules")},
                axes=tuple(line["axes"]),
                stages=tuple(line["stages"]),
                terms=tuple(Term(**term) for term in line["terms"]),
                rules=tuple(Rule(**rule) for rule in line["rules"]),
            )
            for line in stored["lines"]
        ),
        peak=stored["peak"],
        peak_terms=tuple(Term(**term) for term in stored["peak_terms"]),
        unexplained=tuple(stored["unexplained"]),
        notes=tuple(stored["notes"]),
    )
