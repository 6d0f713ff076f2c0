"""A GGUF model that is split over several files, as llama-gguf-split and gguf-py do it.

The first part has the metadata; each says which part of how many it is, and how many tensors all
of them hold together. Source: llama.cpp, tools/gguf-split and src/llama-model-loader.cpp.
"""

import mmap
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gemlax.checkpoints.base import Tensor, map_file, show
from gemlax.checkpoints.gguf_header import Header, parse_header
from gemlax.errors import CheckpointError

__all__ = ["Parts", "is_part", "open_parts", "parts_of"]

NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.I)
# The format has 16 bits; nobody has a thousand.
MAX_PARTS = 999
_LISTED = 5


class Parts(NamedTuple):
    """A model's files, mapped, and what they say together."""

    maps: list[mmap.mmap]
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def is_part(name: str) -> bool:
    """Tell whether a file name is that of one part of several."""
    return _NAME.fullmatch(name) is not None


def parts_of(path: Path) -> list[Path]:
    """Return all parts, by the name of one; itself alone where the name says nothing."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return [path]
    number, count = int(match["number"]), int(match["count"])
    if not 1 <= number <= count <= MAX_PARTS:
        raise CheckpointError(
            f"{path} calls itself part {number} of {count}; expected 1 to {MAX_PARTS} parts"
        )
    return [
        path.with_name(f"{match['stem']}-{i:05}-of-{count:05}{match['suffix']}")
        for i in range(1, count + 1)
    ]


def open_parts(path: Path) -> Parts:
    """Map the file at `path` and, where it is one of several parts, the others."""
    maps: list[mmap.mmap] = []
    try:
        maps.append(map_file(path))
        header = parse_header(maps[0], path)
        count = _count(header.metadata, path)
        if count == 1:
            return Parts(maps, header.metadata, header.tensors)
        paths = _whole(path, count)
        maps.pop().close()
        headers = []
        for part in paths:
            maps.append(map_file(part))
            headers.append(parse_header(maps[-1], part))
        return Parts(maps, headers[0].metadata, _join(headers, paths))
    except BaseException:
        for data in maps:
            data.close()
        raise


def _count(metadata: Mapping[str, Any], path: Path) -> int:
    """Return how many parts there are."""
    count = metadata.get(COUNT, 1)
    if type(count) is not int or not 0 <= count <= MAX_PARTS:
        raise CheckpointError(f"{path}: {COUNT} is {count!r}; expected 1 to {MAX_PARTS}")
    return max(count, 1)


def _whole(path: Path, count: int) -> list[Path]:
    """Return the paths of all parts, which are there."""
    paths = parts_of(path)
    if len(paths) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts; put them into one folder, named as they were: "
            f"NAME-00001-of-{count:05}.gguf to NAME-{count:05}-of-{count:05}.gguf"
        )
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        raise CheckpointError(
            f"{path} is one of {count} parts, and {len(missing)} of them are not in "
            f"{path.parent}: {', '.join(missing[:_LISTED])}{more}; fetch them too"
        )
    return paths


def _join(headers: Sequence[Header], paths: Sequence[Path]) -> dict[str, Tensor]:
    """Return the tensors of all parts, once these are found to be those of one model."""
    first = headers[0].metadata
    tensors: dict[str, Tensor] = {}
    for part, (header, path) in enumerate(zip(headers, paths, strict=True)):
        number, count = header.metadata.get(NUMBER), header.metadata.get(COUNT)
        if (number, count) != (part, len(paths)):
            raise CheckpointError(
                f"{path} says of itself that it is part {number!r} of {count!r} ({NUMBER}, "
                f"{COUNT}); by its name it is part {part} of {len(paths)}, counted from 0"
            )
        for key, value in header.metadata.items():
            same = key in (NUMBER, "general.alignment") or first.get(key) == value
            if not same:
                raise CheckpointError(
                    f"{path} is of another model than {paths[0].name}: they differ in {show(key)}"
                )
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{path} holds {show(name)}, which {paths[tensors[name].file].name} has, too"
                )
            tensors[name] = tensor._replace(file=part)
    expected = first.get(TENSORS)
    if expected is not None and expected != len(tensors):
        raise CheckpointError(
            f"{paths[0]} says that all parts hold {expected!r} tensors ({TENSORS}); they hold "
            f"{len(tensors)}"
        )
    return tensors
