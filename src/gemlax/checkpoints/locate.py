"""From a path to a checkpoint: which form it is in, and which files of a folder are its own.

What is there counts, not what it is called. Where there is no model, mistakes.py says what there
is in place of one.
"""

import json
import logging
import re
from pathlib import Path
from typing import Literal, NamedTuple

from gemlax.checkpoints.gguf_header import MAGIC
from gemlax.checkpoints.gguf_parts import is_part, parts_of
from gemlax.checkpoints.mistakes import (
    FORMS,
    explain_file,
    explain_folder,
    is_step,
    refuse_stand_in,
)
from gemlax.checkpoints.orbax import MARKERS
from gemlax.checkpoints.shards import choose_files, is_index, is_shard, weight_files
from gemlax.errors import CheckpointError

__all__ = ["Place", "find_gguf", "locate", "models_of"]

logger = logging.getLogger(__name__)

# A file that was cut in pieces with `split`; they are joined with `cat`, unlike gguf-split's parts.
_PIECE = re.compile(r"\.gguf[-._]?(split-?\w+|part-?\w+|\d+(of\d+)?|a[a-z])$", re.I)
# The encoders of a multimodal model, and what quantisation is guided by.
_BESIDE = ("mmproj", "imatrix")
# Files of a model's folder, which stand for it.
_BESIDE_WEIGHTS = re.compile(
    r"(\w+_)?config\.json|.+\.index(\.\w+)?\.json|tokenizer\.(json|model)|\w+_tokens(_map)?\.json"
    r"|chat_template\.\w+|adapter_model\.safetensors"
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_LISTED = 8


class Place(NamedTuple):
    """A checkpoint: `file` is set where one file of a Hugging Face folder was asked for."""

    form: Literal["huggingface", "gguf", "orbax"]
    path: Path
    file: str | None = None


def locate(path: Path) -> Place:
    """Return what there is at a path."""
    if path.is_dir():
        return _in_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; expected {FORMS}")
    return _of_file(path)


def _of_file(path: Path) -> Place:
    refuse_stand_in(path)
    with path.open("rb") as file:
        start = file.read(4)
    if _PIECE.search(path.name):
        raise CheckpointError(
            f"{path} is a piece of a file that was cut; join the pieces in order: "
            f"cat {_PIECE.sub('.gguf', path.name)}* > {_PIECE.sub('.gguf', path.name)}"
        )
    if start == MAGIC or path.suffix.lower() == ".gguf":
        return Place("gguf", path)
    if weight_files([path.name]):
        return _of_weights(path)
    if _BESIDE_WEIGHTS.fullmatch(path.name):
        logger.info("%s is a file of a folder; the folder is read", path)
        return _in_folder(path.parent)
    raise CheckpointError(explain_file(path, start, _blob_of(path)))


def _of_weights(path: Path) -> Place:
    """Return the folder that weights lie in, and their file where the folder does not read it."""
    folder = path.parent
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{path} has no config.json beside it; fetch the model's other files into {folder}, too"
        )
    if is_shard(path.name) or path.name in choose_files(folder):
        logger.info("%s is a file of a folder; the folder is read", path)
        return Place("huggingface", folder)
    return Place("huggingface", folder, path.name)


def _in_folder(folder: Path) -> Place:
    # The hub's cache keeps links to files that are not there yet.
    names = {path.name for path in folder.iterdir() if path.exists()}
    weights = weight_files(names)
    if weights or any(map(is_index, names)):
        if "config.json" not in names:
            raise CheckpointError(
                f"{folder} has {'.safetensors files' if weights else 'an index of weights'} but no "
                "config.json; fetch the model's config.json into it, too"
            )
        return Place("huggingface", folder)
    if names & MARKERS and not is_step(folder):
        return Place("orbax", folder)
    models = models_of(folder)
    if len(models) == 1:
        logger.info("%s holds %s, which is read", folder, models[0].name)
        return Place("gguf", models[0])
    if models:
        more = f" and {len(models) - _LISTED} more" if len(models) > _LISTED else ""
        raise CheckpointError(
            f"{folder} holds {len(models)} models: "
            f"{', '.join(path.name for path in models[:_LISTED])}{more}; give the path of one"
        )
    raise CheckpointError(explain_folder(folder, names))


def models_of(folder: Path) -> list[Path]:
    """Return the GGUF models of a folder; of one in parts, the first part that is there."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() != ".gguf" or any(word in path.name.lower() for word in _BESIDE):
            continue
        first = parts_of(path)[0].name if is_part(path.name) else path.name
        found.setdefault(first, path)
    return list(found.values())


def find_gguf(path: Path) -> Path | None:
    """Return a GGUF model: the file at a path, or the only one of a folder without a tokenizer."""
    if path.is_file():
        with path.open("rb") as file:
            return path if file.read(4) == MAGIC or path.suffix.lower() == ".gguf" else None
    if not path.is_dir() or any((path / name).is_file() for name in _TOKENIZERS):
        return None
    models = models_of(path)
    return models[0] if len(models) == 1 else None


def _blob_of(path: Path) -> str | None:
    """Return the blob that an ollama manifest names as its model; None: it is no manifest."""
    if path.suffix not in ("", ".json") or path.stat().st_size > 2**16:
        return None
    try:
        layers = json.loads(path.read_bytes())["layers"]
        digests = [
            layer["digest"]
            for layer in layers
            if layer["mediaType"] == "application/vnd.ollama.image.model"
        ]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return digests[0].replace(":", "-") if digests and isinstance(digests[0], str) else None
