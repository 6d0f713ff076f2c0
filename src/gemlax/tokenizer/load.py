"""Finds a tokenizer in a folder or a file and reads it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemlax.errors import CheckpointError, UnsupportedError
from gemlax.tokenizer import fast, spm
from gemlax.tokenizer.core import Tokenizer

__all__ = ["find_chat_template", "find_tokenizer", "load_tokenizer"]

SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
# What a tokenizer's folder may hold; `Tokenizer.save` copies these.
NAMES = (
    "tokenizer.json",
    "tokenizer.model",
    SETTINGS,
    "special_tokens_map.json",
    "added_tokens.json",
    TEMPLATE,
)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a folder, a `tokenizer.json` or a `*.model` file.

    In a folder, `tokenizer.json` is preferred to `tokenizer.model`, and `tokenizer_config.json`
    says which pieces are bos, eos, pad and unk. A file is taken alone.

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
    paths = {name: Path(folder) / name for name in NAMES}
    files = {name: path for name, path in paths.items() if path.is_file()}
    if "tokenizer.json" not in files and "tokenizer.model" not in files:
        return None
    return read_tokenizer(files)


def read_tokenizer(files: Mapping[str, Path]) -> Tokenizer:
    """Read the tokenizer from its files, given by the names that Hugging Face gives them."""
    settings = read_settings(files[SETTINGS]) if SETTINGS in files else {}
    if "tokenizer.json" in files:
        path = files["tokenizer.json"]
        vocabulary, encoder = fast.read_json(path, settings)
        return Tokenizer(vocabulary, encoder, path.read_text, files)
    path = files["tokenizer.model"]
    pieces, scores, types, ids = spm.read_model(path.read_bytes(), str(path))
    add_bos = settings.get("add_bos_token", True)
    return Tokenizer.from_vocabulary(
        pieces,
        scores,
        types,
        bos_id=ids["bos_id"],
        eos_id=ids["eos_id"],
        unk_id=ids["unk_id"],
        pad_id=ids["pad_id"],
        add_bos=add_bos,
        files=files,
    )


def read_settings(path: Path) -> dict[str, Any]:
    """Read a `tokenizer_config.json`."""
    try:
        settings = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} holds {type(settings).__name__}, expected an object")
    return settings


def find_chat_template(folder: str | Path) -> str | None:
    """Return the chat template of a folder: of its own file, or in `tokenizer_config.json`.

    Raises:
        CheckpointError: it is damaged.
    """
    path, settings = Path(folder) / TEMPLATE, Path(folder) / SETTINGS
    if path.is_file():
        try:
            return path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is not UTF-8: {error}") from error
    found = read_settings(settings).get("chat_template") if settings.is_file() else None
    if isinstance(found, list):  # several by name
        named = {e.get("name"): e.get("template") for e in found if isinstance(e, dict)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise CheckpointError(f"{settings}: chat_template must be a string")
    return found
