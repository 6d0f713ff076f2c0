"""What a Gemma vocabulary is, checked once: pieces, their kinds and the four named ids.

Files disagree on the kinds: SentencePiece marks turn markers as user-defined, llama.cpp some of
them as control. Here a marker is control wherever it comes from, so that untrusted text can never
produce one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

from gemlax.errors import CheckpointError, UnsupportedError

__all__ = ["SPACE", "Kind", "Vocabulary"]

# The piece character that stands for a space.
SPACE = "▁"

# User-defined pieces that steer the model: <|turn>, <turn|>, <|image|>, <start_of_turn>,
# <image_soft_token>, <unused7>. Runs of whitespace, HTML tags and [multimodal] are none.
MARKER = re.compile(
    r"<\|.*>|<.*\|>|<(start|end)_of_\w+>|<\w+_soft_token>|<unused\d+>|<(pad|eos|bos|unk|mask)>"
)
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Kind(IntEnum):
    """The kind of a piece. Source: sentencepiece_model.proto, SentencePiece.Type; GGUF's equal."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """The pieces by id, a kind for each, and the ids that have a name."""

    pieces: Sequence[str]
    kinds: Sequence[Kind]
    bos_id: int
    eos_id: int
    pad_id: int
    unk_id: int
    add_bos: bool

    @classmethod
    def create(
        cls,
        pieces: Sequence[str],
        kinds: Sequence[int],
        *,
        bos_id: int,
        eos_id: int,
        pad_id: int,
        unk_id: int,
        add_bos: bool,
    ) -> "Vocabulary":
        """Check the lists of a file and settle the kinds; raise CheckpointError for what is wrong.

        GGUF writes runs of spaces as spaces, SentencePiece as U+2581: both become U+2581.
        """
        if len(kinds) != len(pieces):
            raise CheckpointError(f"{len(pieces)} pieces but {len(kinds)} token types")
        named = {"bos": bos_id, "eos": eos_id, "pad": pad_id, "unk": unk_id}
        for name, id in named.items():
            if not 0 <= id < len(pieces):
                raise CheckpointError(f"{name} id {id} is outside 0 to {len(pieces) - 1}")
        pieces = [piece.replace(" ", SPACE) for piece in pieces]
        settled = [
            settle(id, piece, kind)
            for id, (piece, kind) in enumerate(zip(pieces, kinds, strict=True))
        ]
        for id in named.values():
            settled[id] = Kind.CONTROL
        settled[unk_id] = Kind.UNKNOWN
        if len(set(pieces)) != len(pieces):
            raise CheckpointError(f"the piece {first_duplicate(pieces)!r} has two ids")
        return cls(pieces, settled, bos_id, eos_id, pad_id, unk_id, add_bos)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Id of each piece."""
        return {piece: id for id, piece in enumerate(self.pieces)}

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that stand for no text: named, turn, media and unused markers."""
        special = (Kind.CONTROL, Kind.UNKNOWN)
        return frozenset(id for id, kind in enumerate(self.kinds) if kind in special)

    @cached_property
    def byte_values(self) -> dict[int, bytes]:
        """The byte that each byte piece stands for."""
        return {
            id: bytes.fromhex(piece[3:5])
            for id, (piece, kind) in enumerate(zip(self.pieces, self.kinds, strict=True))
            if kind == Kind.BYTE
        }


def settle(id: int, piece: str, kind: int) -> Kind:
    """Return the kind of a piece as gemlax understands it."""
    if not piece:
        raise CheckpointError(f"the piece of id {id} is empty")
    if kind not in (1, 2, 3, 4, 6):
        raise UnsupportedError(f"piece {id} {piece!r} is of type {kind}; Gemma has 1, 2, 3, 4, 6")
    if kind == Kind.BYTE and not BYTE.fullmatch(piece):
        raise CheckpointError(f"piece {id} {piece!r} is typed as a byte, expected <0xNN>")
    if kind == Kind.UNKNOWN or (kind == Kind.USER_DEFINED and MARKER.fullmatch(piece)):
        return Kind.CONTROL
    return Kind(kind)


def first_duplicate(pieces: Sequence[str]) -> str:
    """Return the first piece that occurs again."""
    seen: set[str] = set()
    for piece in pieces:
        if piece in seen:
            return piece
        seen.add(piece)
    raise AssertionError("no duplicate")
