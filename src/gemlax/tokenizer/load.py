"""Finds a tokenizer in a folder or a file and reads it."""

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gemlax.errors import CheckpointError, UnsupportedError
from gemlax.tokenizer import fast, spm
from gemlax.tokenizer.added import ADDED, MAP, SETTINGS, Beside, read_beside, read_settings
from gemlax.tokenizer.core import Tokenizer
from gemlax.tokenizer.vocabulary import NAMES, Kind, find_named

__all__ = ["find_chat_template", "find_tokenizer", "load_tokenizer", "write_chat_template"]

logger = logging.getLogger(__name__)

TEMPLATE, MORE = "chat_template.jinja", "additional_chat_templates"
# What a tokenizer's folder may hold; `Tokenizer.save` copies these.
FILES = ("tokenizer.json", "tokenizer.model", SETTINGS, MAP, ADDED, TEMPLATE)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a folder, a `tokenizer.json` or a `*.model` file.

    In a folder, `tokenizer.json` is preferred to `tokenizer.model`, and the files beside it say
    which pieces are bos, eos, pad and unk, and what is added. A file is taken alone.
    """
    path = Path(path)
    if path.is_dir():
        tokenizer = find_tokenizer(path)
        if tokenizer is None:
            raise FileNotFoundError(f"{path} holds neither tokenizer.json nor tokenizer.model")
        return tokenizer
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.suffix in (".json", ".model"):
        return read_tokenizer({f"tokenizer{path.suffix}": path})
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
        tokenizer = Tokenizer(vocabulary, encoder, encoder.tokenizer.to_str, files)
    else:
        tokenizer = read_model(files["tokenizer.model"], beside, files)
    tokenizer.named_pieces = beside.named_pieces
    return tokenizer


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
        strips={known.get(t.content, t.id): t.strips for t in beside.added if t.special},
        files=files,
    )


def find_chat_template(folder: str | Path) -> str | dict[str, str] | None:
    """Return the chat template of a folder, or its templates by name if there are several.

    Where one is in several places, the first counts: `chat_template.jinja` and
    `additional_chat_templates/`, then `tokenizer_config.json`, `chat_template.json` and
    `processor_config.json`. An empty one is passed over.
    """
    folder = Path(folder)
    templates: dict[str, str] = {}
    for path, named in _templates_in(folder):
        for name, source in named.items():
            if source.strip():
                templates.setdefault(name, source)
            else:
                logger.warning("%s: the chat template %s is empty and not used", path, name)
    if len(templates) != 1:
        return templates or None
    ((name, source),) = templates.items()
    if name != "default":
        logger.info("%s: the only chat template, %s, is used", folder, name)
    return source


def write_chat_template(template: str | Mapping[str, str], folder: Path) -> None:
    """Write what `find_chat_template` reads, as transformers does."""
    named = {"default": template} if isinstance(template, str) else template
    for name, source in named.items():
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise CheckpointError(f"the chat template name {name!r} cannot be a file name")
        path = folder / TEMPLATE if name == "default" else folder / MORE / f"{name}.jinja"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(source.encode())  # not as text: line ends stay as they are


def _templates_in(folder: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield each file that holds templates, and these by name."""
    more = sorted(folder.glob(f"{MORE}/*.jinja"))
    for path in (folder / TEMPLATE, *more):
        if path.is_file():
            name = "default" if path.name == TEMPLATE and path.parent == folder else path.stem
            try:
                yield path, {name: path.read_bytes().decode("utf-8-sig")}
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{path} is not UTF-8: {error}") from error
    for path in (
        folder / name for name in (SETTINGS, "chat_template.json", "processor_config.json")
    ):
        value = read_settings(path).get("chat_template") if path.is_file() else None
        if value is not None:
            yield path, _named_templates(value, path)


def _named_templates(value: Any, path: Path) -> dict[str, str]:
    """Return templates by name: one is "default", several are a list or a dict."""
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        named = {one.get("name"): one.get("template") for one in value}
    else:
        named = value if isinstance(value, dict) else {None: None}
    if not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise CheckpointError(
            f"{path}: chat_template must be a string, or strings by name, got {str(value)[:80]!r}"
        )
    return named
