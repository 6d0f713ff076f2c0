"""Hugging Face folders: config.json and *.safetensors, read in place.

Matrices may lie there as codes: codes.py says how.

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
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemlax.checkpoints.base import (
    BFLOAT16,
    Checkpoint,
    fill,
    fit_vocab,
    log_left_aside,
    read_json,
    refuse_drafter,
    resolve_config,
    same_bytes,
    show,
)
from gemlax.checkpoints.codes import (
    CODES,
    KEY,
    SCALES,
    Entry,
    check_formats,
    disagree,
    entries,
    read_formats,
)
from gemlax.checkpoints.names import Weight, text_weights, unused
from gemlax.config import GemmaConfig
from gemlax.errors import CheckpointError, UnsupportedError
from gemlax.formats import FORMATS, Coded, decode
from gemlax.tokenizer import Tokenizer, find_tokenizer

__all__ = [
    "DTYPES",
    "INDEX",
    "OTHER_PARTS",
    "READ",
    "SafetensorsCheckpoint",
    "main_dtype",
    "parse_header",
    "read_tensors",
]

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
# The limit of the reference implementation.
MAX_HEADER_BYTES = 100_000_000
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BFLOAT16}
# With those of codes.
READ = DTYPES | {
    "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "U16": np.dtype(np.uint16),
}  # fmt: skip
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
        self._formats = read_formats(config, path)
        self.keeps_codes = bool(self._formats)
        config.pop(KEY, None)
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
        check_formats(self._formats, text_weights(self.config.text), path)
        self.stored_dtype = main_dtype((t.dtype, t.nbytes) for t in self._text().values())
        if self._formats:
            self.stored_dtype = ", ".join(sorted(set(self._formats.values())))

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
        name = f"{self._prefix}embed_tokens.weight"
        return self._tensors.get(name) or self._tensors.get(name + CODES)

    def _expected(self) -> dict[str, tuple[int, ...]]:
        return {
            self._prefix + name: entry.shape
            for weight in self._weights.values()
            for name, entry in self._entries(weight).items()
        }

    def _entries(self, weight: Weight) -> dict[str, Entry]:
        return entries(weight.name, weight.shape, self._formats.get(weight.name))

    def _found(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._text().items()}

    def _other_problems(self) -> list[str]:
        table = self._table()
        problems = [
            f"{name} differs from {self._prefix}embed_tokens.weight; only a tied head is supported"
            for name in self._heads
            if table and not self._same_bytes(self._tensors[name], table)
        ]
        for name in self._formats:
            problems += self._problems_of_codes(self._weights[name])
        return problems

    def _problems_of_codes(self, weight: Weight) -> list[str]:
        """Return what is wrong with the tensors of one matrix, beyond what `compare` finds."""
        found = {n: self._tensors.get(self._prefix + n) for n in self._entries(weight)}
        problems = [
            f"mistyped: {self._prefix}{name} is {tensor.dtype}, expected {entry.dtype}"
            for name, entry in self._entries(weight).items()
            if (tensor := found[name]) is not None and tensor.dtype != entry.dtype
        ]
        codes, scales = found.get(weight.name + CODES), found.get(weight.name + SCALES)
        if codes is not None and scales is not None:
            error = disagree(self._formats[weight.name], codes.shape, scales.shape)
            problems += [f"disagreeing: {self._prefix}{weight.name}: {error}"] if error else []
        return problems

    def _same_bytes(self, a: Tensor, b: Tensor) -> bool:
        return a[1:3] == b[1:3] and same_bytes(  # dtype and shape
            self._maps[a.file], a.start, self._maps[b.file], b.start, a.nbytes
        )

    def _check_types(self) -> None:
        coded = {
            self._prefix + n for own in self._formats for n in self._entries(self._weights[own])
        }
        wrong = [
            f"{name} ({tensor.dtype})"
            for name, tensor in self._text().items()
            if tensor.dtype not in DTYPES and name not in coded
        ]
        if wrong:
            raise UnsupportedError(
                f"{self.source} holds tensors of types other than {', '.join(DTYPES)}: "
                f"{', '.join(wrong)}"
            )

    def stored(self, name: str) -> Coded | None:
        """Return the codes and scales of a matrix, or None: it lies there as floats.

        Raises:
            CheckpointError: they are not there, or do not fit the config.
        """
        format = self._formats.get(name)
        if format is None:
            return None
        weight = self._weights[name]
        parts = [self._array(own, entry) for own, entry in self._entries(weight).items()]
        bits = [part.view(np.uint16) if part.dtype == BFLOAT16 else part for part in parts]
        return Coded(format, *bits)

    def is_float(self, name: str) -> bool:
        """Return whether a weight is in the file as floats."""
        return name not in self._formats

    def _fill(self, weight: Weight, out: np.ndarray) -> None:
        coded = self.stored(weight.name)
        if coded is None or coded.format == "bfloat16":
            (entry,) = self._entries(weight).values()
            values = self._array(weight.name, entry).reshape(-1)
            fill(out, lambda start, stop: values[start:stop], self._prefix + weight.name)
            return
        form = FORMATS[coded.format]
        blocks = coded.codes.reshape(-1, form.elements)
        scales = None if coded.scales is None else coded.scales.reshape(-1, 1)

        def decoded(start: int, stop: int) -> np.ndarray:
            part = slice(start // form.block, stop // form.block)
            own = None if scales is None else scales[part]
            return decode(blocks[part], own, coded.format).reshape(-1)

        fill(out, decoded, self._prefix + weight.name)

    def _array(self, name: str, entry: Entry) -> np.ndarray:
        """Return a tensor where it lies in the file, once it is what is expected."""
        name = self._prefix + name
        tensor = self._tensors.get(name)
        if tensor is None or tensor.shape != entry.shape:
            got = "no such tensor" if tensor is None else list(tensor.shape)
            raise CheckpointError(f"{self.source}: {name}: expected {list(entry.shape)}, got {got}")
        expected = DTYPES.keys() if entry.dtype is None else {entry.dtype}
        if tensor.dtype not in expected:
            raise UnsupportedError(
                f"{self.source}: {name} is {tensor.dtype}; expected {', '.join(expected)}"
            )
        dtype = READ[tensor.dtype]
        values = np.frombuffer(
            self._maps[tensor.file], dtype, math.prod(tensor.shape), tensor.start
        )
        return values.reshape(tensor.shape)


def _is_other_part(name: str) -> bool:
    return name.removeprefix("model.").startswith(OTHER_PARTS)


def main_dtype(sizes: Iterable[tuple[str, int]]) -> str:
    """Return the dtype that most bytes are in, of (safetensors' name of a dtype, bytes)."""
    nbytes: dict[str, int] = {}
    for dtype, size in sizes:
        nbytes[dtype] = nbytes.get(dtype, 0) + size
    name = max(nbytes, key=lambda dtype: nbytes[dtype], default="F32")
    return DTYPES[name].name if name in DTYPES else name


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read all tensors of one small file.

    Raises:
        CheckpointError: the file is truncated, or its header contradicts itself.
        UnsupportedError: a tensor that is not float32, float16 or bfloat16.
    """
    data = path.read_bytes()
    found = {}
    for name, tensor in parse_header(data, path).items():
        if tensor.dtype not in DTYPES:
            raise UnsupportedError(
                f"{path}: {show(name)} is {tensor.dtype}; expected {', '.join(DTYPES)}"
            )
        count = math.prod(tensor.shape)
        values = np.frombuffer(data, DTYPES[tensor.dtype], count, tensor.start)
        found[name] = values.reshape(tensor.shape)
    return found


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
