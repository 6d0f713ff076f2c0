"""What a weight can be besides a plain array: stored codes, and a layer of a stack not read yet.

Only `ops` opens these. Layers hand them on without knowing which they hold.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemlax import formats
from gemlax.formats import FORMATS, Format

__all__ = [
    "At",
    "Mixed",
    "QTensor",
    "Split",
    "Weight",
    "dense",
    "from_numpy",
    "is_stored",
    "num_parts",
    "num_rows",
    "pack_bfloat16",
    "shape_of",
    "take",
    "take_each",
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A weight held as codes of a `Format`: frozen, and streamed by a native kernel on CPU.

    Format "bfloat16" holds the bits as uint16: on XLA:CPU a bfloat16 array inside a loop gets a
    float32 copy of the whole model, its bits do not (docs/log.md, 2026-11-24). `dtype` is the
    dtype it decodes to; None: float32, and bfloat16 for that format.
    """

    codes: Any  # array; Any because JAX rebuilds pytrees with other leaves
    format: Format = dataclasses.field(metadata={"static": True})
    scales: Any = None
    dtype: str | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, [..., out, in].

        Raises:
            ValueError: codes and scales do not fit one another.
        """
        scales = None if self.scales is None else self.scales.shape
        return (*self.codes.shape[:-1], formats.check(self.format, self.codes.shape, scales))

    def dense(self) -> jax.Array:
        """Decode."""
        decoded = formats.decode(self.codes, self.scales, self.format)
        return decoded if self.dtype is None else decoded.astype(self.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixed:
    """The layers of one stack in several formats: layer i is row `row[i]` of `parts[which[i]]`.

    A Q4_K_M file has layers of one projection in two formats.
    """

    parts: tuple[QTensor, ...]
    which: Any  # int32 [layers]
    row: Any  # int32 [layers]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the stack, [layers, ..., out, in]."""
        return (self.which.shape[0], *self.parts[0].shape[1:])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Split:
    """The experts of a layer, or of a stack of layers, in `parts` equal runs on different devices.

    What reads any one of them moves it between devices; `take_each` moves nothing.
    """

    whole: Any  # array [experts, out, in] or [layers, experts, out, in]
    parts: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.whole.shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class At:
    """Layer `index` of `stack`, not read yet: what reads it decides how."""

    stack: Any  # Array | QTensor | Mixed | Split, [layers, ...]
    index: Any  # int32 scalar

    def read(self) -> Any:
        """Slice the layer out of the stack; not for `Mixed`, whose layers differ in form."""
        return jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, self.index, 0, keepdims=False), self.stack
        )


Weight = jax.Array | QTensor | Split | At


def is_stored(weight: Weight) -> bool:
    """Return whether a weight is held as codes."""
    held: Any = weight.stack if isinstance(weight, At) else weight
    return isinstance(held, (QTensor, Mixed))


def dense(weight: Weight) -> jax.Array:
    """Return any weight as an array [..., out, in]; this is the reference for every fast path."""
    return _from_part(weight, lambda held: _dense(held.read() if isinstance(held, At) else held))


def _dense(held: Any) -> jax.Array:
    held = held.whole if isinstance(held, Split) else held
    return held.dense() if isinstance(held, QTensor) else held


def _from_part(weight: Weight, read: Callable[[Any], jax.Array]) -> jax.Array:
    """Apply `read` to a weight; to the part of a `Mixed` stack where the layer lies."""
    if not isinstance(weight, At) or not isinstance(weight.stack, Mixed):
        return read(weight)
    mixed, index = weight.stack, weight.index

    def branch(part: QTensor) -> Callable[[jax.Array], jax.Array]:
        return lambda row: read(At(part, row))

    branches = [branch(part) for part in mixed.parts]
    return jax.lax.switch(mixed.which[index], branches, mixed.row[index])


def shape_of(weight: Weight) -> tuple[int, ...]:
    """Return the shape of one layer's weight, whatever holds it."""
    return weight.stack.shape[1:] if isinstance(weight, At) else weight.shape


def num_rows(weight: Weight) -> int:
    """Return the size of the first axis of one layer's weight."""
    return shape_of(weight)[0]


def num_parts(weight: Weight) -> int:
    """Return in how many runs the first axis of one layer's weight is held."""
    held: Any = weight.stack if isinstance(weight, At) else weight
    return held.parts if isinstance(held, Split) else 1


def take(weight: Weight, rows: jax.Array) -> jax.Array:
    """Read entries of the first axis (rows of a table, experts of a layer) and nothing else."""
    return _from_part(weight, lambda held: _take(held, rows))


def _take(weight: Any, rows: jax.Array) -> jax.Array:
    held = weight
    if isinstance(weight, At):
        rows = rows + weight.index * num_rows(weight)
        held = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), weight.stack)
    return _dense(jax.tree.map(lambda a: jnp.take(a, rows, axis=0), held))


def take_each(weight: Weight, entries: jax.Array) -> jax.Array:
    """Read entry `entries[p]` of each part p of a `Split`: [parts, out, in], each where it lies."""
    held: Any = weight if isinstance(weight, At) else At(jax.tree.map(lambda a: a[None], weight), 0)
    stack = held.stack.whole
    stack = stack.reshape(stack.shape[0], entries.shape[0], -1, *stack.shape[2:])
    return jax.vmap(lambda part, entry: part[held.index, entry], in_axes=(1, 0))(stack, entries)


def pack_bfloat16(weight: Any) -> QTensor:
    """Hold a bfloat16 array (NumPy or JAX) as its bits."""
    if isinstance(weight, jax.Array):
        return QTensor(jax.lax.bitcast_convert_type(weight, jnp.uint16), "bfloat16")
    return from_numpy(weight, None, "bfloat16")


def from_numpy(
    codes: np.ndarray, scales: np.ndarray | None, format: Format, dtype: str | None = None
) -> QTensor:
    """Hand codes to the default device, without a copy where it takes over NumPy's memory."""
    held = jax.device_put(codes.view(FORMATS[format].dtype))
    return QTensor(held, format, None if scales is None else jax.device_put(scales), dtype)
