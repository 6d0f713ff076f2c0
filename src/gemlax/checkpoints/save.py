"""Writing a Hugging Face folder: config.json and *.safetensors, all of it or nothing.

Source: https://github.com/huggingface/safetensors, README, "Format".
"""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemlax.checkpoints.base import Piece, compare
from gemlax.checkpoints.codes import Formats, flatten, pieces, write_formats
from gemlax.checkpoints.safetensors import DTYPES, INDEX, READ, main_dtype
from gemlax.config import GemmaConfig
from gemlax.errors import CheckpointError
from gemlax.formats import Coded
from gemlax.names import HEAD, text_weights

__all__ = ["check_replaceable", "new_folder", "save_safetensors", "write_json", "write_tensors"]

# What a folder is that holds such a file.
_KINDS = {"config.json": "a model", "adapter_config.json": "an adapter"}
WRITTEN = {dtype: name for name, dtype in READ.items()}


def save_safetensors(
    folder: str | Path,
    config: GemmaConfig,
    weights: Iterable[tuple[str, np.ndarray | Coded]],
    *,
    generation_config: Mapping[str, Any],
    formats: Formats | None = None,
    write_tokenizer: Callable[[Path], None] | None = None,
    max_shard_bytes: int = 5 * 2**30,
    overwrite: bool = False,
) -> None:
    """Write a folder that `open_checkpoint` and transformers read; all of it or nothing.

    transformers reads it where all weights are floats. It is written beside `folder` and renamed;
    one weight at a time is held.

    Args:
        folder: its parent must exist.
        config: written as config.json, with the dtype that most bytes are in.
        weights: canonical name and array (float32, float16 or bfloat16) or codes of every weight,
            once, in any order.
        generation_config: written as generation_config.json unless it is empty.
        formats: of those weights that come as codes.
        write_tokenizer: called with the folder, to add the tokenizer's files.
        max_shard_bytes: a file is closed before it grows beyond this; one weight may be larger.
        overwrite: replace a folder that holds a model. Everything in it is removed.

    Raises:
        FileExistsError: `folder` is there and not empty, or is no folder that may be replaced.
        CheckpointError: `weights` are not those of `config`.
        OSError: the disk is full, or a folder cannot be written.
    """
    with new_folder(folder, marker="config.json", overwrite=overwrite) as part:
        code_formats = formats or {}
        dtype = _write_weights(part, config, weights, code_formats, max_shard_bytes)
        written = config.to_hf() | {"dtype": dtype} | write_formats(code_formats)
        write_json(part / "config.json", written)
        if generation_config:
            write_json(part / "generation_config.json", generation_config)
        if write_tokenizer is not None:
            write_tokenizer(part)


@contextlib.contextmanager
def new_folder(folder: str | Path, *, marker: str, overwrite: bool) -> Iterator[Path]:
    """Give a folder to write to, which takes the place of `folder` if no error comes.

    Args:
        folder: its parent must exist.
        marker: the file by which a folder that may be replaced is known.
        overwrite: replace a folder that is not empty.

    Raises:
        FileExistsError: `folder` is there and not empty, or is no folder that may be replaced.
        OSError: the disk is full, or a folder cannot be written.
    """
    folder = Path(folder).expanduser().resolve()
    check_replaceable(folder, marker, overwrite)
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    try:
        part.mkdir()
        yield part
        _put_in_place(part, folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"cannot save the checkpoint: {reason}", str(folder)) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_replaceable(folder: Path, marker: str, overwrite: bool) -> None:
    """Check that `new_folder` may put a folder there; see there for the errors."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; expected a new or empty folder")
    inside = list(folder.iterdir())
    if inside and not overwrite:
        raise FileExistsError(f"{folder} is not empty; pass overwrite=True to replace it")
    known = any(path.name == marker for path in inside)
    if inside and (not known or any(path.is_dir() for path in inside)):
        raise FileExistsError(
            f"{folder} is not replaced: it has {'a sub-folder' if known else f'no {marker}'}, so "
            f"it is not just {_KINDS[marker]}"
        )


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write one safetensors file."""
    whole = {name: Piece(name, array.shape) for name, array in tensors.items()}
    shard = _Shard(path, _room(whole))
    for name, array in tensors.items():
        shard.append(name, array)
    shard.finish()


class _Shard:
    """A safetensors file that grows; room for its header is left in front."""

    def __init__(self, path: Path, room: int):
        self.path = path
        self.room = room
        self.entries: dict[str, Any] = {}
        self.nbytes = 0
        path.write_bytes(b" " * room)

    def append(self, name: str, array: np.ndarray) -> None:
        with self.path.open("ab") as file:
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        end = self.nbytes + array.nbytes
        self.entries[name] = {
            "dtype": WRITTEN[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [self.nbytes, end],
        }
        self.nbytes = end

    def finish(self) -> None:
        header = _header(self.entries).ljust(self.room - 8)
        assert len(header) == self.room - 8
        with self.path.open("r+b") as file:
            file.write(len(header).to_bytes(8, "little") + header)


def _header(entries: Mapping[str, Any]) -> bytes:
    return json.dumps({"__metadata__": {"format": "pt"}} | dict(entries)).encode()


def _name(name: str) -> str:
    """Return what a tensor is called in the file: transformers has the head beside the model."""
    return name if name.startswith(HEAD) else f"model.{name}"


def _room(expected: Mapping[str, Piece]) -> int:
    """Return the bytes that the header of any shard fits in, a multiple of 8."""
    widest = {
        _name(name): {"dtype": "BF16", "shape": piece.shape, "data_offsets": [2**60, 2**60]}
        for name, piece in expected.items()
    }
    return 8 + -(-len(_header(widest)) // 8) * 8


def _write_weights(
    part: Path,
    config: GemmaConfig,
    weights: Iterable[tuple[str, np.ndarray | Coded]],
    formats: Formats,
    limit: int,
) -> str:
    """Write the shards and their index; return the dtype that most bytes of floats are in."""
    expected = {
        piece.tensor: piece
        for name, shape in text_weights(config.text).items()
        for piece in pieces(name, shape, formats.get(name))
    }
    room = _room(expected)
    shards = [_Shard(part / "model.safetensors", room)]
    seen: dict[str, tuple[int, ...]] = {}
    for name, array in flatten(weights, formats):
        piece = expected.get(name)
        if not _fits(array, piece) or name in seen:
            raise CheckpointError(
                f"cannot save {name!r}, {array.dtype} {list(array.shape)}: "
                + ("it came twice" if name in seen else f"expected {piece and piece.shape}")
            )
        seen[name] = array.shape
        if shards[-1].entries and shards[-1].nbytes + array.nbytes > limit:
            shards.append(_Shard(part / f"{len(shards)}.safetensors", room))
        shards[-1].append(_name(name), array)
        del array  # before the next one is made
    if problems := compare({name: piece.shape for name, piece in expected.items()}, seen):
        raise CheckpointError("cannot save a part of a model:\n  " + "\n  ".join(problems))
    for shard in shards:
        shard.finish()
    if len(shards) > 1:
        _write_index(part, shards)
    return main_dtype(
        (entry["dtype"], entry["data_offsets"][1] - entry["data_offsets"][0])
        for shard in shards
        for name, entry in shard.entries.items()
        if expected[name.removeprefix("model.")].type is None
    )


def _fits(array: np.ndarray, piece: Piece | None) -> bool:
    """Tell whether an array is what a tensor of the file shall be."""
    if piece is None or piece.shape != array.shape or array.dtype not in WRITTEN:
        return False
    name = WRITTEN[array.dtype]
    return name in DTYPES if piece.type is None else name == piece.type


def _write_index(part: Path, shards: list[_Shard]) -> None:
    where: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        shard.path.rename(part / file)
        where |= dict.fromkeys(shard.entries, file)
    size = sum(shard.nbytes for shard in shards)
    write_json(part / INDEX, {"metadata": {"total_size": size}, "weight_map": where})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def _put_in_place(part: Path, folder: Path) -> None:
    """Rename `part` to `folder` once its files are on the disk."""
    for path in (*part.rglob("*"), part):
        _sync(path)
    old = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.old")
    if folder.exists():
        folder.rename(old)
    try:
        part.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
