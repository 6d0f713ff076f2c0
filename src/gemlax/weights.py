"""Canonical weights to the variables of a `Decoder` and back.

Canonical names are Hugging Face's. `decoder.weight_path` says where each lies; here the parts of
a variable that this process holds are allocated once, filled in place and handed to the devices,
without a copy where the backend can take one.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemlax import ops, sharding
from gemlax.config import TextConfig
from gemlax.decoder import Decoder, Layers, Read, weight_path
from gemlax.formats import Coded, Format, decode
from gemlax.names import text_weights
from gemlax.qtensor import Mixed, QTensor, Split, from_numpy, pack_bfloat16
from gemlax.sharding import ONE_DEVICE, Layout

__all__ = [
    "Codes",
    "Fill",
    "Placement",
    "abstract_decoder",
    "build_decoder",
    "default_layers",
    "held_formats",
    "held_weights",
    "named_weights",
    "place",
    "weight_reader",
]

# XLA:CPU takes over NumPy memory that is aligned to this.
_ALIGNMENT = 64


def default_layers(dtype: jnp.dtype, layout: Layout = ONE_DEVICE) -> Layers:
    """Return the faster layout of this backend.

    Measured for Gemma 3 270M on two cores (docs/performance.md): a scanned step of float32 takes as
    long as an unrolled one with the native kernels, and compiles faster; by XLA alone, and so on a
    mesh, about a third longer. bfloat16 unrolled holds a float32 copy of most of the model as
    temporaries and is no faster.
    """
    if ops.platform() != "cpu" or jnp.dtype(dtype) != jnp.float32:
        return "scan"
    with ops.implementation(layout.implementation):
        return "scan" if ops.kernels_in_use() else "unroll"


# Writes the weight of a canonical name into an array.
Fill = Callable[[str, np.ndarray], None]
# What gives a weight of a canonical name as codes, or None.
Codes = Callable[[str], Coded | None]


def build_decoder(
    config: TextConfig,
    fill: Fill,
    *,
    dtype: Any = jnp.float32,
    layers: Layers | None = None,
    read: Read = "index",
    progress: Callable[[int, int], None] | None = None,
    mesh: Mesh | None = None,
    codes: Codes | None = None,
) -> Decoder:
    """Build a decoder whose weights `fill(canonical name, array)` writes.

    The host holds the parts that its devices get, and one weight more; of matrices that are held
    as codes, it holds those of one kind twice.

    Args:
        fill: writes one weight into a C-contiguous array of `dtype`.
        read: how scanned layers read their matrices; "slice" when the base is trained.
        progress: told (bytes filled, bytes in all) after each weight.
        mesh: over which devices to lay out the weights (`sharding`); None: the default device.
            Every process fills every weight and keeps what its devices need.
        codes: gives a matrix as codes, or None where `fill` shall write it.

    Raises:
        RequestError: a weight that the mesh does not divide.
    """
    dtype = jnp.dtype(dtype)
    layers = layers or ("scan" if codes is not None else default_layers(dtype, Layout(mesh)))
    placed = {} if mesh is None else place(config, layers, mesh).shardings
    graphdef, flat = abstract_decoder(config, layers, read, dtype)
    total = sum(v.get_value().size for v in flat.values()) * dtype.itemsize
    done = 0
    filled = {}
    for path, names in _names_by_path(config, layers).items():
        shape, metadata = flat[path].get_value().shape, flat[path].get_metadata()
        stored: QTensor | Mixed | None = None
        if codes is not None and "matrix" in metadata:
            stored = _hold_codes(shape, names, codes, fill, dtype)
            stored = None if stored is None else _cut_codes(stored, placed.get(path))
        parts = None if stored is not None else _Parts(shape, dtype, placed.get(path))
        for row, name in names:
            if parts is not None:
                parts.fill(row, functools.partial(fill, name))
            done += math.prod(shape) * dtype.itemsize // len(names)
            if progress is not None:
                progress(done, total)
        filled[path] = flat[path].replace(stored if parts is None else parts.to_devices(metadata))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _hold_codes(
    shape: tuple[int, ...],
    names: list[tuple[int | None, str]],
    codes: Codes,
    fill: Fill,
    dtype: jnp.dtype,
) -> QTensor | Mixed | None:
    """Hold a variable as codes; a layer that has none, where others have, in `dtype`.

    `names` are in the order of the rows of the stack.
    """
    coded = [codes(name) for _, name in names]
    if not any(coded):
        return None
    stacked = names[0][0] is not None
    for i, (_, name) in enumerate(names):
        if coded[i] is None:
            wide = np.empty(shape[stacked:], dtype)
            fill(name, wide)
            plain: Format = "float32" if dtype == jnp.float32 else "bfloat16"
            coded[i] = Coded(plain, wide if plain == "float32" else wide.view(np.uint16))
    each = cast(list[Coded], coded)

    def hold(format: Format, members: list[Coded]) -> QTensor:
        scales = [x.scales for x in members if x.scales is not None]
        arrays = _copy([x.codes for x in members]), _copy(scales) if scales else None
        if not stacked:
            arrays = arrays[0][0], None if arrays[1] is None else arrays[1][0]
        decoded = jnp.dtype("bfloat16" if format == "bfloat16" else "float32")
        return from_numpy(*arrays, format, None if dtype == decoded else dtype.name)

    by_format: dict[Format, list[int]] = {}
    for i, one in enumerate(each):
        by_format.setdefault(one.format, []).append(i)
    parts = [hold(format, [each[i] for i in rows]) for format, rows in by_format.items()]
    if len(parts) == 1:
        return parts[0]
    which, row = np.zeros((2, len(names)), np.int32)
    for part, rows in enumerate(by_format.values()):
        which[rows], row[rows] = part, np.arange(len(rows))
    return Mixed(tuple(parts), jnp.asarray(which), jnp.asarray(row))


def _cut_codes(weight: QTensor | Mixed, how: NamedSharding | None) -> Any:
    """Lay out codes and scales over a mesh as their weight is; rows stay whole where not both go.

    No native kernel reads them there.
    """
    if how is None:
        return weight
    spec = (*how.spec, *(None,) * (len(weight.shape) - len(how.spec)))
    arrays = [a for a in jax.tree.leaves(weight) if a.ndim == len(spec)]
    names = (spec[-1],) if isinstance(spec[-1], str) else spec[-1] or ()
    parts = math.prod(how.mesh.shape[name] for name in names)
    if any(a.shape[-1] % parts for a in arrays):
        spec = (*spec[:-1], None)

    def put(a: Any) -> Any:
        axes = spec if a.ndim == len(spec) else ()
        return jax.device_put(a, NamedSharding(how.mesh, PartitionSpec(*axes)))

    return jax.tree.map(put, weight)


class Placement(NamedTuple):
    """How a mesh holds a decoder: a sharding by variable path, and which weights it repeats.

    `repeated` are canonical names of weights that fsdp, expert and tensor do not all cut.
    """

    shardings: dict[tuple[Any, ...], NamedSharding]
    repeated: tuple[str, ...]


def place(config: TextConfig, layers: Layers, mesh: Mesh) -> Placement:
    """Decide from the config and the axes of each weight how `mesh` holds them."""
    _, flat = abstract_decoder(config, layers, "slice", jnp.dtype(jnp.float32))
    shardings, repeated = {}, []
    parts = math.prod(sharding.parts(mesh, axis) for axis in ("embed", "experts", "mlp"))
    for path, names in _names_by_path(config, layers).items():
        shape = flat[path].get_value().shape
        stacked = names[0][0] is not None
        shardings[path] = sharding.weight_sharding(
            mesh, config, names[0][1], flat[path].get_metadata()["axes"], shape[stacked:],
            stacked=stacked,
        )  # fmt: skip
        if math.prod(shardings[path].shard_shape(shape)) * parts > math.prod(shape):
            repeated += [name for _, name in names]
    return Placement(shardings, tuple(repeated))


@functools.cache
def abstract_decoder(
    config: TextConfig, layers: Layers, read: Read, dtype: jnp.dtype
) -> tuple[Any, Mapping[tuple[Any, ...], Any]]:
    """Return the graph of a decoder, and its variables by path without any values."""
    decoder = nnx.eval_shape(
        lambda: Decoder(config, layers=layers, read=read, dtype=dtype, rngs=nnx.Rngs(0))
    )
    graphdef, state = nnx.split(decoder)
    return graphdef, MappingProxyType(dict(nnx.to_flat_state(state)))


def named_weights(decoder: Decoder) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (canonical name, array) of every weight, in layer order; codes are decoded.

    On a mesh each weight is gathered when its turn comes, so every process must take it.
    """
    read = weight_reader(decoder)
    return ((name, read(name)) for name in text_weights(decoder.config))


def held_weights(decoder: Decoder) -> Iterator[tuple[str, np.ndarray | Coded]]:
    """Yield every weight as it is held: codes where `held_formats` has its name, else floats."""
    flat, formats = _variables(decoder), held_formats(decoder)
    for name in text_weights(decoder.config):
        weight = _held(decoder, flat, name)
        if isinstance(weight, Coded) and name not in formats:
            weight = decode(weight.codes, weight.scales, weight.format)
        yield name, weight
        del weight  # before the next one is read


def held_formats(decoder: Decoder) -> dict[str, Format]:
    """Return the format of every matrix that is held as codes, by canonical name.

    A matrix whose bits are held is none of them where it has the dtype of the decoder.
    """
    flat, dtype = _variables(decoder), decoder.dtype
    weights = {name: _place(decoder, flat, name)[0] for name in text_weights(decoder.config)}
    return {
        name: value.format
        for name, value in weights.items()
        if isinstance(value, QTensor) and value.format != dtype.name
    }


def weight_reader(decoder: Decoder) -> Callable[[str], np.ndarray]:
    """Return what reads a weight by canonical name, in the dtype of the decoder."""
    flat, dtype = _variables(decoder), decoder.dtype

    def read(name: str) -> np.ndarray:
        weight = _held(decoder, flat, name)
        if not isinstance(weight, Coded):
            return weight
        return decode(weight.codes, weight.scales, weight.format).astype(dtype, copy=False)

    return read


def _variables(decoder: Decoder) -> dict[tuple[Any, ...], Any]:
    return dict(nnx.to_flat_state(nnx.state(decoder)))


def _place(
    decoder: Decoder, flat: Mapping[tuple[Any, ...], Any], name: str
) -> tuple[Any, int | None]:
    """Return the array, stack or codes that a weight lies in, and its row there."""
    path, row = weight_path(decoder.config, decoder.layout, name)
    value: Any = flat[path].get_value()
    if isinstance(value, Mixed):
        assert row is not None
        value, row = value.parts[int(value.which[row])], int(value.row[row])
    return value, row


def _held(decoder: Decoder, flat: Mapping[tuple[Any, ...], Any], name: str) -> np.ndarray | Coded:
    """Return a weight in host memory, as it is held."""
    value, row = _place(decoder, flat, name)
    if not isinstance(value, QTensor):
        return _whole(jax.tree.leaves(value)[0], row)
    scales = None if value.scales is None else _whole(value.scales, row)
    return Coded(value.format, _whole(value.codes, row), scales)


def _whole(array: jax.Array, row: int | None) -> np.ndarray:
    """Return a variable, or one row of it, in host memory."""
    if isinstance(array.sharding, NamedSharding):
        array = _gathered(array.sharding.mesh)(array, row)
        row = None
    whole = np.asarray(array)
    return whole if row is None else whole[row]


@functools.cache
def _gathered(mesh: Any) -> Callable[[jax.Array, int | None], jax.Array]:
    """Return what copies a row of a variable to all devices."""
    return jax.jit(
        lambda a, row: a if row is None else jax.lax.dynamic_index_in_dim(a, row, keepdims=False),
        out_shardings=sharding.replicated(mesh),
    )


def _names_by_path(
    config: TextConfig, layers: Layers
) -> dict[tuple[Any, ...], list[tuple[int | None, str]]]:
    """Group canonical names by the variable that holds them."""
    groups: dict[tuple[Any, ...], list[tuple[int | None, str]]] = {}
    for name in text_weights(config):
        path, row = weight_path(config, layers, name)
        groups.setdefault(path, []).append((row, name))
    return groups


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _copy(rows: list[np.ndarray]) -> np.ndarray:
    """Stack arrays of one shape in memory of its own that devices may take over."""
    out = _empty((len(rows), *rows[0].shape), rows[0].dtype)
    for target, row in zip(out, rows, strict=True):
        target[...] = row
    return out


class _Parts:
    """The different parts of one variable that the devices of this process hold."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, placed: NamedSharding | None):
        """`placed` None: one part, for the default device."""
        self.shape, self.placed = shape, placed
        everything = (slice(None),) * len(shape)
        self.indices: dict[Any, Any] = {None: everything}
        if placed is not None:
            self.indices = dict(placed.addressable_devices_indices_map(shape))
        size = shape if placed is None else placed.shard_shape(shape)
        # By what they cover; a slice has no hash in Python 3.11.
        self.parts = {str(index): (index, _empty(size, dtype)) for index in self.indices.values()}

    def fill(self, row: int | None, write: Callable[[np.ndarray], None]) -> None:
        """Take in one weight, the variable or a row of it, that `write` writes."""
        parts = list(self.parts.values())
        shape = self.shape
        if row is not None:
            parts = [(index[1:], part[row]) for index, part in parts]
            shape = shape[1:]
        if parts[0][1].shape == shape:
            write(parts[0][1])
            return
        weight = np.empty(shape, parts[0][1].dtype)
        write(weight)
        for index, part in parts:
            part[...] = weight[index]

    def to_devices(self, metadata: dict[str, Any]) -> Any:
        """Give up the parts. Without a mesh, CPU holds bfloat16 matrices as bits (`QTensor`).

        On a mesh it does not: `unembed` takes bits by blocks of rows, which gathers a table that
        is cut by rows (seen in the program). The price is a float32 copy of each device's part.
        """
        if self.placed is None:
            ((_, whole),) = self.parts.values()
            bits = "matrix" in metadata and whole.dtype == jnp.bfloat16
            if bits and ops.platform() == "cpu":
                return pack_bfloat16(whole)
            return jax.device_put(whole)
        shards = [
            jax.device_put(self.parts[str(index)][1], device)
            for device, index in self.indices.items()
        ]
        array = jax.make_array_from_single_device_arrays(self.shape, self.placed, shards)
        count = sharding.parts(self.placed.mesh, "experts")
        is_experts = "matrix" in metadata and len(metadata["axes"]) == 3
        return Split(array, count) if is_experts and count > 1 else array
