"""Executes README.md and docs/: every command and every Python block, and compares what they print with the page.

    python -m tests.docs.execute              compares all pages
    python -m tests.docs.execute --write      writes what is printed into the pages, and draws their pictures again

A block ```console holds lines `$ jaxllm ...`, each with its output. `<!-- show: NAMES -->` before the block keeps a part
of a long output: lines that begin with one of the names, which are separated by `;`, and with `NAME*` the whole
paragraph that begins so; blanks count as one; what is left out becomes `...`. A block ```text after a block ```python is what that prints.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
# docs/grid.md is written by tests/grid.py, from runs of its own.
PAGES = (ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name != "grid.md"))

CONSOLE = re.compile(r"(?:<!-- show: (?P<show>[^\n]*) -->\n)?```console\n(?P<body>.*?)```\n", re.S)
PYTHON = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n?```text\n(?P<text>.*?)```\n)?", re.S)
BLOCK = re.compile(f"{CONSOLE.pattern}|{PYTHON.pattern}", re.S)

# What another version of a compiler, or another machine, prints otherwise: a pattern, and how far its numbers, the
# groups, may be off; without groups, any will do. Lines are joined before: a longer number breaks them elsewhere.
VOLATILE = (
    (r"; XLA:\w+ ([\d,]+) \(([\d.]+) \wB\); an estimate, off by \S+ %, \w+ the", 0.1),
    (r"capacity  ([\d.]+) \wB is ([\d.]+) %", 0.1),
    (r"does not fit, ([\d.]+) \wB too much", 0.1),
    (r'"compiled": (\d+),\n    "capacity"', 0.1),
    (r"(?<=does not fit: the compiler says ).*", 0),
    (r"largest relative error \S+ in \S+ <= ", 0),
    (r"(?<=losses )([\d.]+), ([\d.]+), ([\d.]+)", 1e-3),
    (r"\nloss +([\d.]+) at step \d+, ([\d.]+) at step", 1e-3),
    (r"this machine has [\d.]+ \wB", None),
    (r"(?<=layouts, memory and time, in )[\d.]+ \w?s", None),
    (r"\nheld out +([\d.]+) after", 1e-3),
    (r"\nseconds .*", 0),
    (r"\n    emitted .*", 0),
    (r"\nnote: .*(\n  .*)*", None),
    # an inspected program: what a version of XLA decides about memory, traffic and the names of what it combines
    (r"\n  The peak is at step .*(\n    .*)*", None),
    (r"\n  bound by (memory|network) .*", None),
    (r"(?<=\n)  total +[\d.]+ [um]?s  100 %", None),
    (r"\n  (bytes (read|written)) .*", None),
    (r"\n  (FLOPs|(payload of|sent by) collectives) .*", None),
    (r"\n  all-gather/axis0/(recompute|backward)/f32(\n    .*)*", None),
    (r"(?<=not those expected:\n  all-gather/data: 1 times a step, 24 expected)\n.*", None),
    (r"the peak of jit_loss is .*(\n  \w.*: .*)*", None),
    (r"(?<=products, peak )[\d,]+ bytes:\n.*", None),
    (r"\n\d+ +\d+ of \d+ +[\d.]+ \wB, ([\d.]+) \wB(?: \(\S+ %\))?", 0.2),
    # a program that is played: what a version of XLA schedules and fuses
    (r"played\son\sthe\ssame\smachine[^:]*:\s([\d.]+)\s\w?s,\s\S+\s%\sof\sthe\sclosed\sform's[^:]*:[^:]*of\sit\.", 0.1),
    (r"\n(?:what else goes through memory|matmuls|optimizer|collectives over \S+) +[\d.]+ \w?s +([\d.]+) \w?s +[-+].*", 0.2),
    (r"\n(?:what else goes through memory|collectives over \S+): [-+].*(\n  .*)*", None),
    (r"(?<=[a-z])\.\d+\b", None),  # of an instruction: while.110
    (r"(?<=\.py):\d+", None),  # of a source line
)


@dataclass(frozen=True)
class Printed:
    text: str
    code: int


class Session:
    """Runs commands and code as a reader would, from the root of a checkout, each command once.

    The checkout is a folder of links to this one, but for runs/, so that what a command leaves is not left here.
    """

    def __init__(self, cache: Path, *, draw: bool = False):
        self.cache, self.draw = cache, draw
        self.printed: dict[str, Printed] = {}
        self.root = Path(tempfile.mkdtemp(dir=cache))
        for path in ROOT.iterdir():
            if path.name != "runs":
                (self.root / path.name).symlink_to(path)

    @contextlib.contextmanager
    def _outside(self) -> Iterator[io.StringIO]:
        """What a shell would provide: the folder, a narrow terminal, a cache."""
        out = io.StringIO()
        own = {"JAXLLM_CACHE": str(self.cache), "COLUMNS": "80"}
        before = {name: os.environ.get(name) for name in own}
        os.environ.update(own)
        try:
            with contextlib.chdir(self.root), contextlib.redirect_stdout(out):
                yield out
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    def command(self, line: str) -> Printed:
        """Runs `jaxllm ...`; an error is what it prints when it prints nothing else."""
        if line not in self.printed:
            from jaxllm.cli import main

            words = shlex.split(line)
            while "=" in words[0]:  # a reader has to set what prepare() has set here
                name, value = words.pop(0).split("=", 1)
                assert value in os.environ.get(name, ""), f"{name}={value} does not hold here: {line}"
            program, *arguments = words
            assert program == "jaxllm", f"pages run jaxllm only: {line}"
            for option in ("--plot", "--png"):
                if option in arguments and not self.draw:
                    place = arguments.index(option) + 1
                    arguments[place] = str(self.cache / Path(arguments[place]).name)
            errors = io.StringIO()
            with self._outside() as out, contextlib.redirect_stderr(errors):
                code = main(arguments)
            text = out.getvalue() or errors.getvalue().splitlines(keepends=True)[-1]
            self.printed[line] = Printed(text, code)
        return self.printed[line]

    def code(self, code: str, names: dict[str, Any]) -> str:
        with self._outside() as out:
            exec(compile(code, "example.py", "exec"), names)
        return out.getvalue()


def prepare() -> None:
    """Starts jax with eight emulated devices and both other compilers at hand."""
    from jaxllm.targets import start

    for target in ("cpu", "gpu", "tpu"):
        start.prepare(target, 8)


def rendered(page: str, session: Session) -> str:
    """The page with all output replaced by what is printed now."""
    names: dict[str, Any] = {}

    def console(match: re.Match[str]) -> str:
        lines, code = [], 0
        for line in match["body"].splitlines():
            if not line.startswith("$ "):
                continue
            if line == "$ echo $?":
                lines += [line, str(code)]
                code = 0
                continue
            assert code == 0, f"exit code {code} without `$ echo $?`, before {line}"
            printed = session.command(line.removeprefix("$ "))
            code = printed.code
            text = select(printed.text, match["show"].split(";")) if match["show"] else printed.text
            lines += [line, *text.rstrip("\n").splitlines()]
        assert code == 0, f"exit code {code} without `$ echo $?`:\n{match['body']}{lines[-1]}"
        show = f"<!-- show: {match['show']} -->\n" if match["show"] else ""
        return f"{show}```console\n" + "\n".join(lines) + "\n```\n"

    def python(match: re.Match[str]) -> str:
        text = session.code(match["code"], names)
        return f"```python\n{match['code']}```\n" + (f"\n```text\n{text.rstrip()}\n```\n" if text else "")

    # in the order of the page: a command may read what a block of Python wrote
    return BLOCK.sub(lambda match: python(match) if match["body"] is None else console(match), page)


def select(text: str, names: list[str]) -> str:
    """The lines that the names choose, with what belongs to them: the lines below that are indented deeper."""
    wanted = [name.strip() for name in names]
    whole = tuple(name[:-1] for name in wanted if name.endswith("*"))
    single = tuple(name for name in wanted if not name.endswith("*"))
    found: set[str] = set()
    kept: list[tuple[str, bool]] = []
    for paragraph in text.rstrip("\n").split("\n\n"):
        lines = paragraph.splitlines()
        everything = lines[0].startswith(whole) if whole else False
        first = len(kept)
        below = None  # the indent of the last line that was chosen by name
        for line in lines:
            indent = len(line) - len(line.lstrip())
            plain = " ".join(line.split())
            chosen = everything or bool(single and plain.startswith(single))
            if chosen:
                below = indent
                found |= {name for name in wanted if plain.startswith(name.rstrip("*"))}
            elif below is not None and indent > below:
                chosen = True
            else:
                below = None
            kept.append((line, chosen))
        if len(lines) > 2 and lines[1].startswith(" " * 10) and any(chosen for _, chosen in kept[first + 2 :]):
            kept[first : first + 2] = [(line, True) for line in lines[:2]]  # a row needs its title and heads
        kept.append(("", False))
    kept.pop()
    missing = set(wanted) - found
    assert not missing, f"nothing that is printed begins with {missing}:\n{text}"
    # a blank line stays between two lines that stay
    for i, (line, _) in enumerate(kept):
        if not line and 0 < i < len(kept) - 1 and kept[i - 1][1] and kept[i + 1][1]:
            kept[i] = (line, True)
    shown: list[str] = []
    for line, chosen in kept:
        if chosen:
            shown.append(line)
        elif not shown or shown[-1] != "...":
            shown.append("...")
    return "\n".join(shown) + "\n"


def differences(page: str, now: str) -> list[str]:
    """Where a page and what is printed now differ, beyond what may; empty when they agree."""
    (old, old_numbers), (new, new_numbers) = _stable(page), _stable(now)
    lines = list(difflib.unified_diff(old.splitlines(), new.splitlines(), "page", "printed", lineterm="", n=1))
    for (mine, tolerance), (theirs, _) in zip(old_numbers, new_numbers, strict=not lines):
        if abs(mine - theirs) > tolerance * abs(theirs):
            lines.append(f"the page has {mine:,} and {theirs:,} is printed, more than {tolerance:.0%} off")
    return lines


def _stable(text: str) -> tuple[str, list[tuple[float, float]]]:
    """A text without its volatile parts, and their numbers with the tolerance of each."""
    text = re.sub(r"\n {10}\s*", " ", text)
    numbers: list[tuple[float, float]] = []
    for pattern, tolerance in VOLATILE:

        def forget(match: re.Match[str], tolerance: float | None = tolerance) -> str:
            if tolerance:  # else it has no groups, or none that count
                numbers.extend((float(group.replace(",", "")), tolerance) for group in match.groups())
            return "" if match[0].startswith("\n") else "~"

        text = re.sub(pattern, forget, text)
    return re.sub(r"\n{2,}", "\n\n", text), numbers


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Executes README.md and docs/.")
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES)
    parser.add_argument("--write", action="store_true", help="write what is printed into the pages")
    options = parser.parse_args(arguments)
    prepare()
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr)  # noqa: E731
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        session = Session(Path(folder), draw=options.write)
        for path in options.pages:
            page = path.read_text()
            now = rendered(page, session)
            found = differences(page, now)
            say(f"{path.name}: {'as printed' if not found else 'differs'}")
            if options.write:
                path.write_text(now)
            elif found:
                failed = 1
                say("\n".join(found))
    return failed


if __name__ == "__main__":
    sys.exit(main())
