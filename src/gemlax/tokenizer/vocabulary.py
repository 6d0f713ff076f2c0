"""What a Gemma vocabulary is, checked once: pieces, their kinds and the four named ids.

Files disagree on the kinds: SentencePiece marks turn markers as user-defined, llama.cpp some of
them as control, converters some as normal text. Here a marker is control whatever its label, so
that untrusted text can never produce one.
"""

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any

from gemlax.errors import CheckpointError, UnsupportedError

__all__ = ["NAMES", "SPACE", "Kind", "Vocabulary", "find_named"]

logger = logging.getLogger(__name__)

# The piece character that stands for a space.
SPACE = "▁"

# The pieces that have a name, as Gemma writes them.
NAMES = {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "unk": "<unk>"}

# Pieces that steer the model: <|turn>, <turn|>, <|image|>, <start_of_turn>, <image_soft_token>,
# <unused7>. Runs of whitespace, HTML tags and [multimodal] are none, and none of the 255,474
# normal pieces of the published vocabularies is written like one.
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


# Looked up, for calling Kind() 262,144 times takes 0.1 s.
BY_VALUE = {kind.value: kind for kind in Kind}


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
        if "" in pieces:
            raise CheckpointError(f"the piece of id {pieces.index('')} is empty")
        if len(set(pieces)) != len(pieces):
            piece = next(piece for piece, count in Counter(pieces).items() if count > 1)
            raise CheckpointError(f"the piece {piece!r} has two ids")
        settled = settle(pieces, kinds)
        for id in named.values():
            settled[id] = Kind.CONTROL
        settled[unk_id] = Kind.UNKNOWN
        return cls(pieces, settled, bos_id, eos_id, pad_id, unk_id, add_bos)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Id of each piece."""
        return {piece: id for id, piece in enumerate(self.pieces)}

    @cached_property
    def unused_ids(self) -> frozenset[int]:
        """Ids that fill the list up: no text is split into them."""
        return frozenset(id for id, kind in enumerate(self.kinds) if kind == Kind.UNUSED)

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


def settle(pieces: Sequence[str], kinds: Sequence[int]) -> list[Kind]:
    """Return the kinds as gemlax understands them: names decide where a label is wrong."""
    settled, mislabelled = [], []
    for id, (piece, kind) in enumerate(zip(pieces, kinds, strict=True)):
        if kind not in BY_VALUE:
            known = "expected 1 to 6"
            raise UnsupportedError(f"the piece {piece!r} of id {id} is of type {kind}, {known}")
        if kind == Kind.BYTE and not BYTE.fullmatch(piece):
            raise CheckpointError(f"the piece {piece!r} of id {id} is typed as a byte, not <0xNN>")
        # A vocabulary has one unknown piece, which its caller names.
        if kind == Kind.UNKNOWN:
            settled.append(Kind.CONTROL)
        elif kind not in (Kind.CONTROL, Kind.BYTE) and MARKER.fullmatch(piece):
            settled.append(Kind.CONTROL)
            if kind != Kind.USER_DEFINED:  # as SentencePiece calls them
                mislabelled.append(piece)
        elif kind == Kind.NORMAL and piece == f"[PAD{id}]":  # as llama.cpp fills a list up
            settled.append(Kind.UNUSED)
        else:
            settled.append(BY_VALUE[kind])
    if mislabelled:
        some = ", ".join(mislabelled[:4]) + (", ..." if len(mislabelled) > 4 else "")
        logger.warning(
            "the vocabulary calls %d markers ordinary text (%s); they are read as control tokens",
            len(mislabelled), some,
        )  # fmt: skip
    return settled


def find_named(name: str, ids: Mapping[str, int], told: Any, default: int, source: object) -> int:
    """Return the id of the bos, eos, pad or unk piece.

    Args:
        name: "bos", "eos", "pad" or "unk".
        ids: By piece.
        told: What a settings file calls it: a piece, {"content": piece}, or None.
        default: Its id if the settings are silent; outside the vocabulary: none is known.
        source: What errors call the vocabulary.
    """
    if not told and 0 <= default < len(ids):
        return default
    piece = told.get("content") if isinstance(told, Mapping) else told or NAMES[name]
    if not isinstance(piece, str) or piece not in ids:
        raise CheckpointError(f"{source} has no piece {piece!r}, which should be its {name} token")
    return ids[piece]
