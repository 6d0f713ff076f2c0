"""How keys and values are held in a cache: as they are, as their bits, or as 8-bit codes.

What holds them is a pytree whose leaves share the leading axes, so a cache writes and reads any
form alike. Only this file knows the forms.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gemlax.ops.backend import platform

__all__ = ["Int8", "Storage", "Stored", "decode", "empty", "encode", "to_storage"]

# None: the dtype itself, or its bits where the backend needs them.
Storage = Literal["int8"] | None


class Int8(NamedTuple):
    """Codes in [-127, 127] [..., K, H], times one float32 scale per head [..., K].

    The error of a value is at most half a step: its head's largest magnitude / 254.
    """

    codes: Any
    scales: Any


Stored = Any  # Array | Int8


def empty(shape: tuple[int, ...], dtype: Any, storage: Storage = None) -> Stored:
    """Return zeros of `shape` [..., K, H] in the form that a cache of `dtype` has here."""
    if storage == "int8":
        return Int8(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1], jnp.float32))
    return jnp.zeros(shape, _stored_dtype(jnp.dtype(dtype)))


def to_storage(x: Array) -> Array:
    """Turn a buffer that a caller owns into the form that is written in place here."""
    return encode(x, jnp.zeros((), _stored_dtype(x.dtype)))


def encode(x: Float[Array, "*batch K H"], like: Stored) -> Stored:
    """Bring keys or values into the form of `like`."""
    if isinstance(like, Int8):
        wide = x.astype(jnp.float32)
        scales = jnp.abs(wide).max(axis=-1) / jnp.float32(127)
        codes = wide / jnp.where(scales == 0, jnp.float32(1), scales)[..., None]
        return Int8(jnp.round(codes).astype(jnp.int8), scales)
    if like.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return x.astype(like.dtype)


def decode(stored: Stored, dtype: Any) -> Float[Array, "*batch K H"]:
    """Return what was encoded, in `dtype`."""
    if isinstance(stored, Int8):
        return (stored.codes.astype(jnp.float32) * stored.scales[..., None]).astype(dtype)
    if stored.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(stored, jnp.bfloat16).astype(dtype)
    return stored.astype(dtype)


def _stored_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """XLA:CPU converts a bfloat16 buffer as a whole for a one-row write; uint16 it does not."""
    narrow = dtype == jnp.bfloat16 and platform() == "cpu"
    return jnp.dtype(jnp.uint16) if narrow else dtype
