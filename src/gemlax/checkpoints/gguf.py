"""GGUF files, as llama.cpp writes them: config, vocabulary and dequantised weights of one file.

Everything a header says is checked against the file's size before it is believed, so that a
damaged or hostile file costs no more than reading it. The header is parsed here because
`gguf.GGUFReader` takes 15 s and 715 MB for a vocabulary of 262144; the arithmetic of the
quantised types is `gguf.quants`'. Source: https://github.com/ggml-org/ggml, docs/gguf.md.
"""

import contextlib
import dataclasses
import logging
import math
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from gemlax.checkpoints.base import (
    BFLOAT16,
    Checkpoint,
    fill,
    fit_vocab,
    log_left_aside,
    refuse_drafter,
    resolve_config,
    same_bytes,
    show,
)
from gemlax.checkpoints.names import Weight, unused
from gemlax.config import GemmaConfig
from gemlax.errors import CheckpointError, UnsupportedError
from gemlax.formats import Coded, Format
from gemlax.tokenizer import Tokenizer

__all__ = [
    "MAGIC",
    "GGUFCheckpoint",
    "Header",
    "Vocabulary",
    "load_tokenizer",
    "parse_header",
    "read_vocabulary",
]

logger = logging.getLogger(__name__)

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4

T = GGMLQuantizationType
FLOATS = {T.F32: np.dtype(np.float32), T.F16: np.dtype(np.float16), T.BF16: BFLOAT16}
QUANTISED = {T.Q8_0, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q4_K, T.Q5_K, T.Q6_K}

# Types whose blocks `formats` decodes.
KEPT: dict[GGMLQuantizationType, Format] = {
    T.Q8_0: "q8_0", T.Q4_0: "q4_0", T.Q5_0: "q5_0", T.Q4_K: "q4_k", T.Q6_K: "q6_k",
}  # fmt: skip

BOOL, STRING, ARRAY = 7, 8, 9
SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", BOOL: "<u1",
           10: "<u8", 11: "<i8", 12: "<f8"}  # fmt: skip

TABLE, HEAD = "token_embd.weight", "output.weight"
# llama.cpp's Gemma 3 does not read it; Gemma 4's must say what the config says.
ROPE = "rope_freqs.weight"
# What the frequencies that stand still are divided by. Source: llama.cpp conversion/gemma.py.
STILL = 1e30
# Kinds of vocabulary that are SentencePiece's. Source: llama.cpp conversion/gemma.py.
VOCABULARIES = ("llama", "gemma4")


class Tensor(NamedTuple):
    """One tensor: `shape` has the row last, as numpy does; `start` is in bytes of the file."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    nbytes: int


class Header(NamedTuple):
    """What is in front of the data."""

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


class Vocabulary(NamedTuple):
    """The arguments of `Tokenizer.from_vocabulary`."""

    pieces: list[str]
    scores: list[float]
    token_types: list[int]
    bos_id: int
    eos_id: int
    unk_id: int
    pad_id: int
    add_bos: bool
    merges: list[str] | None


class GGUFCheckpoint(Checkpoint):
    """One .gguf file."""

    stored_dtype = "gguf"

    def __init__(self, path: Path):
        self.source = path
        self.generation_config = {}
        self._data = _map(path)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self.metadata, self._tensors = parse_header(self._data, self.source)
        if self.metadata.get("split.count", 1) not in (0, 1):
            raise UnsupportedError(
                f"{self.source} is one of several parts; join them with llama-gguf-split --merge"
            )
        architecture = self.metadata.get("general.architecture")
        refuse_drafter(architecture, self.source)
        config = resolve_config(
            lambda: GemmaConfig.from_gguf(self.metadata),
            layers=self.metadata.get(f"{architecture}.block_count"),
            tensors=len(self._tensors),
            source=self.source,
        )
        table = self._tensors.get(TABLE)
        config = fit_vocab(config, table.shape[0] if table else None)
        self.config = self._find_k_eq_v(config)
        self._unused = {weight.gguf for weight in unused(self.config.text)}
        idle = sorted(self._unused & self._tensors.keys())
        log_left_aside(logger, self.source, idle, "layers that read the K/V of another")

    def _find_k_eq_v(self, config: GemmaConfig) -> GemmaConfig:
        """Tell from the tensors whether full layers make values of keys: the header does not."""
        specs = config.text.layers
        owners = {i for i, s in enumerate(specs) if s.kind == "full_attention" and s.owns_kv}
        stored = any(f"blk.{i}.attn_v.weight" in self._tensors for i in owners)
        if stored or not config.text.v_norm:
            return config
        layers = tuple(
            dataclasses.replace(spec, k_eq_v=i in owners) for i, spec in enumerate(specs)
        )
        text = dataclasses.replace(config.text, layers=layers)
        return dataclasses.replace(config, text=text)

    def tokenizer(self) -> Tokenizer | None:
        """Build the tokenizer from the vocabulary in the file; None if it has none of that kind."""
        vocabulary = read_vocabulary(self.metadata, self.source)
        return Tokenizer.from_vocabulary(**vocabulary._asdict()) if vocabulary else None

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The template in the file's metadata, or None."""
        found = self.metadata.get("tokenizer.chat_template")
        return found if isinstance(found, str) and found.strip() else None

    def close(self) -> None:
        """Close the file. Arrays that were read stay valid."""
        # A traceback may still hold a view; then the map goes when the view does.
        with contextlib.suppress(BufferError):
            self._data.close()

    def _expected(self) -> dict[str, tuple[int, ...]]:
        return {weight.gguf: weight.shape for weight in self._weights.values()}

    def _found(self) -> dict[str, tuple[int, ...]]:
        return {
            name: tensor.shape
            for name, tensor in self._tensors.items()
            if name not in (ROPE, HEAD) and name not in self._unused
        }

    def _check_types(self) -> None:
        wrong = [
            f"{name} ({self._tensors[name].type.name})"
            for name in self._found()
            if self._tensors[name].type not in FLOATS.keys() | QUANTISED
        ]
        if wrong:
            raise UnsupportedError(
                f"{self.source} holds tensors of types that are not read: {', '.join(wrong)}"
            )
        table, head = self._tensors[TABLE], self._tensors.get(HEAD)
        if head is not None and not self._same_bytes(table, head):
            raise UnsupportedError(
                f"{self.source}: {HEAD} differs from {TABLE}; only a tied head is supported"
            )

        self._check_rope()

    def _check_rope(self) -> None:
        """Compare the divisors of the frequencies with the config, which is made without them."""
        spec = self.config.text.first("full_attention")
        if ROPE not in self._tensors or spec is None or spec.rope.rotated == 1.0:
            return
        tensor, pairs = self._tensors[ROPE], spec.head_dim // 2
        turning = round(pairs * spec.rope.rotated)
        expected = np.repeat([1.0, STILL], [turning, pairs - turning]).astype(np.float32)
        stored = tensor.type == T.F32 and tensor.shape == expected.shape
        if not stored or not np.array_equal(self._decoder(ROPE, tensor)(0, pairs), expected):
            raise UnsupportedError(
                f"{self.source}: {ROPE} must be {turning} ones and {pairs - turning} times "
                f"{STILL}; another rope is not supported"
            )

    def _same_bytes(self, a: Tensor, b: Tensor) -> bool:
        return a[:2] == b[:2] and same_bytes(  # type and shape
            self._data, a.start, self._data, b.start, a.nbytes
        )

    def _fill(self, weight: Weight, out: np.ndarray) -> None:
        tensor = self._tensors.get(weight.gguf)
        if tensor is None or tensor.shape != weight.shape:
            got = "no such tensor" if tensor is None else list(tensor.shape)
            raise CheckpointError(
                f"{self.source}: {weight.gguf}: expected {list(weight.shape)}, got {got}"
            )
        decode = self._decoder(weight.gguf, tensor)
        if not weight.gguf_offset:
            fill(out, decode, weight.gguf)
            return
        offset = np.float32(weight.gguf_offset)
        fill(out, lambda a, b: decode(a, b).astype(np.float32) - offset, weight.gguf)

    def stored(self, name: str) -> Coded | None:
        """Return the blocks of a quantised matrix, [..., out, bytes], byte for byte."""
        weight = self._weights[name]
        tensor = self._tensors.get(weight.gguf)
        if tensor is None or tensor.shape != weight.shape or tensor.type not in KEPT:
            return None
        data = np.frombuffer(self._data, np.uint8, tensor.nbytes, tensor.start)
        return Coded(KEPT[tensor.type], data.reshape(*tensor.shape[:-1], -1))

    def is_float(self, name: str) -> bool:
        """Return whether a weight is in the file as floats."""
        tensor = self._tensors.get(self._weights[name].gguf)
        return tensor is None or tensor.type in FLOATS

    def _decoder(self, name: str, tensor: Tensor) -> Callable[[int, int], np.ndarray]:
        """Return a function that gives elements [a, b) of a tensor; a is a block's first."""
        if tensor.type in FLOATS:
            count = math.prod(tensor.shape)
            floats = np.frombuffer(self._data, FLOATS[tensor.type], count, tensor.start)
            return lambda a, b: floats[a:b]
        if tensor.type not in QUANTISED:
            raise UnsupportedError(
                f"{self.source}: {name} is {tensor.type.name}, which is not read"
            )
        size, nbytes = GGML_QUANT_SIZES[tensor.type]
        data = np.frombuffer(self._data, np.uint8, tensor.nbytes, tensor.start)

        def decode(a: int, b: int) -> np.ndarray:
            # One row: `dequantize` loops in Python over groups of 16 rows.
            blocks = data[a // size * nbytes : b // size * nbytes].reshape(1, -1)
            return dequantize(blocks, tensor.type).reshape(-1)

        return decode


def load_tokenizer(path: Path) -> Tokenizer:
    """Build the tokenizer of a GGUF file of any size of model; no weight is touched.

    Raises:
        CheckpointError: the file or its vocabulary is damaged.
        UnsupportedError: it has no SentencePiece vocabulary.
    """
    with _map(path) as data:
        vocabulary = read_vocabulary(parse_header(data, path).metadata, path)
    if vocabulary is None:
        raise UnsupportedError(f"{path} has no SentencePiece vocabulary")
    return Tokenizer.from_vocabulary(**vocabulary._asdict())


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise CheckpointError(f"{path} is empty; expected a GGUF file")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


# --- the vocabulary ----------------------------------------------------------------------------


def read_vocabulary(metadata: Mapping[str, Any], path: Path) -> Vocabulary | None:
    """Return the SentencePiece vocabulary of a file; None if it has none or another kind.

    Raises:
        CheckpointError: a part of it is missing or of the wrong type.
    """
    own = {k[15:]: v for k, v in metadata.items() if k.startswith("tokenizer.ggml.")}
    model = own.get("model")
    if model not in VOCABULARIES:
        logger.warning("%s: no tokenizer: its vocabulary is of kind %r", path, model)
        return None
    merges = _list(own, "merges", str, path) if "merges" in own else None
    unscored = merges is not None and "scores" not in own
    return Vocabulary(
        pieces=_list(own, "tokens", str, path),
        scores=[] if unscored else _list(own, "scores", float, path),
        token_types=_list(own, "token_type", int, path),
        bos_id=_id(own, "bos_token_id", 2, path),
        eos_id=_id(own, "eos_token_id", 1, path),
        unk_id=_id(own, "unknown_token_id", 3, path),
        pad_id=_id(own, "padding_token_id", 0, path),
        add_bos=bool(own.get("add_bos_token", True)),
        merges=merges,
    )


def _list(own: Mapping[str, Any], key: str, kind: type, path: Path) -> list[Any]:
    value = own.get(key)
    if not isinstance(value, list) or not all(type(entry) is kind for entry in value):
        raise CheckpointError(f"{path}: tokenizer.ggml.{key} must be an array of {kind.__name__}")
    return value


def _id(own: Mapping[str, Any], key: str, default: int, path: Path) -> int:
    value = own.get(key, default)
    if type(value) is not int:
        raise CheckpointError(f"{path}: tokenizer.ggml.{key} must be an integer, got {value!r}")
    return value


# --- the header --------------------------------------------------------------------------------


class _Reader:
    """A position in a file that may end, or lie, anywhere."""

    def __init__(self, data: mmap.mmap | bytes, path: Path):
        self.data = data
        self.path = path
        self.size = len(data)
        self.position = 0

    def fault(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: damaged GGUF header at byte {self.position}: {what}")

    def take(self, count: int, item_bytes: int, what: str) -> int:
        """Return the position of `count` items and step over them."""
        start, left = self.position, self.size - self.position
        if count * item_bytes > left:
            raise self.fault(f"{what}: {count} of {item_bytes} bytes, but {left} are left")
        self.position += count * item_bytes
        return start

    def number(self, code: str, what: str) -> int:
        layout = struct.Struct(code)
        return layout.unpack_from(self.data, self.take(1, layout.size, what))[0]

    def string(self, what: str) -> str:
        return self.strings(1, what)[0]

    def strings(self, count: int, what: str) -> list[str]:
        """Return `count` strings; the loop is what a vocabulary costs, so it is kept bare."""
        data, size, position = self.data, self.size, self.position
        unpack = struct.Struct("<Q").unpack_from
        found = []
        try:
            for _ in range(count):
                start = position + 8
                stop = start + unpack(data, position)[0]
                if stop > size:
                    raise self.fault(f"{what}: a string ends {stop - size} bytes behind the file")
                found.append(data[start:stop].decode())
                position = stop
        except struct.error as error:
            raise self.fault(f"{what}: the file ends inside it") from error
        except UnicodeDecodeError as error:
            raise self.fault(f"{what}: not UTF-8: {error.reason}") from error
        self.position = position
        return found

    def value(self, what: str) -> Any:
        kind = self.number("<I", what)
        if kind == ARRAY:
            return self.array(what)
        if kind == STRING:
            return self.string(what)
        return self.scalars(kind, 1, what)[0]

    def array(self, what: str) -> list[Any]:
        kind, count = self.number("<I", what), self.number("<Q", what)
        if kind != STRING:
            return self.scalars(kind, count, what)
        if count * 8 > self.size - self.position:
            raise self.fault(f"{what}: {count} strings do not fit in the file")
        return self.strings(count, what)

    def scalars(self, kind: int, count: int, what: str) -> list[Any]:
        if kind not in SCALARS:
            nested = "an array of arrays" if kind == ARRAY else f"value type {kind}"
            raise self.fault(f"{what}: {nested} is not known")
        dtype = np.dtype(SCALARS[kind])
        values = np.frombuffer(self.data, dtype, count, self.take(count, dtype.itemsize, what))
        return (values != 0).tolist() if kind == BOOL else values.tolist()


def parse_header(data: mmap.mmap | bytes, path: Path) -> Header:
    """Return metadata and tensors of a GGUF file; no tensor reaches outside it or into another.

    Raises:
        CheckpointError: the file is truncated, or its header contradicts itself.
        UnsupportedError: another version, or big-endian.
    """
    reader = _Reader(data, path)
    if data[:4] != MAGIC:
        raise CheckpointError(f"{path} is not a GGUF file: it begins with {data[:4]!r}")
    reader.position = 4
    version = reader.number("<I", "version")
    if version not in VERSIONS:
        big = " (a big-endian file)" if version & 0xFFFF == 0 else ""
        raise UnsupportedError(f"{path}: GGUF version {version}{big}; expected 2 or 3")
    num_tensors, num_values = reader.number("<Q", "tensors"), reader.number("<Q", "metadata")
    # The smallest entries: an empty name, a type and one byte; an empty name and no dimensions.
    if num_values * 13 + num_tensors * 24 > reader.size:
        raise reader.fault(f"{num_values} values and {num_tensors} tensors do not fit in the file")
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = reader.string("a metadata key")
        if key in metadata:
            raise reader.fault(f"key {show(key)} is there twice")
        metadata[key] = reader.value(show(key))
    return Header(metadata, _tensors(reader, num_tensors, metadata))


def _tensors(reader: _Reader, count: int, metadata: dict[str, Any]) -> dict[str, Tensor]:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise reader.fault(f"general.alignment {alignment!r} is not a power of two")
    tensors: dict[str, Tensor] = {}
    for _ in range(count):
        name = reader.string("a tensor name")
        if name in tensors:
            raise reader.fault(f"tensor {show(name)} is there twice")
        tensors[name] = _tensor(reader, show(name), alignment)
    base = -(-reader.position // alignment) * alignment
    end, before = base, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        start = base + tensor.start
        if start < end:
            raise reader.fault(f"{show(name)} overlaps {before}")
        end, before = start + tensor.nbytes, show(name)
        if end > reader.size:
            raise CheckpointError(
                f"{reader.path} is truncated: {before} ends at byte {end} of {reader.size}"
            )
        tensors[name] = tensor._replace(start=start)
    return tensors


def _tensor(reader: _Reader, name: str, alignment: int) -> Tensor:
    """Read one entry; its start still counts from the first byte of data."""
    num_dims = reader.number("<I", name)
    if not 1 <= num_dims <= MAX_DIMS:
        raise reader.fault(f"{name} has {num_dims} dimensions; expected 1 to {MAX_DIMS}")
    shape = tuple(reader.number("<Q", name) for _ in range(num_dims))[::-1]
    code, start = reader.number("<I", name), reader.number("<Q", name)
    try:
        kind = GGMLQuantizationType(code)
    except ValueError:
        raise reader.fault(f"{name} has ggml type {code}, which is not known") from None
    size, nbytes = GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % size:
        raise reader.fault(f"{name}: {list(shape)} is not made of {kind.name} blocks of {size}")
    if start % alignment:
        raise reader.fault(f"{name} starts at {start}, not a multiple of {alignment}")
    return Tensor(kind, shape, start, math.prod(shape) // size * nbytes)
