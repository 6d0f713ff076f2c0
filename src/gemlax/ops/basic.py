"""Norm, rotary embedding and the gated activation. Each computes in float32 and casts back once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["EMPTY", "geglu", "rms_norm", "rope", "softcap"]

EMPTY = -1  # the position of padding and of an unwritten cache slot


def rms_norm(
    x: Float[Array, "*batch H"], weight: Float[Array, " H"] | None, *, eps: float, offset: float
) -> Float[Array, "*batch H"]:
    """Divide by the root mean square and multiply by `offset + weight`, before the cast back.

    Without a weight it only divides. Sources: transformers modeling_gemma3.py, Gemma3RMSNorm
    (offset 1); modeling_gemma4.py, Gemma4RMSNorm (offset 0).
    """
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + jnp.float32(eps))
    if weight is None:
        return (x32 * scale).astype(x.dtype)
    gain = jnp.float32(offset) + weight.astype(jnp.float32)
    return (x32 * scale * _align(gain, x.ndim)).astype(x.dtype)


def rope(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    *,
    theta: float,
    factor: float = 1.0,
    rotated: float = 1.0,
) -> Float[Array, "B T N H"]:
    """Rotate the pairs (i, i + H/2) by position * theta ** (-2i / H) / factor.

    Only the first `rotated` share of the pairs turns; the exponent's denominator stays the whole
    head. Sources: RoFormer (arXiv 2104.09864) in the rotate-half layout of transformers, and its
    modeling_rope_utils.py, _compute_proportional_rope_parameters.
    """
    half = x.shape[-1] // 2
    index = jnp.arange(half, dtype=jnp.float32)
    turning = jnp.power(jnp.float32(theta), -index / half) / jnp.float32(factor)
    frequencies: Array = jnp.where(index < int(rotated * half), turning, 0.0)
    angles = positions.astype(jnp.float32)[..., None, None] * _align(frequencies, 4)
    cos, sin = jnp.cos(angles), jnp.sin(angles)  # [B, T, 1, H/2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return out.astype(x.dtype)


def geglu(gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"]) -> Float[Array, "*batch F"]:
    """Return gelu(gate) * up with the tanh form of GELU, which Gemma was trained with."""
    return jax.nn.gelu(gate, approximate=True) * up


def softcap(x: Float[Array, "*batch V"], cap: float | None) -> Float[Array, "*batch V"]:
    """Squash to (-cap, cap) by tanh; None leaves `x` as it is."""
    return x if cap is None else jnp.tanh(x / jnp.float32(cap)) * jnp.float32(cap)


def _align(vector: Array, ndim: int) -> Array:
    return vector.reshape((1,) * (ndim - 1) + vector.shape)
