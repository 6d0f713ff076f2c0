"""The header of a GGUF file: metadata and where each tensor lies.

Everything it says is checked against the file's size before it is believed, so that a damaged or
hostile file costs no more than reading it. It is parsed here because `gguf.GGUFReader` takes 15 s
and 715 MB for a vocabulary of 262144. Source: https://github.com/ggml-org/ggml, docs/gguf.md.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES

from gemlax.checkpoints.base import Tensor, grouped, show
from gemlax.errors import CheckpointError, UnsupportedError

__all__ = ["MAGIC", "Header", "parse_header"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4

BOOL, STRING, ARRAY = 7, 8, 9
SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", BOOL: "<u1",
           10: "<u8", 11: "<i8", 12: "<f8"}  # fmt: skip
_TYPES = {int(kind): kind for kind in GGML_QUANT_SIZES}
# In place of the size of a tensor whose type is not known.
_UNKNOWN = -1


class Header(NamedTuple):
    """What is in front of the data."""

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


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
    """Return metadata and tensors of a GGUF file; no tensor reaches outside it or into another."""
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
    unknown: dict[str, list[str]] = {}
    for _ in range(count):
        name = reader.string("a tensor name")
        if name in tensors:
            raise reader.fault(f"tensor {show(name)} is there twice")
        tensors[name] = tensor = _tensor(reader, show(name), alignment)
        if tensor.nbytes == _UNKNOWN:
            unknown.setdefault(tensor.type, []).append(name)
    if unknown:
        raise UnsupportedError(
            f"{reader.path} holds tensors of ggml types that are not known: "
            f"{grouped(unknown)}; they are newer than the gguf package that is installed, "
            "withdrawn, or ik_llama.cpp's own"
        )
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
    if code not in _TYPES:
        return Tensor(str(code), shape, start, _UNKNOWN)
    kind = _TYPES[code]
    size, nbytes = GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % size:
        raise reader.fault(f"{name}: {list(shape)} is not made of {kind.name} blocks of {size}")
    if start % alignment:
        raise reader.fault(f"{name} starts at {start}, not a multiple of {alignment}")
    return Tensor(kind.name, shape, start, math.prod(shape) // size * nbytes)
