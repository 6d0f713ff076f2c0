"""The vocabularies that tests use: the published ones, and a toy that shows every kind of piece."""

import struct
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FETCH = ROOT / "scripts" / "fetch_tokenizers"

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<unused0>"]
USER_DEFINED = ["\n\n", "▁▁", "▁▁▁", "<b>", "</b>", "[multimodal]"]
# Best first; each is two others joined. The last three would make <bos> if that could be made.
WORDS = ["he", "ll", "hell", "hello", "▁w", "or", "ld", "orld", "▁world", "éé", "<b", "os", "os>"]
CHARS = list("▁helowrdabs<>\né中")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

TOY_IDS = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
TOY_PIECES = SPECIAL + USER_DEFINED + BYTES + WORDS + CHARS
TOY_TYPES = (
    [3] * 4 + [4] * (len(SPECIAL) - 4 + len(USER_DEFINED)) + [6] * 256 + [1] * len(WORDS + CHARS)
)
TOY_SCORES = [0.0] * (len(TOY_PIECES) - len(WORDS + CHARS)) + [
    -float(rank) for rank in range(len(WORDS + CHARS))
]
# Of each word, the one split into pieces that the toy has.
TOY_MERGES = ["h e", "l l", "he ll", "hell o", "▁ w", "o r", "l d", "or ld", "▁w orld", "é é"]
TOY_MERGES += ["< b", "o s", "os >"]


def toy(**changes: Any):
    """Build a tokenizer of the toy vocabulary; `changes` replace arguments."""
    from gemlax.tokenizer import Tokenizer

    arguments = {"pieces": TOY_PIECES, "scores": TOY_SCORES, "token_types": TOY_TYPES, **TOY_IDS}
    return Tokenizer.from_vocabulary(**{**arguments, **changes})


CHAT_MARKERS = {
    "gemma3": ["<start_of_turn>", "<end_of_turn>"],
    "gemma4": [
        "<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>", '<|"|>', "<|tool>",
        "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>",
    ],
}  # fmt: skip
# Ids below are markers and bytes.
FIRST_CHAT_WORD = 280


@cache
def chat_tokenizer(family: str, num_tokens: int = 512):
    """Build a toy with the markers of a family, all bytes, characters and pairs of letters."""
    from gemlax.tokenizer import Tokenizer

    markers = ["<pad>", "<eos>", "<bos>", "<unk>", *CHAT_MARKERS.get(family, [])]
    markers += [f"<unused{i}>" for i in range(FIRST_CHAT_WORD - 256 - len(markers))]
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["▁", *letters, *'0123456789<>|"{}:,', *(a + b for a in letters for b in letters)]
    pieces = (markers + BYTES + words)[:num_tokens]
    types = [3] * len(markers) + [6] * 256
    types += [1] * (num_tokens - len(types))
    scores = [-float(i) for i in range(num_tokens)]
    return Tokenizer.from_vocabulary(pieces, scores, types, **TOY_IDS)


@cache
def sentencepiece_model(name: str) -> Path:
    """Path of the published model gemma3 or gemma4; fetched on first use."""
    path = ROOT / ".cache" / "tokenizers" / f"{name}.model"
    if not path.exists():
        done = subprocess.run([sys.executable, FETCH], capture_output=True, text=True)
        if done.returncode:
            pytest.fail(f"run scripts/fetch_tokenizers first; it failed here: {done.stderr}")
    return path


@cache
def published_tokenizer(name: str):
    """Build the tokenizer of `sentencepiece_model(name)`, once."""
    from gemlax.tokenizer import load_tokenizer

    return load_tokenizer(sentencepiece_model(name))


def gguf_header(path: Path) -> dict[str, Any]:
    """Read the metadata of a GGUF file. Source: ggml/docs/gguf.md."""
    scalars = dict(zip(range(8), "BbHhIif?", strict=True)) | {10: "Q", 11: "q", 12: "d"}
    with path.open("rb") as file:

        def scalar(code: str) -> Any:
            return struct.unpack("<" + code, file.read(struct.calcsize(code)))[0]

        def value(kind: int) -> Any:
            if kind == 8:
                return file.read(scalar("Q")).decode()
            if kind == 9:
                kind, count = scalar("I"), scalar("Q")
                return [value(kind) for _ in range(count)]
            return scalar(scalars[kind])

        assert file.read(4) == b"GGUF"
        _, _, count = scalar("I"), scalar("Q"), scalar("Q")
        return {value(8): value(scalar("I")) for _ in range(count)}


def gguf_tokenizer(path: Path, add_bos: bool = True):
    """Build the tokenizer of a GGUF file."""
    from gemlax.tokenizer import Tokenizer

    header = gguf_header(path)
    get = {key.removeprefix("tokenizer.ggml."): value for key, value in header.items()}
    return Tokenizer.from_vocabulary(
        get["tokens"],
        get["scores"],
        get["token_type"],
        bos_id=get["bos_token_id"],
        eos_id=get["eos_token_id"],
        unk_id=get["unknown_token_id"],
        pad_id=get["padding_token_id"],
        add_bos=add_bos,
    )
