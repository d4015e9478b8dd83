"""Text: a file as tokens, either its bytes or those of a tokenizer.json. The last tenth is held out."""

from __future__ import annotations

import codecs
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jaxllm.spec.errors import SpecError

BYTES = "bytes"
HELD_OUT = 10  # one token in so many, at the end of the text
# Above it a model was made for another tokenizer, and its bytes are seldom what is meant.
SMALL_VOCABULARY = 1024
_BLOCK = 2**20  # bytes that are read, decoded and encoded at a time


@dataclass(frozen=True)
class Text:
    """A text as tokens.

    tokens     int32 or uint8 (count,)
    held_out   how many of them, at the end, are for evaluation only
    tokenizer  "bytes", or the path of a tokenizer.json
    digest     SHA-256 of the file, and of the tokenizer's
    """

    path: str
    tokenizer: str
    digest: str
    size: int  # bytes
    tokens: Any
    held_out: int

    @property
    def training(self) -> Any:
        """The tokens to train on."""
        return self.tokens[: len(self.tokens) - self.held_out]

    @property
    def evaluation(self) -> Any:
        """The tokens that are held out."""
        return self.tokens[len(self.tokens) - self.held_out :]

    @cached_property
    def pair_entropy(self) -> float | None:
        """The entropy of a byte given the one before it, in nats: the loss of the best table of byte pairs.

        None when the tokens are not bytes, for then a loss is in nats for another unit.
        """
        return conditional_entropy(self.tokens) if self.tokenizer == BYTES else None


def read_text(path: str, tokenizer: str | None, vocab: int, sequence: int) -> Text:
    """The text at a path for a model of `vocab` entries and sequences of that many tokens.

    Raises SpecError when the file cannot be read, is empty, binary or too short, or the tokens do not fit the model.
    """
    kind = _tokenizer(tokenizer, vocab)
    digest = hashlib.sha256()
    pieces, size, rest = [np.zeros(0, np.uint8)], 0, ""
    for block, decoded in _blocks(path):
        digest.update(block)
        size += len(block)
        if kind == BYTES:
            pieces.append(np.frombuffer(block, np.uint8))
            continue
        # A tokenizer sees whole lines where it can, for it would cut a word in two otherwise.
        decoded = rest + decoded
        cut = decoded.rfind("\n") + 1 or len(decoded)
        pieces.append(_encode(kind, decoded[:cut]))
        rest = decoded[cut:]
    if kind != BYTES:
        pieces.append(_encode(kind, rest))
        digest.update(_read(tokenizer))
    if not size:
        raise SpecError(f"--text {path!r} is empty; give a text of some thousand words.")
    tokens = np.concatenate(pieces)
    # Two sequences at the least, one of them held out, each with the token that follows its last.
    least = 2 * (sequence + 1)
    if len(tokens) < least:
        way = f"--seq {len(tokens) // 2 - 1}" if len(tokens) >= 4 else "a longer one"
        raise SpecError(
            f"--text {path!r} has {len(tokens):,} tokens, and sequences of {sequence:,} need {least:,}; take {way}."
        )
    held_out = max(len(tokens) // HELD_OUT, sequence + 1)
    return Text(str(path), tokenizer or BYTES, digest.hexdigest(), size, tokens, held_out)


def conditional_entropy(tokens: Any) -> float:
    """H(next byte | byte) over the pairs of a text, in nats: log counts of bytes less those of pairs."""
    pairs = np.bincount(tokens[:-1].astype(np.int64) * 256 + tokens[1:], minlength=256 * 256).astype(np.float64)
    first = pairs.reshape(256, 256).sum(axis=1)

    def mean_log(counts: Any) -> float:
        seen = counts[counts > 0]
        return float(np.sum(seen * np.log(seen))) / (len(tokens) - 1)

    return max(0.0, mean_log(first) - mean_log(pairs))


def _tokenizer(text: str | None, vocab: int) -> Any:
    """`bytes`, or a tokenizer of the tokenizers library. Raises SpecError where it does not go with the vocabulary."""
    if text is None and vocab > SMALL_VOCABULARY:
        raise SpecError(
            f"the model has a vocabulary of {vocab:,}, which is not one of bytes; give its tokenizer.json with "
            "--tokenizer, or say --tokenizer bytes."
        )
    if text in (None, BYTES):
        if vocab < 256:
            raise SpecError(
                f"a text's bytes need a vocabulary of 256, and the model has {vocab:,}; give a tokenizer.json with "
                "--tokenizer."
            )
        return BYTES
    content = _read(text)
    from tokenizers import Tokenizer

    try:
        loaded = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises plain Exception
        said = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise SpecError(f"--tokenizer {text!r} is no tokenizer.json: {said}; fetch it again.") from None
    # What a model was served with would cut a text to one sequence, or fill it up.
    loaded.no_truncation()
    loaded.no_padding()
    largest = max(loaded.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= vocab:
        raise SpecError(
            f"--tokenizer {text!r} has tokens up to {largest:,}, and the model's vocabulary of {vocab:,} ends at "
            f"{vocab - 1:,}; take the model's own."
        )
    return loaded


def _encode(tokenizer: Any, text: str) -> Any:
    return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)


def _blocks(path: str) -> Iterator[tuple[bytes, str]]:
    """The file in blocks, each with its text. Raises SpecError where it cannot be read or is no UTF-8 text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = 0
    try:
        if stat.S_ISFIFO(os.stat(path).st_mode):  # it may never end, and nobody could read it again
            raise SpecError(f"--text {path!r} is a pipe, which cannot be read twice; write it to a file first.")
        with open(path, "rb") as file:
            while True:
                block = file.read(_BLOCK)
                zero = block.find(0)
                if zero >= 0:
                    raise _binary(path, at + zero)
                pending = len(decoder.getstate()[0])  # bytes of a character that the last block began
                try:
                    decoded = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    raise _binary(path, at - pending + error.start) from None
                if not block:
                    return
                at += len(block)
                yield block, decoded
    except IsADirectoryError:
        raise SpecError(f"--text {path!r} is a folder; name a text file in it.") from None
    except OSError as error:
        raise SpecError(f"--text {path!r} cannot be read: {error.strerror}; name a text file.") from None


def _binary(path: str, place: int) -> SpecError:
    return SpecError(f"--text {path!r} is not a UTF-8 text: see byte {place:,}; convert it, or give another file.")


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except IsADirectoryError:
        raise SpecError(f"--tokenizer {path!r} is a folder; name the tokenizer.json in it.") from None
    except OSError as error:
        raise SpecError(f"--tokenizer {path!r} cannot be read: {error.strerror}; name a tokenizer.json.") from None
