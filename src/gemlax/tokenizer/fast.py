"""`tokenizer.json`: reads the file of the `tokenizers` package and writes one from any vocabulary.

BPE over the whole text, spaces as U+2581, bytes as <0xNN> pieces. A vocabulary with scores has its
merges implied: every split of a piece into two pieces, best score first (measured on the Gemma 3
vocabulary: no different ids in 16,000 random texts).
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemlax.errors import CheckpointError, UnsupportedError
from gemlax.tokenizer.added import Beside
from gemlax.tokenizer.vocabulary import (
    BYTE,
    NAMES,
    SPACE,
    Kind,
    Vocabulary,
    find_named,
    import_package,
)

__all__ = ["implied_merges", "make_encoder", "read_json", "scored_json", "to_json"]

NO_MERGES = re.compile(r'"merges"\s*:\s*\[\s*\]')


def read_json(path: Path, beside: Beside) -> tuple[Vocabulary, "Encoder"]:
    """Read a `tokenizer.json`; return its vocabulary and the function from text to ids."""
    tokenizers = import_package("tokenizers", "tokenizer.json")
    try:
        text = path.read_text("utf-8-sig")
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the package raises no narrower class
        raise CheckpointError(f"{path} is damaged, or not a tokenizer.json: {error}") from error
    is_bpe = isinstance(tokenizer.model, tokenizers.models.BPE)
    if not is_bpe or (tokenizer.decoder and b"ByteLevel" in tokenizer.decoder.__getstate__()):
        raise UnsupportedError(f"{path} is not a Gemma tokenizer: it is not BPE over characters")
    if NO_MERGES.search(text) and not tokenizer.model.ignore_merges:
        raise CheckpointError(f"{path} has no merges: each character would be a token of its own")
    special = add_tokens(tokenizer, beside)
    added = tokenizer.get_added_tokens_decoder()
    if odd := [token.content for token in added.values() if token.special and token.single_word]:
        raise UnsupportedError(f"{path}: the special token {odd[0]!r} is one as a whole word only")
    strips = {id: (token.lstrip, token.rstrip) for id, token in added.items() if token.special}
    pieces, kinds = list_pieces(tokenizer.get_vocab(), added, special, path)
    ids = {piece: id for id, piece in enumerate(pieces)}
    named = {f"{name}_id": find_named(name, ids, beside.names[name], -1, path) for name in NAMES}
    # Asked of its description: a damaged post-processor panics when it runs.
    state = tokenizer.post_processor.__getstate__().decode() if tokenizer.post_processor else ""
    add_bos = json.dumps(pieces[named["bos_id"]], ensure_ascii=False) in state
    vocabulary = Vocabulary.create(pieces, kinds, add_bos=add_bos, strips=strips, **named)
    return vocabulary, make_encoder(vocabulary, tokenizer)


def add_tokens(tokenizer: Any, beside: Beside) -> set[int]:
    """Add what the files beside add; return the ids that they call special."""
    if not beside.added:
        return set()
    new, special = beside.extend(tokenizer.get_vocab())
    make = import_package("tokenizers", "tokenizer.json").AddedToken
    for token in new:
        how = {"special": token.special, "normalized": False}
        left, right = token.strips
        tokenizer.add_tokens([make(token.content, lstrip=left, rstrip=right, **how)])
    return special


def list_pieces(
    ids: dict[str, int], added: dict[int, Any], special: set[int], path: Path
) -> tuple[list[str], list[Kind]]:
    """Return the pieces by id, with a kind for each; `special`: ids that are, whatever `added`.

    An id without a piece gets the empty one.
    """
    known = {id: piece for piece, id in ids.items()}
    size = max(known, default=-1) + 1
    if len(known) < len(ids) or size > 2 * len(ids):
        raise CheckpointError(
            f"{path}: the ids of its {len(ids)} pieces repeat, or go far beyond: up to {size - 1}"
        )
    pieces = [known.get(id, "") for id in range(size)]
    kinds = []
    for id, piece in enumerate(pieces):
        if id in added or id in special:
            control = id in special or added[id].special
            kinds.append(Kind.CONTROL if control else Kind.USER_DEFINED)
        else:
            kinds.append(Kind.BYTE if BYTE.fullmatch(piece) else Kind.NORMAL)
    return pieces, kinds


def make_encoder(vocabulary: Vocabulary, tokenizer: Any) -> "Encoder":
    """Return the function from text to ids that parses no marker. Safe to call from threads."""
    # Markers that the file does not call special would match in text (measured: it is the content
    # that counts, an added token of the same text keeps its id).
    bytes_added = tokenizer.get_added_tokens_decoder().keys() & vocabulary.byte_values.keys()
    markers = sorted(vocabulary.special_ids | bytes_added)
    tokenizer.add_special_tokens([vocabulary.pieces[id] for id in markers])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return Encoder(tokenizer)


class Encoder:
    """From text to ids. It can be pickled, which makes the package forget what markers are."""

    def __init__(self, tokenizer: Any):
        tokenizer.encode_special_tokens = True  # as ordinary text
        self.tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def __reduce__(self) -> tuple[Any, ...]:
        return Encoder, (self.tokenizer,)


def from_json(vocabulary: Vocabulary, text: str) -> "Encoder":
    """Return the function from text to ids of a `tokenizer.json` that `to_json` wrote."""
    tokenizers = import_package("tokenizers", "tokenizer.json")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the package raises no narrower class
        raise CheckpointError(f"tokenizers refuses the vocabulary: {error}") from error
    return make_encoder(vocabulary, tokenizer)


def to_json(vocabulary: Vocabulary, merges: Sequence[tuple[str, str]]) -> str:
    """Return the vocabulary as a complete `tokenizer.json`, which transformers loads too.

    It has no unused pieces, and no piece twice: these ids get names that are read as unused.
    """
    added = [
        {
            "id": id,
            "content": piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": SPACE in piece,  # runs of spaces match after spaces became U+2581
            "special": id in vocabulary.special_ids,
        }
        for id, piece in enumerate(vocabulary.pieces)
        if vocabulary.kinds[id] in (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED)
        and vocabulary.ids[piece] == id
    ]
    bos = vocabulary.pieces[vocabulary.bos_id]
    first = [{"SpecialToken": {"id": bos, "type_id": 0}}] if vocabulary.add_bos else []
    second = [{"SpecialToken": {"id": bos, "type_id": 1}}] if vocabulary.add_bos else []
    one, two = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    known = {bos: {"id": bos, "ids": [vocabulary.bos_id], "tokens": [bos]}}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*first, one],
            "pair": [*first, one, *second, two],
            "special_tokens": known if vocabulary.add_bos else {},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": vocabulary.pieces[vocabulary.unk_id],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {vocabulary.name(id): id for id in range(len(vocabulary.pieces))},
            "merges": merges,
        },
    }
    return json.dumps(content, ensure_ascii=False)


def to_settings(vocabulary: Vocabulary) -> str:
    """Return the `tokenizer_config.json` that belongs to `to_json`."""
    ids = {"bos": vocabulary.bos_id, "eos": vocabulary.eos_id}
    ids |= {"pad": vocabulary.pad_id, "unk": vocabulary.unk_id}
    content: dict[str, Any] = {f"{name}_token": vocabulary.pieces[id] for name, id in ids.items()}
    content |= {"add_bos_token": vocabulary.add_bos, "add_eos_token": False}
    content |= {"clean_up_tokenization_spaces": False, "padding_side": "left"}
    content["tokenizer_class"] = "GemmaTokenizer"
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def scored_json(vocabulary: Vocabulary, scores: Sequence[float]) -> str:
    """Return a scored vocabulary as a `tokenizer.json`."""
    return to_json(vocabulary, implied_merges(vocabulary, scores))


def implied_merges(vocabulary: Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """Return the merges that a scored vocabulary implies, in the order in which they apply."""
    normal = {
        piece: score
        for piece, score, kind in zip(vocabulary.pieces, scores, vocabulary.kinds, strict=True)
        if kind == Kind.NORMAL
    }
    merges = [
        (-score, size, piece)
        for piece, score in normal.items()
        for size in range(1, len(piece))
        if piece[:size] in normal and piece[size:] in normal
    ]
    merges.sort(key=lambda merge: merge[:2])
    return [(piece[:size], piece[size:]) for _, size, piece in merges]
