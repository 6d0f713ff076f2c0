"""Which .safetensors files of a folder are its weights.

As transformers has it: model.safetensors alone where it is there, else the files that the index
names, with all that they hold; the last of two that hold one tensor counts there, and here two
that differ are an error. Source: transformers 5.23.0, modeling_utils.py.
"""

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from gemlax.checkpoints.base import read_json, show
from gemlax.errors import CheckpointError

__all__ = ["INDEX", "choose_files", "is_index", "is_shard", "weight_files"]

logger = logging.getLogger(__name__)

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_INDEX = re.compile(r".+\.safetensors\.index(\.\w+)?\.json")
# Beside a model these are an adapter's, or the same weights by other names.
_ADAPTERS, _COPY = ("adapter_model",), "consolidated"
_LISTED = 5


def is_index(name: str) -> bool:
    """Tell whether a file name is that of an index of weights."""
    return _INDEX.fullmatch(name) is not None


def is_shard(name: str) -> bool:
    """Tell whether a file name is that of one of several files of weights."""
    return _SHARD.fullmatch(name) is not None


def weight_files(names: Collection[str]) -> list[str]:
    """Return those names that may be files of weights."""
    return sorted(n for n in names if n.endswith(".safetensors") and not n.startswith(_ADAPTERS))


def choose_files(folder: Path) -> list[str]:
    """Return the files that hold the weights of a folder; what is left is said in one line."""
    names = {path.name for path in folder.iterdir() if path.exists()}
    weights = weight_files(names)
    indices = sorted(name for name in names if is_index(name))
    if WHOLE in weights:
        chosen = [WHOLE]
    elif indices:
        index = INDEX if INDEX in indices else indices[0]
        if INDEX not in indices and len(indices) > 1:
            raise CheckpointError(
                f"{folder} has several indices of weights: {_some(indices)}; keep the one to read"
            )
        chosen = _indexed(folder / index)
    elif len(own := [name for name in weights if not name.startswith(_COPY)] or weights) == 1:
        chosen = own
    else:
        chosen = _numbered(folder, own)
    rest = sorted({*weights} - {*chosen})
    if rest:
        logger.info("%s: left aside files of weights: %s", folder, _some(rest))
    return chosen


def _indexed(index: Path) -> list[str]:
    """Return the files that an index names, in its order."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, Mapping) or not all(isinstance(f, str) for f in where.values()):
        raise CheckpointError(f"{index}: expected 'weight_map', an object of file names")
    files = list(dict.fromkeys(where.values()))
    if not files:
        raise CheckpointError(f"{index}: 'weight_map' names no file")
    outside = [file for file in files if Path(file).name != file]
    if outside:
        raise CheckpointError(f"{index}: {show(outside[0])} is not a file of the folder")
    missing = [file for file in files if not (index.parent / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of the {len(files)} files that {index.name} "
            f"names: {_some([show(file) for file in missing])}; the model is not downloaded "
            "completely, fetch them too"
        )
    return files


def _numbered(folder: Path, names: list[str]) -> list[str]:
    """Return files that their names call all parts of one model."""
    matches = [_SHARD.fullmatch(name) for name in names]
    shards = [match for match in matches if match is not None]
    kinds = {(match["stem"], int(match["count"])) for match in shards}
    if len(kinds) != 1 or len(shards) < len(names):
        raise CheckpointError(
            f"{folder} has {len(names)} .safetensors files but neither {WHOLE} nor {INDEX}, which "
            f"says what is where: {_some(names)}; give the path of one file, or fetch the index"
        )
    ((stem, count),) = kinds
    numbers = {int(match["number"]) for match in shards}
    if numbers != set(range(1, count + 1)):
        raise CheckpointError(
            f"{folder} has {len(names)} of {count} files {stem}-...-of-{count:05}.safetensors, "
            f"and no {INDEX}; fetch the others too"
        )
    logger.info("%s has no %s; its %d files are read by their names", folder, INDEX, count)
    return names


def _some(names: Collection[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(list(names)[:_LISTED]) + more
