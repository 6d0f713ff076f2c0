"""Canonical weights to the variables of a `Decoder` and back.

Canonical names are Hugging Face's. `decoder.weight_path` says where each lies; here they are
allocated once, filled in place and handed to the device without a copy where the backend can
take one.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from gemlax.config import TextConfig
from gemlax.decoder import Decoder, Layers, Read, weight_path
from gemlax.qtensor import QTensor, pack_bfloat16

__all__ = ["build_decoder", "default_layers", "named_weights"]

# XLA:CPU takes over NumPy memory that is aligned to this.
_ALIGNMENT = 64


def default_layers(dtype: jnp.dtype) -> Layers:
    """Return the faster layout of this backend.

    Measured for Gemma 3 270M on two cores (docs/performance.md): a scanned step of float32 takes
    about a third longer than an unrolled one; bfloat16 unrolled holds a float32 copy of most of
    the model as temporaries and is no faster.
    """
    fast = jax.default_backend() == "cpu" and jnp.dtype(dtype) == jnp.float32
    return "unroll" if fast else "scan"


def build_decoder(
    config: TextConfig,
    fill: Callable[[str, np.ndarray], None],
    *,
    dtype: Any = jnp.float32,
    layers: Layers | None = None,
    read: Read = "index",
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """Build a decoder whose weights `fill(canonical name, array)` writes.

    Args:
        fill: writes one weight into a C-contiguous array of `dtype`.
        read: how scanned layers read their matrices; "slice" when the base is trained.
        progress: told (bytes filled, bytes in all) after each weight.
    """
    dtype = jnp.dtype(dtype)
    layers = layers or default_layers(dtype)
    decoder = nnx.eval_shape(
        lambda: Decoder(config, layers=layers, read=read, dtype=dtype, rngs=nnx.Rngs(0))
    )
    graphdef, state = nnx.split(decoder)
    flat = dict(nnx.to_flat_state(state))
    total = sum(v.get_value().size for v in flat.values()) * dtype.itemsize
    done = 0
    filled = {}
    for path, names in _names_by_path(config, layers).items():
        variable = flat[path]
        buffer = _empty(variable.get_value().shape, dtype)
        for row, name in names:
            part = buffer if row is None else buffer[row]
            fill(name, part)
            done += part.nbytes
            if progress is not None:
                progress(done, total)
        filled[path] = variable.replace(_to_device(buffer, "matrix" in variable.get_metadata()))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def named_weights(decoder: Decoder) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (canonical name, array) of every weight, in layer order."""
    flat = dict(nnx.to_flat_state(nnx.state(decoder)))
    layers: Layers = "scan" if decoder.scanned else "unroll"
    for name in _canonical_names(decoder.config):
        path, row = weight_path(decoder.config, layers, name)
        value = flat[path].get_value()
        packed = isinstance(value, QTensor)
        array = np.asarray(value.codes if packed else value)
        array = array if row is None else array[row]
        yield name, array.view(ml_dtypes.bfloat16) if packed else array


def _canonical_names(config: TextConfig) -> list[str]:
    """List every weight of the decoder, from the unrolled tree: its paths are the names."""
    decoder = nnx.eval_shape(lambda: Decoder(config, layers="unroll", rngs=nnx.Rngs(0)))
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(decoder))]
    return [".".join(map(str, path)) for path in sorted(paths, key=_by_layer)]


def _by_layer(path: tuple[Any, ...]) -> tuple[int, int]:
    order = {"embed_tokens": 0, "layers": 1}.get(path[0], 2)
    return order, path[1] if order == 1 else 0


def _names_by_path(
    config: TextConfig, layers: Layers
) -> dict[tuple[Any, ...], list[tuple[int | None, str]]]:
    """Group canonical names by the variable that holds them."""
    groups: dict[tuple[Any, ...], list[tuple[int | None, str]]] = {}
    for name in _canonical_names(config):
        path, row = weight_path(config, layers, name)
        groups.setdefault(path, []).append((row, name))
    return groups


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _to_device(buffer: np.ndarray, is_matrix: bool) -> Any:
    """Give up the buffer. Matrices of bfloat16 are held as bits on CPU (`QTensor`)."""
    if is_matrix and buffer.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        return pack_bfloat16(buffer)
    return jax.device_put(buffer)
