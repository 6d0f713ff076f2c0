"""Norm, rotary embedding and the gated activation. Each computes in float32 and casts back once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["EMPTY", "geglu", "rms_norm", "rope"]

EMPTY = -1  # the position of padding and of an unwritten cache slot


def rms_norm(
    x: Float[Array, "*batch H"], weight: Float[Array, " H"], *, eps: float, offset: float
) -> Float[Array, "*batch H"]:
    """Divide by the root mean square and multiply by `offset + weight`, before the cast back.

    Source: transformers modeling_gemma3.py, Gemma3RMSNorm (offset 1).
    """
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + jnp.float32(eps))
    gain = jnp.float32(offset) + weight.astype(jnp.float32)
    return (x32 * scale * _align(gain, x.ndim)).astype(x.dtype)


def rope(
    x: Float[Array, "B T N H"], positions: Int[Array, "B T"], *, theta: float, factor: float
) -> Float[Array, "B T N H"]:
    """Rotate the pairs (i, i + H/2) by position * theta ** (-2i / H) / factor.

    Source: RoFormer (arXiv 2104.09864) in the rotate-half layout of transformers.
    """
    half = x.shape[-1] // 2
    exponents = -jnp.arange(half, dtype=jnp.float32) / half
    frequencies = jnp.float32(theta) ** exponents / jnp.float32(factor)
    angles = positions.astype(jnp.float32)[..., None, None] * _align(frequencies, 4)
    cos, sin = jnp.cos(angles), jnp.sin(angles)  # [B, T, 1, H/2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def geglu(gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"]) -> Float[Array, "*batch F"]:
    """Return gelu(gate) * up with the tanh form of GELU, which Gemma was trained with."""
    return jax.nn.gelu(gate, approximate=True) * up


def _align(vector: Array, ndim: int) -> Array:
    return vector.reshape((1,) * (ndim - 1) + vector.shape)
