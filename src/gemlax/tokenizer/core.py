"""The tokenizer that everything else uses: ids for text, text for ids, and the named ids."""

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from operator import index
from pathlib import Path
from shutil import copyfile
from typing import SupportsIndex

from gemlax.errors import CheckpointError, RequestError
from gemlax.tokenizer import fast, spm
from gemlax.tokenizer.vocabulary import SPACE, Kind, Vocabulary

__all__ = ["Tokenizer"]

logger = logging.getLogger(__name__)


class Tokenizer:
    """A Gemma vocabulary and the algorithm that goes with it. Safe to use from several threads.

    A space is U+2581 inside the vocabulary, so that U+2581 in a text is read as a space and comes
    back as one. Every other text, NUL included, comes back unchanged.

    Attributes:
        add_bos: Whether the checkpoint wants BOS before plain text. `encode` ignores it: its own
            argument says what it does.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        encoder: Callable[[str], list[int]],
        make_json: Callable[[], str],
        files: Mapping[str, Path] | None = None,
    ) -> None:
        """Join the parts; users call `load_tokenizer` or `from_vocabulary`.

        Args:
            vocabulary: The pieces.
            encoder: From text to ids, all markers taken as ordinary text.
            make_json: Writes `tokenizer.json` if `files` has none, or it is gone.
            files: The files that it came from, by the name under which `save` copies them.
        """
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.pad_id = vocabulary.pad_id
        self.unk_id = vocabulary.unk_id
        self.add_bos = vocabulary.add_bos
        self.num_tokens = len(vocabulary.pieces)
        self.special_ids = vocabulary.special_ids
        self.unused_ids = vocabulary.unused_ids
        self.named_pieces: Mapping[str, str] = {}
        self._vocabulary = vocabulary
        self._encoder = encoder
        self._make_json = make_json
        self._files = dict(files or {})

    @classmethod
    def from_vocabulary(
        cls,
        pieces: Sequence[str],
        scores: Sequence[float],
        token_types: Sequence[int],
        *,
        bos_id: int,
        eos_id: int,
        unk_id: int,
        pad_id: int,
        add_bos: bool = True,
        merges: Sequence[str] | None = None,
        strips: Mapping[int, tuple[bool, bool]] | None = None,
        files: Mapping[str, Path] | None = None,
    ) -> "Tokenizer":
        """Build a tokenizer from the lists of a GGUF header.

        Args:
            pieces: `tokenizer.ggml.tokens`.
            scores: `tokenizer.ggml.scores`; not used if there are merges.
            token_types: `tokenizer.ggml.token_type`.
            bos_id: `tokenizer.ggml.bos_token_id`; and so on.
            eos_id: Likewise.
            unk_id: Likewise.
            pad_id: Likewise.
            add_bos: `tokenizer.ggml.add_bos_token`.
            merges: `tokenizer.ggml.merges`, pairs joined by a space. Gemma 4 files have them, and
                scores that say nothing. None or empty: the scores rank.
            strips: See `Vocabulary`.
            files: See `__init__`.
        """
        ids = {"bos_id": bos_id, "eos_id": eos_id, "pad_id": pad_id, "unk_id": unk_id}
        vocabulary = Vocabulary.create(pieces, token_types, add_bos=add_bos, strips=strips, **ids)
        if merges:
            unused = {piece for piece, id in vocabulary.ids.items() if id in vocabulary.unused_ids}
            pairs = [split_merge(merge) for merge in merges]
            pairs = [pair for pair in pairs if "".join(pair) not in unused] if unused else pairs
            text = fast.to_json(vocabulary, pairs)
            return cls(vocabulary, fast.from_json(vocabulary, text), partial(str, text), files)
        check_scores(vocabulary, scores)
        make_json = partial(fast.scored_json, vocabulary, scores)
        return cls(vocabulary, spm.make_encoder(vocabulary, scores), make_json, files)

    def encode(self, text: str, *, add_bos: bool = True, parse_special: bool = False) -> list[int]:
        """Return the ids of a text.

        Args:
            text: Any text that UTF-8 can encode.
            add_bos: Put BOS first, unless it is there already (`parse_special`).
            parse_special: Read markers such as <bos> and <end_of_turn> in the text as what they
                name. Never for text that a user wrote: without it no text makes a special id.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            where = f"{text[error.start]!r} at {error.start}"
            raise RequestError(f"the text holds a lone surrogate, {where}") from error
        ids: list[int] = []
        for part in self.split_special(text) if parse_special else (text,):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._encode_ordinary(part)
        return [self.bos_id, *ids] if add_bos and ids[:1] != [self.bos_id] else ids

    def _encode_ordinary(self, text: str) -> list[int]:
        """Return ids of which none is a marker or unused, whatever the encoder makes of the text.

        Merges of a file, or its `ignore_merges`, may lead to a marker: then its text is split
        after the first character.
        """
        ids = self._encoder(text)
        if self._never.isdisjoint(ids):
            return ids
        ids = []
        for part in self.split_special(text):
            whole = part if isinstance(part, str) else self.piece(part).replace(SPACE, " ")
            first = 0 if isinstance(part, str) else 1
            ids += [*self._encoder(whole[:first]), *self._encoder(whole[first:])]
        spelled = ([id] if id not in self._never else self._spell(id) for id in ids)
        return [id for some in spelled for id in some]

    def _spell(self, id: int) -> list[int]:
        """Return the text of a piece as byte pieces, or as the unknown one."""
        bytes_of = {value[0]: byte for byte, value in self._vocabulary.byte_values.items()}
        text = self.piece(id).replace(SPACE, " ").encode()
        return [bytes_of.get(byte, self.unk_id) for byte in text]

    def decode(self, ids: Iterable[SupportsIndex], *, skip_special: bool = True) -> str:
        """Return the text of ids; bytes that are no UTF-8 become U+FFFD.

        Raises:
            RequestError: An id is not in the vocabulary.
        """
        data = (self.token_bytes(index(id), skip_special=skip_special) for id in ids)
        return b"".join(data).decode(errors="replace")

    def token_bytes(self, id: int, *, skip_special: bool = True) -> bytes:
        """Return what one id adds to the text, as UTF-8; it may be part of a character."""
        piece = self.piece(id)
        if skip_special and id in self.special_ids:
            return b""
        byte = self._vocabulary.byte_values.get(id)
        return piece.replace(SPACE, " ").encode() if byte is None else byte

    def piece(self, id: int) -> str:
        """Return the piece of an id as the vocabulary writes it (U+2581, <0x0A>)."""
        if not 0 <= id < self.num_tokens:
            raise RequestError(f"token id {id} is outside 0 to {self.num_tokens - 1}")
        return self._vocabulary.pieces[id]

    def id_of(self, piece: str) -> int | None:
        """Return the id of a piece written as the vocabulary writes it, None if it has none."""
        return self._vocabulary.ids.get(piece)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer for transformers and for `load_tokenizer`.

        Files that it came from are copied byte for byte; `tokenizer.json` and
        `tokenizer_config.json` are made where there were none. Of those that are gone since, the
        vocabulary is written anew, and a warning names them.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = {name: path for name, path in self._files.items() if path.is_file()}
        gone = self._files.keys() - files.keys()
        for name, path in files.items():
            target = folder / name
            if not (target.exists() and target.samefile(path)):
                copyfile(path, target)
        if "tokenizer.json" not in files:
            (folder / "tokenizer.json").write_text(self._make_json(), "utf-8")
        if gone:
            logger.warning(
                "%s: %s cannot be copied, for they are gone since the tokenizer was loaded; the "
                "vocabulary is written from memory", folder, ", ".join(sorted(gone)),
            )  # fmt: skip
        if "tokenizer_config.json" not in files:
            settings = fast.to_settings(self._vocabulary)
            (folder / "tokenizer_config.json").write_text(settings, "utf-8")

    @cached_property
    def _never(self) -> frozenset[int]:
        """Ids that no ordinary text has."""
        return self.special_ids - {self.unk_id} | self.unused_ids

    @cached_property
    def _markers(self) -> tuple[re.Pattern[str], list[int], dict[str, int]]:
        """How markers begin, their lengths with the longest first, and their ids."""
        known = self._vocabulary.ids.items()
        ids = {piece.replace(SPACE, " "): id for piece, id in known if id in self.special_ids}
        starts = "".join(sorted({piece[0] for piece in ids}))
        return re.compile(f"[{re.escape(starts)}]"), sorted(set(map(len, ids)), reverse=True), ids

    def split_special(self, text: str) -> Iterator[str | int]:
        """Yield the ids of the markers in a text and the text between them."""
        starts, lengths, ids = self._markers
        text, done = text.replace(SPACE, " "), 0
        for match in starts.finditer(text):
            start = match.start()
            if start < done:
                continue
            size = next((n for n in lengths if text[start : start + n] in ids), None)
            if size is not None:
                end = start + size
                id, between, done = ids[text[start:end]], text[done:start], end
                left, right = self._vocabulary.strips.get(id, (False, False))
                yield between.rstrip() if left else between
                yield id
                if right:
                    done = len(text) - len(text[done:].lstrip())
        yield text[done:]


def check_scores(vocabulary: Vocabulary, scores: Sequence[float]) -> None:
    """Raise CheckpointError if the scores do not rank the pieces."""
    pieces, kinds = vocabulary.pieces, vocabulary.kinds
    if not scores:
        raise CheckpointError("neither merges nor scores: nothing to rank the pieces by")
    if len(scores) != len(pieces):
        raise CheckpointError(f"{len(pieces)} pieces but {len(scores)} scores")
    long = (i for i, piece in enumerate(pieces) if kinds[i] == Kind.NORMAL and len(piece) > 1)
    ranked = [scores[i] for i in long]
    if len(ranked) > 1 and min(ranked) == max(ranked):
        raise CheckpointError("no merges, and all scores are equal: nothing to rank by")
    if not all(map(math.isfinite, ranked)):
        raise CheckpointError("no merges, and scores that are not finite: nothing to rank by")


def split_merge(merge: str) -> tuple[str, str]:
    """Return the two pieces of a GGUF merge."""
    left, _, right = merge.partition(" ")
    if not left or not right or " " in right:
        raise CheckpointError(f"the merge {merge!r} is not two pieces and a space between them")
    return left, right
