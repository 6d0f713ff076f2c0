"""What a weight can be besides a plain array: stored codes, and a layer of a stack not read yet.

Only `ops` opens these. Layers hand them on without knowing which they hold.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

__all__ = [
    "At",
    "QTensor",
    "Split",
    "Weight",
    "dense",
    "num_parts",
    "num_rows",
    "pack_bfloat16",
    "shape_of",
    "take",
    "take_each",
]

Format = Literal["bfloat16"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A weight held as codes.

    Format "bfloat16" holds the bits as uint16: on XLA:CPU a bfloat16 array inside a loop gets a
    float32 copy of the whole model, its bits do not (docs/log.md, 2026-11-24).
    """

    codes: Any  # array; Any because JAX rebuilds pytrees with other leaves
    format: Format = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, [..., out, in]."""
        return self.codes.shape

    def dense(self) -> jax.Array:
        """Decode to the format's own dtype."""
        return jax.lax.bitcast_convert_type(self.codes, jnp.bfloat16)


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

    stack: Any  # Array | QTensor | Split, [layers, ...]
    index: Any  # int32 scalar

    def read(self) -> Any:
        """Slice the layer out of the stack."""
        return jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, self.index, 0, keepdims=False), self.stack
        )


Weight = jax.Array | QTensor | Split | At


def dense(weight: Weight) -> jax.Array:
    """Return any weight as an array [..., out, in]; this is the reference for every fast path."""
    held: Any = weight.read() if isinstance(weight, At) else weight
    held = held.whole if isinstance(held, Split) else held
    return held.dense() if isinstance(held, QTensor) else held


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
    held: Any = weight
    if isinstance(weight, At):
        rows = rows + weight.index * num_rows(weight)
        held = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), weight.stack)
    return dense(jax.tree.map(lambda a: jnp.take(a, rows, axis=0), held))


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
    return QTensor(jax.device_put(weight.view("uint16")), "bfloat16")
