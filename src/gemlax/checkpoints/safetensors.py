"""Hugging Face folders: config.json and *.safetensors, read in place and written atomically.

The header is parsed here rather than by the `safetensors` package so that a damaged file is
named with what is wrong in it, and so that a weight can be read range by range.
Source: https://github.com/huggingface/safetensors, README, "Format".
"""

import contextlib
import json
import logging
import math
import mmap
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemlax.checkpoints.base import (
    BFLOAT16,
    Checkpoint,
    compare,
    fill,
    fit_vocab,
    log_left_aside,
    read_json,
    refuse_drafter,
    resolve_config,
    same_bytes,
    show,
)
from gemlax.checkpoints.names import Weight, text_weights, unused
from gemlax.config import GemmaConfig
from gemlax.errors import CheckpointError, UnsupportedError
from gemlax.tokenizer import Tokenizer, find_tokenizer

__all__ = ["INDEX", "SafetensorsCheckpoint", "parse_header", "save_safetensors"]

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
# The limit of the reference implementation.
MAX_HEADER_BYTES = 100_000_000
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BFLOAT16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Bits of one element. Source: safetensors 0.8, tensor.rs, Dtype.
BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
# Where the text decoder's names begin: text-only, multimodal as published, as transformers 5
# writes it, and bare.
PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")
LM_HEADS = ("lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight")
# Encoders, what joins them to the decoder, and a drafter.
# Source: transformers 5.23.0, modeling_gemma3.py, modeling_gemma4.py, modeling_gemma4_unified.py.
OTHER_PARTS = (
    "vision_tower.", "multi_modal_projector.", "embed_vision.", "vision_embedder.",
    "audio_tower.", "embed_audio.", "assistant.",
)  # fmt: skip


class Tensor(NamedTuple):
    """One tensor of a file: `start` and `nbytes` are in bytes from the file's start."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class SafetensorsCheckpoint(Checkpoint):
    """A folder with config.json and model.safetensors, or its shards and their index."""

    def __init__(self, folder: Path):
        self.source = folder
        self._maps: dict[str, mmap.mmap] = {}
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        path = self.source / "config.json"
        config = read_json(path)
        refuse_drafter(config.get("model_type"), self.source)
        self._tensors = self._read_headers()
        aside = [name for name in self._tensors if _is_other_part(name)]
        log_left_aside(logger, self.source, aside, "other parts than the text decoder")
        self._heads = [name for name in LM_HEADS if name in self._tensors]
        text = config.get("text_config", config)
        resolved = resolve_config(
            lambda: GemmaConfig.from_hf(config),
            layers=text.get("num_hidden_layers") if isinstance(text, dict) else None,
            tensors=len(self._tensors),
            source=path,
        )
        names = text_weights(resolved.text)
        self._prefix = max(PREFIXES, key=lambda p: sum(p + n in self._tensors for n in names))
        self._unused = {self._prefix + weight.name for weight in unused(resolved.text)}
        idle = sorted(self._unused & self._tensors.keys())
        log_left_aside(logger, self.source, idle, "layers that read the K/V of another")
        table = self._table()
        self.config = fit_vocab(resolved, table.shape[0] if table and table.shape else None)
        generation = self.source / "generation_config.json"
        self.generation_config = read_json(generation) if generation.exists() else {}
        self.stored_dtype = _main_dtype(self._text().values())

    def _read_headers(self) -> dict[str, Tensor]:
        index = self.source / INDEX
        files = sorted(path.name for path in self.source.glob("*.safetensors"))
        if "model.safetensors" in files:
            return self._read_file("model.safetensors")
        if index.exists():
            return self._read_shards(index)
        if len(files) == 1:
            return self._read_file(files[0])
        raise CheckpointError(
            f"{self.source} has {len(files)} .safetensors files but neither model.safetensors "
            f"nor {INDEX}; the index says which tensor is where"
        )

    def _read_shards(self, index: Path) -> dict[str, Tensor]:
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
            raise CheckpointError(f"{index}: expected 'weight_map', an object of file names")
        problems, tensors = [], {}
        for file in dict.fromkeys(where.values()):
            if Path(file).name != file or not (self.source / file).is_file():
                problems.append(f"{show(file)} is not a file of the folder")
                continue
            for name, tensor in self._read_file(file).items():
                if where.get(name) == file:
                    tensors[name] = tensor
                else:
                    problems.append(f"{file} holds {show(name)}, which the index does not say")
        if not problems:
            problems = [f"{where[n]} lacks {show(n)}" for n in where if n not in tensors]
        if problems:
            rest = f"\n  and {len(problems) - 50} more" if len(problems) > 50 else ""
            raise CheckpointError(
                f"{index} does not fit its shards:\n  " + "\n  ".join(problems[:50]) + rest
            )
        return tensors

    def _read_file(self, file: str) -> dict[str, Tensor]:
        path = self.source / file
        with path.open("rb") as opened:
            if os.fstat(opened.fileno()).st_size == 0:
                raise CheckpointError(f"{path} is empty; expected a safetensors file")
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        self._maps[file] = data
        return parse_header(data, path)

    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer of the folder, or None."""
        return find_tokenizer(self.source)

    def close(self) -> None:
        """Close the files. Arrays that were read stay valid."""
        for data in self._maps.values():
            # A traceback may still hold a view; then the map goes when the view does.
            with contextlib.suppress(BufferError):
                data.close()
        self._maps = {}

    def _text(self) -> dict[str, Tensor]:
        return {
            name: tensor
            for name, tensor in self._tensors.items()
            if name not in self._heads and name not in self._unused and not _is_other_part(name)
        }

    def _table(self) -> Tensor | None:
        return self._tensors.get(f"{self._prefix}embed_tokens.weight")

    def _expected(self) -> dict[str, tuple[int, ...]]:
        return {self._prefix + name: weight.shape for name, weight in self._weights.items()}

    def _found(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._text().items()}

    def _other_problems(self) -> list[str]:
        table = self._table()
        return [
            f"{name} differs from {self._prefix}embed_tokens.weight; only a tied head is supported"
            for name in self._heads
            if table and not self._same_bytes(self._tensors[name], table)
        ]

    def _same_bytes(self, a: Tensor, b: Tensor) -> bool:
        return a[1:3] == b[1:3] and same_bytes(  # dtype and shape
            self._maps[a.file], a.start, self._maps[b.file], b.start, a.nbytes
        )

    def _check_types(self) -> None:
        wrong = [f"{n} ({t.dtype})" for n, t in self._text().items() if t.dtype not in DTYPES]
        if wrong:
            raise UnsupportedError(
                f"{self.source} holds tensors of types other than {', '.join(DTYPES)}: "
                f"{', '.join(wrong)}"
            )

    def _fill(self, weight: Weight, out: np.ndarray) -> None:
        name = self._prefix + weight.name
        tensor = self._tensors.get(name)
        if tensor is None or tensor.shape != weight.shape:
            got = "no such tensor" if tensor is None else list(tensor.shape)
            raise CheckpointError(
                f"{self.source}: {name}: expected {list(weight.shape)}, got {got}"
            )
        if tensor.dtype not in DTYPES:
            raise UnsupportedError(
                f"{self.source}: {name} is {tensor.dtype}; expected {', '.join(DTYPES)}"
            )
        data = self._maps[tensor.file]
        values = np.frombuffer(data, DTYPES[tensor.dtype], out.size, tensor.start)
        fill(out, lambda start, stop: values[start:stop], name)


def _is_other_part(name: str) -> bool:
    return name.removeprefix("model.").startswith(OTHER_PARTS)


def _main_dtype(tensors: Iterable[Tensor]) -> str:
    """Return the dtype that most bytes are in."""
    nbytes: dict[str, int] = {}
    for tensor in tensors:
        nbytes[tensor.dtype] = nbytes.get(tensor.dtype, 0) + tensor.nbytes
    name = max(nbytes, key=lambda dtype: nbytes[dtype], default="F32")
    return DTYPES[name].name if name in DTYPES else name


# --- the header --------------------------------------------------------------------------------


def parse_header(data: mmap.mmap | bytes, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, every offset checked against its size.

    Raises:
        CheckpointError: the file is truncated, or its header contradicts itself.
    """
    size = len(data)
    length = int.from_bytes(data[:8], "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file: it has {size} bytes and announces "
            f"a header of {length} (at most {MAX_HEADER_BYTES})"
        )
    try:
        header = json.loads(data[8 : 8 + length], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is no JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _tensor(name, entry, path, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if tensor.start != end:
            fault = "overlaps the tensor before it" if tensor.start < end else "follows a gap"
            raise CheckpointError(f"{path}: {show(name)} {fault}")
        end += tensor.nbytes
    if end != size:
        fault = "truncated" if end > size else "longer than its header says"
        raise CheckpointError(f"{path} is {fault}: {size} bytes, expected {end}")
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _tensor(name: str, entry: Any, path: Path, start: int) -> Tensor:
    fault = f"{path}: {show(name)}: "
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{fault}expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise UnsupportedError(f"{fault}dtype {show(str(dtype))} is not known")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{fault}shape and data_offsets must be lists of sizes")
    nbytes, rest = divmod(math.prod(shape) * BITS[dtype], 8)
    if rest or offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{fault}{dtype} {shape} takes {nbytes} bytes, data_offsets are {offsets}"
        )
    return Tensor(path.name, dtype, tuple(shape), start + offsets[0], nbytes)


def _are_sizes(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 16
        and all(type(size) is int and 0 <= size < 2**63 for size in value)
    )


# --- writing -----------------------------------------------------------------------------------


def save_safetensors(
    folder: str | Path,
    config: GemmaConfig,
    weights: Iterable[tuple[str, np.ndarray]],
    *,
    generation_config: Mapping[str, Any],
    write_tokenizer: Callable[[Path], None] | None = None,
    max_shard_bytes: int = 5 * 2**30,
    overwrite: bool = False,
) -> None:
    """Write a folder that `open_checkpoint` and transformers read; all of it or nothing.

    It is written beside `folder` and renamed; one weight at a time is held.

    Args:
        folder: its parent must exist.
        config: written as config.json, with the dtype that most bytes are in.
        weights: canonical name and array (float32, float16 or bfloat16) of every weight, once, in
            any order.
        generation_config: written as generation_config.json unless it is empty.
        write_tokenizer: called with the folder, to add the tokenizer's files.
        max_shard_bytes: a file is closed before it grows beyond this; one weight may be larger.
        overwrite: replace a folder that holds a model. Everything in it is removed.

    Raises:
        FileExistsError: `folder` is there and not empty, or is no folder that may be replaced.
        CheckpointError: `weights` are not those of `config`.
        OSError: the disk is full, or a folder cannot be written.
    """
    folder = Path(folder).expanduser().resolve()
    _refuse_to_replace(folder, overwrite)
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    try:
        part.mkdir()
        dtype = _write_weights(part, config, weights, max_shard_bytes)
        _write_json(part / "config.json", config.to_hf() | {"dtype": dtype})
        if generation_config:
            _write_json(part / "generation_config.json", generation_config)
        if write_tokenizer is not None:
            write_tokenizer(part)
        _put_in_place(part, folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"cannot save the checkpoint: {reason}", str(folder)) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _refuse_to_replace(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; expected a new or empty folder")
    inside = list(folder.iterdir())
    if inside and not overwrite:
        raise FileExistsError(f"{folder} is not empty; pass overwrite=True to replace it")
    model = any(path.name == "config.json" for path in inside)
    if inside and (not model or any(path.is_dir() for path in inside)):
        raise FileExistsError(
            f"{folder} is not replaced: it has {'a sub-folder' if model else 'no config.json'}, so "
            "it is not just a model"
        )


class _Shard:
    """A safetensors file that grows; room for its header was left in front."""

    def __init__(self, path: Path, room: int):
        self.path = path
        self.room = room
        self.entries: dict[str, Any] = {}
        self.nbytes = 0
        with path.open("wb") as file:
            file.write(b" " * room)

    def append(self, name: str, array: np.ndarray) -> None:
        with self.path.open("ab") as file:
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        end = self.nbytes + array.nbytes
        self.entries[name] = {
            "dtype": DTYPE_NAMES[array.dtype],
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


def _room(expected: Mapping[str, tuple[int, ...]]) -> int:
    """Return the bytes that the header of any shard fits in, a multiple of 8."""
    widest = {
        f"model.{name}": {"dtype": "BF16", "shape": shape, "data_offsets": [2**60, 2**60]}
        for name, shape in expected.items()
    }
    return 8 + -(-len(_header(widest)) // 8) * 8


def _write_weights(
    part: Path, config: GemmaConfig, weights: Iterable[tuple[str, np.ndarray]], limit: int
) -> str:
    """Write the shards and their index; return the dtype that most bytes are in."""
    expected = text_weights(config.text)
    room = _room(expected)
    shards = [_Shard(part / "model.safetensors", room)]
    seen: dict[str, tuple[int, ...]] = {}
    for name, array in weights:
        if expected.get(name) != array.shape or name in seen or array.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                f"cannot save {name!r}, {array.dtype} {list(array.shape)}: "
                + ("it came twice" if name in seen else f"expected {expected.get(name)}")
            )
        seen[name] = array.shape
        if shards[-1].entries and shards[-1].nbytes + array.nbytes > limit:
            shards.append(_Shard(part / f"{len(shards)}.safetensors", room))
        shards[-1].append(f"model.{name}", array)
        del array  # before the next one is made
    if problems := compare(expected, seen):
        raise CheckpointError("cannot save a part of a model:\n  " + "\n  ".join(problems))
    for shard in shards:
        shard.finish()
    if len(shards) > 1:
        _write_index(part, shards)
    tensors = [
        Tensor("", entry["dtype"], (), 0, entry["data_offsets"][1] - entry["data_offsets"][0])
        for shard in shards
        for entry in shard.entries.values()
    ]
    return _main_dtype(tensors)


def _write_index(part: Path, shards: list[_Shard]) -> None:
    where: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        shard.path.rename(part / file)
        where |= dict.fromkeys(shard.entries, file)
    size = sum(shard.nbytes for shard in shards)
    _write_json(part / INDEX, {"metadata": {"total_size": size}, "weight_map": where})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
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
