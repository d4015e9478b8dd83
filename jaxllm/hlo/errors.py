"""What is wrong with a file, and where."""

from __future__ import annotations

from jaxllm.spec.errors import SpecError

_LONGEST = 400  # letters of a reason, in which names of a damaged file may stand


class ParseError(SpecError):
    """A file that is not what it should be. `offset` is the byte at which that shows, `line` its line in a text."""

    def __init__(self, file: str, offset: int, reason: str, line: int = 0) -> None:
        place = f"line {line:,}, byte {offset:,}" if line else f"byte {offset:,}"
        told = "".join(letter if letter.isprintable() else "?" for letter in reason)
        if len(told) > _LONGEST:
            half = _LONGEST // 2
            told = f"{told[:half]} ... {told[-half:]}"
        super().__init__(f"{file}: {place}: {told}")
        self.offset = offset
        self.line = line
