"""What a Gemma vocabulary is, checked once: pieces, their kinds and the four named ids.

Files disagree on the kinds: SentencePiece marks turn markers as user-defined, llama.cpp some of
them as control, converters some as normal text. Here a marker is control whatever its label, so
that untrusted text can never produce one.
"""

import importlib
import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from types import ModuleType
from typing import Any

from gemlax.errors import CheckpointError, UnsupportedError

__all__ = ["NAMES", "SPACE", "Kind", "Vocabulary", "find_named", "import_package"]

logger = logging.getLogger(__name__)

# The piece character that stands for a space.
SPACE = "▁"

# The pieces that have a name, as Gemma writes them.
NAMES = {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "unk": "<unk>"}

# Pieces that steer the model: <|turn>, <turn|>, <|image|>, <start_of_turn>, <image_soft_token>,
# <unused7>; FunctionGemma's <start_function_call> and <escape>. Runs of whitespace, HTML tags and
# [multimodal] are none, and none of the 255,474 normal pieces of the published vocabularies is
# written like one.
MARKER = re.compile(
    r"<\|.*>|<.*\|>|<(start|end)_(of|function)_\w+>|<\w+_soft_token>|<unused\d+>"
    r"|<(pad|eos|bos|unk|mask|escape)>"
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
    """The pieces by id, a kind for each, and the ids that have a name.

    A piece may be there several times, or be empty: see `ids`. `strips` says of markers whether
    they take in the blanks to their left and right.
    """

    pieces: Sequence[str]
    kinds: Sequence[Kind]
    bos_id: int
    eos_id: int
    pad_id: int
    unk_id: int
    add_bos: bool
    strips: Mapping[int, tuple[bool, bool]]

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
        strips: Mapping[int, tuple[bool, bool]] | None = None,
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
        settled = settle(pieces, kinds)
        for id in named.values():
            settled[id] = Kind.CONTROL
        settled[unk_id] = Kind.UNKNOWN
        vocabulary = cls(pieces, settled, bos_id, eos_id, pad_id, unk_id, add_bos, strips or {})
        twice = [pieces[id] for id in vocabulary.other_ids if pieces[id]]
        if twice:
            logger.warning(
                "%d pieces have several ids (%r: %d counts); the others are read, not written",
                len(twice), twice[0], vocabulary.ids[twice[0]],
            )  # fmt: skip
        return vocabulary

    @cached_property
    def ids(self) -> dict[str, int]:
        """Id of each piece, of several the last one, as in llama.cpp, unless one has a name."""
        named = (self.bos_id, self.eos_id, self.pad_id, self.unk_id)
        used = (id for id, kind in enumerate(self.kinds) if kind != Kind.UNUSED)
        order = itertools.chain(sorted(self.unused_ids), used, named)
        return {self.pieces[id]: id for id in order if self.pieces[id]}

    @cached_property
    def other_ids(self) -> list[int]:
        """Ids whose piece is empty or another id's."""
        ids = self.ids
        if len(ids) == len(self.pieces):
            return []
        return [id for id, piece in enumerate(self.pieces) if ids.get(piece) != id]

    def name(self, id: int) -> str:
        """Return the piece, or a name as llama.cpp's where it is unused or another id's."""
        piece = self.pieces[id]
        used = self.ids.get(piece) == id and self.kinds[id] != Kind.UNUSED
        return piece if used else f"[PAD{id}]"

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
    # Written at length for speed: there are 262,144 pieces.
    bytes_named = {piece for piece in pieces if piece[:3] == "<0x" and BYTE.fullmatch(piece)}
    has_bytes = len(bytes_named) > 128
    for id, (piece, kind) in enumerate(zip(pieces, kinds, strict=True)):
        if kind not in BY_VALUE:
            where = f"the piece {piece!r} of id {id}"
            raise UnsupportedError(f"{where} is of type {kind}, expected 1 to 6")
        if kind == Kind.BYTE and not BYTE.fullmatch(piece):
            raise CheckpointError(f"the piece {piece!r} of id {id} is typed as a byte, not <0xNN>")
        # A vocabulary has one unknown piece, which its caller names.
        if kind == Kind.UNKNOWN:
            settled.append(Kind.CONTROL)
        elif kind not in (Kind.CONTROL, Kind.BYTE) and MARKER.fullmatch(piece):
            settled.append(Kind.CONTROL)
            if kind != Kind.USER_DEFINED:  # as SentencePiece calls them
                mislabelled.append(piece)
        elif has_bytes and piece in bytes_named and kind in (Kind.NORMAL, Kind.USER_DEFINED):
            settled.append(Kind.BYTE)
        # As llama.cpp fills a list up; and nothing can be split into an empty piece.
        elif not piece or (kind == Kind.NORMAL and piece == f"[PAD{id}]"):
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


def import_package(name: str, user: str) -> ModuleType:
    """Import a package on first use."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{user} needs: pip install {name}") from error


def find_named(name: str, ids: Mapping[str, int], said: Any, default: int, source: object) -> int:
    """Return the id of the bos, eos, pad or unk piece.

    A settings file says it as a piece, as {"content": piece}, or not at all: then it is `default`,
    if that lies in the vocabulary. `source` is what errors call the vocabulary.
    """
    if not said and 0 <= default < len(ids):
        return default
    piece = said.get("content") if isinstance(said, Mapping) else said or NAMES[name]
    if not isinstance(piece, str) or piece not in ids:
        raise CheckpointError(f"{source} has no piece {piece!r}, which should be its {name} token")
    return ids[piece]
