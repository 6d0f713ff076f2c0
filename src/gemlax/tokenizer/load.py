"""Finds a tokenizer in a folder or a file and reads it."""

from collections.abc import Mapping
from pathlib import Path

from gemlax.errors import CheckpointError, UnsupportedError
from gemlax.tokenizer import fast, spm
from gemlax.tokenizer.added import ADDED, MAP, SETTINGS, Beside, read_beside, read_settings
from gemlax.tokenizer.core import Tokenizer
from gemlax.tokenizer.vocabulary import NAMES, Kind, find_named

__all__ = ["find_chat_template", "find_tokenizer", "load_tokenizer"]

TEMPLATE = "chat_template.jinja"
# What a tokenizer's folder may hold; `Tokenizer.save` copies these.
FILES = ("tokenizer.json", "tokenizer.model", SETTINGS, MAP, ADDED, TEMPLATE)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a folder, a `tokenizer.json` or a `*.model` file.

    In a folder, `tokenizer.json` is preferred to `tokenizer.model`, and the files beside it say
    which pieces are bos, eos, pad and unk, and what is added. A file is taken alone.

    Raises:
        FileNotFoundError: There is none.
        CheckpointError: It is damaged.
        UnsupportedError: It is not a Gemma tokenizer.
    """
    path = Path(path)
    if path.is_dir():
        tokenizer = find_tokenizer(path)
        if tokenizer is None:
            raise FileNotFoundError(f"{path} holds neither tokenizer.json nor tokenizer.model")
        return tokenizer
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.suffix == ".json":
        return read_tokenizer({"tokenizer.json": path})
    if path.suffix == ".model":
        return read_tokenizer({"tokenizer.model": path})
    if path.suffix == ".gguf":
        raise UnsupportedError(f"{path}: gemlax.load_tokenizer reads GGUF files, this one does not")
    raise UnsupportedError(f"{path}: expected a folder, a tokenizer.json or a *.model file")


def find_tokenizer(folder: str | Path) -> Tokenizer | None:
    """Load the tokenizer of a folder; return None if it has none."""
    paths = {name: Path(folder) / name for name in FILES}
    files = {name: path for name, path in paths.items() if path.is_file()}
    if "tokenizer.json" not in files and "tokenizer.model" not in files:
        return None
    return read_tokenizer(files)


def read_tokenizer(files: Mapping[str, Path]) -> Tokenizer:
    """Read the tokenizer from its files, given by the names that Hugging Face gives them."""
    beside = read_beside(files)
    if "tokenizer.json" in files:
        path = files["tokenizer.json"]
        vocabulary, encoder = fast.read_json(path, beside)
        return Tokenizer(vocabulary, encoder, path.read_text, files)
    return read_model(files["tokenizer.model"], beside, files)


def read_model(path: Path, beside: Beside, files: Mapping[str, Path]) -> Tokenizer:
    """Read a `tokenizer.model`, and what the files beside it add."""
    pieces, scores, types, ids = spm.read_model(path.read_bytes(), str(path))
    new, special = beside.extend({piece: id for id, piece in enumerate(pieces)})
    for id in special:
        types[id] = Kind.CONTROL
    for token in new:
        pieces.append(token.content)
        scores.append(0.0)
        types.append(Kind.CONTROL if token.special else Kind.USER_DEFINED)
    known = {piece: id for id, piece in enumerate(pieces)}
    named = {
        name: find_named(name, known, beside.names[name], ids[f"{name}_id"], path) for name in NAMES
    }
    return Tokenizer.from_vocabulary(
        pieces,
        scores,
        types,
        bos_id=named["bos"],
        eos_id=named["eos"],
        unk_id=named["unk"],
        pad_id=named["pad"],
        add_bos=beside.settings.get("add_bos_token", True),
        files=files,
    )


def find_chat_template(folder: str | Path) -> str | None:
    """Return the chat template of a folder: of its own file, or in `tokenizer_config.json`.

    Raises:
        CheckpointError: it is damaged.
    """
    path, settings = Path(folder) / TEMPLATE, Path(folder) / SETTINGS
    if path.is_file():
        try:
            return path.read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is not UTF-8: {error}") from error
    found = read_settings(settings).get("chat_template") if settings.is_file() else None
    if isinstance(found, list):  # several by name
        named = {e.get("name"): e.get("template") for e in found if isinstance(e, dict)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise CheckpointError(f"{settings}: chat_template must be a string")
    return found
