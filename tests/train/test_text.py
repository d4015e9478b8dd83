"""A text as tokens: bytes or a tokenizer's, refused in one sentence where it is no text or does not fit."""

from __future__ import annotations

import json
import math
import os
import random
from collections import Counter

import numpy as np
import pytest

from jaxllm.spec.errors import SpecError
from jaxllm.train import text as module
from jaxllm.train.text import conditional_entropy, read_text

SENTENCES = "The ship lies at the pier.\nThe tide is high, and the sky is grey.\n" * 60


def written(tmp_path, content: str | bytes, name: str = "text.txt") -> str:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def tokenizer(tmp_path, words: list[str]) -> str:
    vocab = {"[UNK]": 0} | {word: i for i, word in enumerate(words, 1)}
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
    }  # fmt: skip
    return written(tmp_path, json.dumps(content), "tokenizer.json")


def test_bytes_are_tokens_and_the_last_tenth_is_held_out(tmp_path) -> None:
    found = read_text(written(tmp_path, SENTENCES), None, 256, 32)
    assert bytes(found.tokens) == SENTENCES.encode() and found.size == len(SENTENCES)
    assert len(found.evaluation) == len(SENTENCES) // 10
    assert bytes(found.training) + bytes(found.evaluation) == SENTENCES.encode()


def test_a_short_text_holds_out_a_sequence(tmp_path) -> None:
    found = read_text(written(tmp_path, "x" * 130), None, 256, 64)
    assert (len(found.training), len(found.evaluation)) == (65, 65)


def test_blocks_may_cut_a_character(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 3)
    content = "ä€𝄞 sea\n" * 9
    assert bytes(read_text(written(tmp_path, content), None, 256, 8).tokens) == content.encode()


def test_a_tokenizer_sees_whole_lines(tmp_path, monkeypatch) -> None:
    words = sorted(set(SENTENCES.replace(".", " .").replace(",", " ,").split()))
    file = tokenizer(tmp_path, words)
    whole = read_text(written(tmp_path, SENTENCES), file, 64, 16)
    assert whole.tokens.max() <= len(words) and 0 not in whole.tokens  # every word is known
    assert whole.pair_entropy is None
    monkeypatch.setattr(module, "_BLOCK", 41)
    cut = read_text(written(tmp_path, SENTENCES), file, 64, 16)
    assert np.array_equal(whole.tokens, cut.tokens) and whole.digest == cut.digest


def test_what_a_tokenizer_was_served_with_does_not_cut_or_fill_the_text(tmp_path) -> None:
    file = tokenizer(tmp_path, ["The", "ship", "tide"])
    plain = read_text(written(tmp_path, SENTENCES), file, 64, 16)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 40, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 9000}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                          "pad_type_id": 0, "pad_token": "[UNK]"}  # fmt: skip
    served = written(tmp_path, json.dumps(content), "served.json")
    assert np.array_equal(read_text(written(tmp_path, SENTENCES), served, 64, 16).tokens, plain.tokens)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SpecError, match="is a pipe, which cannot be read twice"):
        read_text(str(tmp_path / "pipe"), None, 256, 16)


def test_entropy_of_pairs_is_the_textbook_sum() -> None:
    draw = random.Random(0)
    content = bytes(draw.choices(b"abcd", (4, 3, 2, 1), k=500))
    pairs, first = Counter(zip(content, content[1:], strict=False)), Counter(content[:-1])
    expected = -sum(n / 499 * math.log(n / first[a]) for (a, _), n in pairs.items())
    assert conditional_entropy(np.frombuffer(content, np.uint8)) == pytest.approx(expected, abs=1e-12)
    assert conditional_entropy(np.frombuffer(b"abababab", np.uint8)) == 0


@pytest.mark.parametrize(
    ("content", "vocab", "sequence", "sentence"),
    [
        (b"", 256, 32, "is empty"),
        (b"abc\0def" * 99, 256, 32, "not a UTF-8 text: see byte 3"),
        (b"abc\xff" * 99, 256, 32, "not a UTF-8 text: see byte 3"),
        (b"abc" * 99 + b"\xe2\x82", 256, 32, "not a UTF-8 text: see byte 297"),
        (b"a few words", 256, 32, "has 11 tokens, and sequences of 32 need 66; take --seq 4"),
        (b"a", 256, 32, "take a longer one"),
        (b"word " * 99, 128, 32, "need a vocabulary of 256, and the model has 128"),
        (b"word " * 99, 128_256, 32, "give its tokenizer.json with --tokenizer, or say --tokenizer bytes"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, content, vocab, sequence, sentence) -> None:
    with pytest.raises(SpecError) as refused:
        read_text(written(tmp_path, content), None, vocab, sequence)
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_bytes_may_be_asked_of_a_large_vocabulary(tmp_path) -> None:
    assert read_text(written(tmp_path, SENTENCES), "bytes", 128_256, 32).tokenizer == "bytes"


def test_files_that_are_not_there_are_told(tmp_path) -> None:
    good = written(tmp_path, SENTENCES)
    for path, kind, sentence in (
        (str(tmp_path / "none"), None, "cannot be read: No such file"),
        (str(tmp_path), None, "is a folder"),
        (good, str(tmp_path / "none.json"), "--tokenizer .* cannot be read"),
        (good, str(tmp_path), "--tokenizer .* is a folder"),
        (good, good, "is no tokenizer.json"),
    ):
        with pytest.raises(SpecError, match=sentence):
            read_text(path, kind, 512, 32)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path) -> None:
    file = tokenizer(tmp_path, [f"word{i}" for i in range(300)])
    with pytest.raises(SpecError, match="has tokens up to 300, and the model's vocabulary of 300 ends at 299"):
        read_text(written(tmp_path, SENTENCES), file, 300, 32)
    assert read_text(written(tmp_path, SENTENCES), file, 301, 32).tokens.max() <= 300


def test_the_text_that_comes_with_it_is_what_its_script_writes() -> None:
    import subprocess
    import sys
    from pathlib import Path

    folder = Path(__file__).parents[2] / "docs" / "examples"
    made = subprocess.run([sys.executable, folder / "harbour.py"], capture_output=True, check=True).stdout
    assert made == (folder / "harbour.txt").read_bytes()
