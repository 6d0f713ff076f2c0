"""SentencePiece: reads `tokenizer.model`, and runs its BPE over any vocabulary that has scores.

The model file is a protobuf message; the few fields that Gemma uses are read and written here, so
that no protobuf package is needed. Writing one is how a GGUF vocabulary gets a tokenizer at once
(0.3 s for 262,144 pieces), and how markers are kept from matching in text.
Source: sentencepiece_model.proto (field numbers).
"""

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from operator import index
from typing import Any

from gemlax.errors import CheckpointError, UnsupportedError
from gemlax.tokenizer.vocabulary import Kind, Vocabulary, import_package

__all__ = ["make_encoder", "read_model"]

BPE = 2
# Field of the trainer spec and what its absence means.
NAMED_IDS = {"unk_id": (40, 0), "bos_id": (41, 1), "eos_id": (42, 2), "pad_id": (43, -1)}


def read_model(data: bytes, name: str) -> tuple[list[str], list[float], list[int], dict[str, int]]:
    """Read the pieces, scores, types and named ids of a `tokenizer.model`, called `name`."""
    pieces, scores, types = [], [], []
    try:
        (message,) = fields([data])
        for part in map(dict, fields(value for key, value in message if key == 1)):
            pieces.append(part[1].decode())
            scores.append(struct.unpack("<f", part.get(2, bytes(4)))[0])
            types.append(part.get(3, Kind.NORMAL))
        specs = dict(message)
        trainer, normalizer = map(dict, fields(specs.get(key, b"") for key in (2, 3)))
        ids = {key: index(trainer.get(field, none)) for key, (field, none) in NAMED_IDS.items()}
    except (AttributeError, IndexError, TypeError, ValueError, KeyError, struct.error) as error:
        raise CheckpointError(f"{name} is damaged, or not a SentencePiece model") from error
    if not pieces or not trainer:
        raise CheckpointError(f"{name} is cut off, or not a SentencePiece model")
    if trainer.get(3, 1) != BPE:
        raise UnsupportedError(f"{name} is not a BPE model")
    # A character map, a space in front, runs of spaces made one, spaces kept as they are.
    changes = normalizer.get(2) or normalizer.get(3, 1) or normalizer.get(4, 1)
    if changes or not normalizer.get(5, 1):
        raise UnsupportedError(f"{name} changes text before it splits it; Gemma's models do not")
    return pieces, scores, types, ids


def make_encoder(vocabulary: Vocabulary, scores: Sequence[float]) -> Callable[[str], list[int]]:
    """Return the function from text to ids that parses no marker. Safe to call from threads."""
    sentencepiece = import_package("sentencepiece", "a vocabulary with scores")
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=write_model(vocabulary, scores))
    except RuntimeError as error:
        raise CheckpointError(f"sentencepiece refuses the vocabulary: {error}") from error
    size = len(vocabulary.pieces)
    if len(model) == size:
        return model.encode
    return partial(encode_known, model, size, vocabulary.unk_id)


def encode_known(model: Any, size: int, unk_id: int, text: str) -> list[int]:
    """Return the ids of a text; what would be a byte that has no piece is unknown."""
    return [id if id < size else unk_id for id in model.encode(text)]


def write_model(vocabulary: Vocabulary, scores: Sequence[float]) -> bytes:
    """Return the vocabulary as the SentencePiece model that does what Gemma's do.

    SentencePiece takes all bytes or none: pieces of those that are missing come last.
    """
    size = cache(encode_varint)
    message = bytearray()
    known = set(vocabulary.byte_values.values())
    missing = [byte for byte in range(256) if known and bytes([byte]) not in known]
    names, kinds = list(vocabulary.pieces), list(vocabulary.kinds)
    for id in vocabulary.other_ids:
        names[id], kinds[id] = vocabulary.name(id), Kind.UNUSED
    names += [f"<0x{byte:02X}>" for byte in missing]
    kinds += [Kind.BYTE] * len(missing)
    scores = [*scores, *[0.0] * len(missing)]
    for name, score, kind in zip(names, scores, kinds, strict=True):
        text = name.encode()
        body = (
            b"\x0a" + size(len(text)) + text + struct.pack("<BfBB", 2 << 3 | 5, score, 3 << 3, kind)
        )
        message += b"\x0a" + size(len(body)) + body
    trainer = number(3, BPE) + number(35, bool(known))
    ids = {40: vocabulary.unk_id, 41: vocabulary.bos_id}
    ids |= {42: vocabulary.eos_id, 43: vocabulary.pad_id}
    for field, id in ids.items():
        # The piece's name has a field of its own.
        trainer += number(field, id) + block(field + 5, vocabulary.pieces[id].encode())
    normalizer = block(1, b"identity") + number(3, 0) + number(4, 0) + number(5, 1)
    return bytes(message) + block(2, trainer) + block(3, normalizer)


def fields(messages: Iterable[bytes]) -> Iterator[list[tuple[int, Any]]]:
    """Yield the (field number, value) list of each protobuf message.

    Messages and floats come as bytes. A vocabulary has 262,144 messages: for numbers below 128
    nothing is called.
    """
    for data in messages:
        pos, end = 0, len(data)
        pairs: list[tuple[int, Any]] = []
        while pos < end:
            tag, pos = (data[pos], pos + 1) if data[pos] < 128 else varint(data, pos)
            wire = tag & 7
            if wire in (0, 2):
                value, pos = (data[pos], pos + 1) if data[pos] < 128 else varint(data, pos)
            elif wire in (1, 5):
                value = 8 if wire == 1 else 4
            else:
                raise ValueError(f"wire type {wire}")
            if wire == 0:
                pairs.append((tag >> 3, value))
                continue
            pos += value
            if pos > end:
                raise ValueError("a field runs past the end")
            pairs.append((tag >> 3, data[pos - value : pos]))
        yield pairs


def varint(data: bytes, pos: int) -> tuple[int, int]:
    """Read a base-128 number at `pos`; return it and where it ends."""
    value = shift = 0
    while True:
        byte = data[pos]
        pos += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, pos
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
