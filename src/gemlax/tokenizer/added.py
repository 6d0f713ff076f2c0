"""The files beside a vocabulary: settings, names, and the tokens that they add.

`added_tokens.json` gives ids by content; `added_tokens_decoder` in `tokenizer_config.json` gives
contents by id, with flags; `special_tokens_map.json` says which are special. What they add follows
the vocabulary without a hole.
Source: transformers, PreTrainedTokenizerBase._from_pretrained.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gemlax.errors import CheckpointError, UnsupportedError
from gemlax.tokenizer.vocabulary import NAMES, SPACE

__all__ = ["ADDED", "MAP", "SETTINGS", "Added", "Beside", "read_beside", "read_settings"]

SETTINGS = "tokenizer_config.json"
MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"
LISTS = ("additional_special_tokens", "extra_special_tokens")

logger = logging.getLogger(__name__)


class Added(NamedTuple):
    """A token that a file adds. `source` is the file; `strips`: see `Vocabulary`."""

    id: int
    content: str
    special: bool
    source: Path
    strips: tuple[bool, bool] = (False, False)


class Beside(NamedTuple):
    """What the files beside a vocabulary say.

    `names` are the bos, eos, pad and unk tokens as the files call them, `added` is in the order of
    ids, `named_pieces` are all tokens that the files give a name, as `boi_token`.
    """

    settings: Mapping[str, Any]
    names: Mapping[str, Any]
    added: tuple[Added, ...] = ()
    named_pieces: Mapping[str, str] = {}

    def extend(self, ids: Mapping[str, int]) -> tuple[list[Added], set[int]]:
        """Return the tokens that are new to a vocabulary, and which of its ids are special."""
        size, special = len(ids), set[int]()
        new: list[Added] = []
        moved: list[Added] = []
        pieces = {id: piece for piece, id in ids.items()}
        for token in self.added:
            content = token.content.replace(" ", SPACE)
            known = ids.get(token.content, ids.get(content))
            if known is not None:
                special |= {known} if token.special else set()
                moved += [token] if known != token.id else []
            elif token.id < size:
                raise CheckpointError(
                    f"{token.source}: id {token.id} is {token.content!r}, "
                    f"in the vocabulary it is {pieces.get(token.id)!r}"
                )
            elif token.id != size + len(new):
                raise CheckpointError(
                    f"{token.source}: {token.content!r} has id {token.id}; after the vocabulary "
                    f"and the tokens added so far the next one is {size + len(new)}"
                )
            else:
                new.append(token)
        if moved:
            logger.warning(
                "%s gives %d tokens other ids than the vocabulary (%r: %d), which counts",
                moved[0].source, len(moved), moved[0].content, moved[0].id,
            )  # fmt: skip
        return new, special


def read_beside(files: Mapping[str, Path]) -> Beside:
    """Read what lies beside a vocabulary, of files by name."""
    settings = read_settings(files[SETTINGS]) if SETTINGS in files else {}
    mapped = read_settings(files[MAP]) if MAP in files else {}
    names = {name: settings.get(f"{name}_token") or mapped.get(f"{name}_token") for name in NAMES}
    special = {content_of(token) for token in names.values()}
    for file in (settings, mapped):
        for key in LISTS:
            listed = file.get(key) or ()
            listed = listed.values() if isinstance(listed, dict) else listed
            special |= {content_of(token) for token in listed}
    added: dict[int, Added] = {}
    for token in (*read_decoder(settings, files), *read_added(files, special)):
        if added.setdefault(token.id, token).content != token.content:
            raise CheckpointError(
                f"{token.source}: id {token.id} is {token.content!r}, "
                f"in {added[token.id].source.name} it is {added[token.id].content!r}"
            )
    contents = [token.content for token in added.values()]
    if len(set(contents)) != len(contents):
        twice = next(content for content in contents if contents.count(content) > 1)
        raise CheckpointError(f"{next(iter(added.values())).source}: {twice!r} is added twice")
    pieces = read_named(mapped) | read_named(settings)
    return Beside(settings, names, tuple(added[id] for id in sorted(added)), pieces)


def read_named(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the tokens that settings give a name, which chat templates may use."""
    named = {key: token for key, token in settings.items() if key.endswith("_token")}
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        named |= settings[key] if isinstance(settings.get(key), dict) else {}
    return {key: content for key, token in named.items() if (content := content_of(token))}


def read_decoder(settings: Mapping[str, Any], files: Mapping[str, Path]) -> Iterator[Added]:
    """Yield the tokens of `added_tokens_decoder`."""
    listed = settings.get("added_tokens_decoder") or {}
    path = files.get(SETTINGS, Path())
    if not isinstance(listed, dict):
        raise CheckpointError(f"{path}: added_tokens_decoder must be an object")
    for key, said in listed.items():
        content = content_of(said)
        if not (key.isascii() and key.isdigit()) or not content or not isinstance(said, dict):
            raise CheckpointError(f"{path}: added_tokens_decoder[{key!r}] is {said!r}, not a token")
        special = said.get("special") is True
        if special and said.get("single_word"):
            raise UnsupportedError(f"{path}: the special token {content!r} needs a whole word")
        strips = (bool(said.get("lstrip")), bool(said.get("rstrip")))
        yield Added(int(key), content, special, path, strips)


def read_added(files: Mapping[str, Path], special: set[str | None]) -> Iterator[Added]:
    """Yield the tokens of `added_tokens.json`; those that other files name are special."""
    if ADDED not in files:
        return
    for content, id in read_settings(files[ADDED]).items():
        if type(id) is not int or id < 0 or not content:
            raise CheckpointError(f"{files[ADDED]}: the id of {content!r} is {id!r}")
        yield Added(id, content, content in special, files[ADDED])


def content_of(token: Any) -> str | None:
    """Return the text of a token, which files write as it is or as {"content": text}."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def read_settings(path: Path) -> dict[str, Any]:
    """Read an object of JSON, with or without a byte order mark."""
    try:
        settings = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} holds {type(settings).__name__}, expected an object")
    return settings
