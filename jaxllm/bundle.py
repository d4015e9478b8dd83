"""The bundle of a check: all that somebody else needs to see why two ledgers disagree."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.report.compare import Comparison, Setup
from jaxllm.report.document import document
from jaxllm.spec.errors import SpecError
from jaxllm.spec.ledger import Ledger

if TYPE_CHECKING:
    from jaxllm.hlo import Dump

FILES = {
    "check.json": "what --json prints: the nouns, versions, every line by both authors, peak, rules, notes",
    "predicted.json": "the ledger of the closed form: each line with its terms and formulas",
    "compiled.json": "the ledger of the compiler: each line with its instructions and source lines",
    "step.mlir": "the step as it was lowered, StableHLO with source lines",
    "partitioned.hlo.pb": "XLA's HloProto of the module after SPMD partitioning; lines are measured from it",
    "optimized.hlo.pb": "XLA's HloProto of the optimized module with its buffer assignment; the peak is from it",
}


def check_folder(text: str) -> Path:
    """A folder for a bundle, made when it is not there. Raises SpecError when it is not empty or cannot be written."""
    if not text.strip():
        raise SpecError("--bundle is blank; name a new folder.")
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise SpecError(f"--bundle {text!r} is not empty; name a new folder, so that nothing is written over.")
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SpecError(f"--bundle {text!r} cannot be written: {error.strerror}; name another folder.") from None
    return folder


def save_program(folder: Path, text: str, dump: Dump, predicted: Ledger, compiled: Ledger) -> None:
    """Writes the program and both ledgers; a proto that the compiler did not leave is left out."""
    (folder / "step.mlir").write_text(text, encoding="utf-8")
    for name, path in (("partitioned", dump.partitioned), ("optimized", dump.optimized)):
        if path is not None:
            shutil.copyfile(path, folder / f"{name}.hlo.pb")
    for name, ledger in (("predicted", predicted), ("compiled", compiled)):
        _write(folder / f"{name}.json", dataclasses.asdict(ledger))


def save_comparison(folder: Path, comparison: Comparison, setup: Setup) -> None:
    """Writes the comparison, and README.txt, which tells the command and what each file is."""
    _write(folder / "check.json", document(comparison, setup))
    files = "".join(f"{name:20}{what}\n" for name, what in FILES.items() if (folder / name).exists())
    (folder / "README.txt").write_text(f"{command(setup)}\n\n{files}", encoding="utf-8")


def command(setup: Setup) -> str:
    """The command of a check with every default written out. Of a model from a file check.json has the fields too."""
    work, model = setup.workload, setup.model
    name = model.name if model.name in type(model).presets() else model.source
    return (
        f"jaxllm check {shlex.quote(name)} --mesh {shlex.quote(str(setup.mesh))} --layout {setup.layout} --batch {work.batch} --seq "
        f"{work.sequence} --precision {work.precision} --gradient-dtype {work.dtypes.gradients} --target {setup.target}"
    )


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
