"""SentencePiece: reads `tokenizer.model`, and runs its BPE over any vocabulary that has scores.

The model file is a protobuf message; the few fields that Gemma uses are read and written here, so
that no protobuf package is needed. Writing one is how a GGUF vocabulary gets a tokenizer at once
(0.3 s for 262,144 pieces), and how markers are kept from matching in text.
Source: sentencepiece_model.proto (field numbers).
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from gemlax.errors import CheckpointError, UnsupportedError
from gemlax.tokenizer.vocabulary import Kind, Vocabulary

__all__ = ["make_encoder", "read_model"]

BPE = 2
# Field of the trainer spec and what its absence means.
NAMED_IDS = {"unk_id": (40, 0), "bos_id": (41, 1), "eos_id": (42, 2), "pad_id": (43, -1)}


def read_model(data: bytes, name: str) -> tuple[list[str], list[float], list[int], dict[str, int]]:
    """Read the pieces, scores, types and named ids of a `tokenizer.model`.

    Args:
        data: The file.
        name: What errors call it.

    Raises:
        CheckpointError: The file is not a whole SentencePiece model.
        UnsupportedError: It is one, but not of Gemma's kind.
    """
    pieces, scores, types = [], [], []
    specs: dict[int, dict[int, Any]] = {2: {}, 3: {}}
    try:
        for number, value in fields(data):
            if number == 1:
                piece = dict(fields(value))
                pieces.append(piece[1].decode())
                scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
                types.append(piece.get(3, Kind.NORMAL))
            elif number in specs:
                specs[number] = dict(fields(value))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise CheckpointError(f"{name} is damaged, or not a SentencePiece model") from error
    if not pieces:
        raise CheckpointError(f"{name} holds no pieces; is it a SentencePiece model?")
    trainer, normalizer = specs[2], specs[3]
    if trainer.get(3, 1) != BPE:
        raise UnsupportedError(f"{name} is not a BPE model")
    # A character map, a space in front, runs of spaces made one, spaces kept as they are.
    if (
        normalizer.get(2, b"")
        or normalizer.get(3, 1)
        or normalizer.get(4, 1)
        or not normalizer.get(5, 1)
    ):
        raise UnsupportedError(f"{name} changes text before it splits it; Gemma's models do not")
    ids = {name: trainer.get(field, default) for name, (field, default) in NAMED_IDS.items()}
    return pieces, scores, types, ids


def make_encoder(vocabulary: Vocabulary, scores: Sequence[float]) -> Callable[[str], list[int]]:
    """Return the function from text to ids that parses no marker. Safe to call from threads."""
    sentencepiece = import_sentencepiece()
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=write_model(vocabulary, scores))
    except RuntimeError as error:
        raise CheckpointError(f"sentencepiece refuses the vocabulary: {error}") from error
    return model.encode


def write_model(vocabulary: Vocabulary, scores: Sequence[float]) -> bytes:
    """Return the vocabulary as the SentencePiece model that does what Gemma's do."""
    message = bytearray()
    for piece, score, kind in zip(vocabulary.pieces, scores, vocabulary.kinds, strict=True):
        message += block(
            1, block(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + number(3, kind)
        )
    unk = vocabulary.pieces[vocabulary.unk_id].encode()
    byte_fallback = len(vocabulary.byte_values) == 256
    trainer = number(3, BPE) + number(35, byte_fallback) + number(40, vocabulary.unk_id)
    normalizer = block(1, b"identity") + number(3, 0) + number(4, 0) + number(5, 1)
    return bytes(message) + block(2, trainer + block(45, unk)) + block(3, normalizer)


def import_sentencepiece() -> ModuleType:
    """Import the package on first use."""
    try:
        import sentencepiece
    except ImportError as error:
        need = "tokenizer.model and GGUF vocabularies need: pip install sentencepiece"
        raise ImportError(need) from error
    return sentencepiece


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value) of one protobuf message, messages and floats as bytes."""
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = varint(data, at)
            yield tag >> 3, value
            continue
        if wire == 2:
            size, at = varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(data):
            raise ValueError("a field runs past the end")
        yield tag >> 3, data[at : at + size]
        at += size


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Read a base-128 number at `at`; return it and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def encode_varint(value: int) -> bytes:
    """Return a base-128 number."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def block(field: int, payload: bytes) -> bytes:
    """Return a field that holds bytes or a message."""
    return encode_varint(field << 3 | 2) + encode_varint(len(payload)) + payload


def number(field: int, value: int) -> bytes:
    """Return a field that holds a number."""
    return encode_varint(field << 3) + encode_varint(value)
