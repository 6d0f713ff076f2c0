"""The decoder layer of Gemma as Flax NNX modules: wiring between weights and `ops`.

A layer knows its `LayerSpec` and no index, no mesh, no cache layout and no weight format.
"""

from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gemlax import ops
from gemlax.config import LayerSpec, TextConfig

__all__ = ["MLP", "Attention", "DecoderLayer", "Embedder", "KV", "Linear", "RMSNorm"]


@runtime_checkable
class KV(Protocol):
    """Where a layer's keys and values go and come from: a cache view, or this call alone."""

    @property
    def positions(self) -> Any:
        """The positions of this step's tokens, [B, T]."""
        ...

    def update(self, k: Array, v: Array) -> Any:
        """Take in this step's keys and values, [B, T, K, H]."""
        ...

    def attend(self, q: Array, *, window: int | None, scale: float) -> Array:
        """Attend to all that was taken in, up to now."""
        ...


View = TypeVar("View", bound=KV)


class Linear(nnx.Module):
    """x @ weight.T. The only module that holds a projection.

    `matrix` marks the weights that may be held as codes, and handed in as `At(stack, index)`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axes: tuple[str, str],
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        shape = (out_features, in_features)
        scale = jnp.asarray(in_features**-0.5, dtype)
        value = jax.random.normal(rngs.params(), shape, dtype) * scale
        self.weight = nnx.Param(value, axes=axes, matrix=True)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        """Return x @ weight.T in the dtype of `x`."""
        return ops.linear(x, self.weight.get_value())


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis; its gain is `config.norm_offset` + weight."""

    def __init__(self, size: int, config: TextConfig, *, dtype: jnp.dtype):
        self.eps, self.offset = config.rms_norm_eps, config.norm_offset
        self.weight = nnx.Param(jnp.full((size,), 1 - self.offset, dtype), axes=(None,))

    def __call__(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
        """Norm the last axis."""
        return ops.rms_norm(x, self.weight.get_value(), eps=self.eps, offset=self.offset)


class Embedder(nnx.Module):
    """The table that embeds tokens, scaled, and, unscaled, turns hidden states into logits."""

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        scale = jnp.asarray(config.hidden_size**-0.5, dtype)
        value = jax.random.normal(rngs.params(), shape, dtype) * scale
        self.weight = nnx.Param(value, axes=("vocab", "embed"), matrix=True)
        self.scale = config.hidden_size**0.5

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Return the scaled embeddings."""
        return ops.embed(tokens, self.weight.get_value(), scale=self.scale)

    def unembed(self, x: Float[Array, "R D"]) -> Float[Array, "R V"]:
        """Return float32 logits."""
        return ops.unembed(x, self.weight.get_value())


class Attention(nnx.Module):
    """Grouped-query self-attention with normed queries and keys.

    Source: transformers modeling_gemma3.py, Gemma3Attention.
    """

    def __init__(self, config: TextConfig, spec: LayerSpec, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        hidden, size = config.hidden_size, spec.head_dim
        heads, kv_heads = config.num_attention_heads, spec.num_key_value_heads
        make: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.spec = spec
        self.q_proj = Linear(hidden, heads * size, ("heads", "embed"), **make)
        self.k_proj = Linear(hidden, kv_heads * size, ("kv_heads", "embed"), **make)
        self.v_proj = Linear(hidden, kv_heads * size, ("kv_heads", "embed"), **make)
        self.o_proj = Linear(heads * size, hidden, ("embed", "heads"), **make)
        self.q_norm = RMSNorm(size, config, dtype=dtype)
        self.k_norm = RMSNorm(size, config, dtype=dtype)

    def __call__(self, x: Float[Array, "B T D"], kv: View) -> tuple[Float[Array, "B T D"], View]:
        """Return what the layer attends to, and `kv` with this step taken in."""
        spec = self.spec
        q = self.q_norm(self._heads(self.q_proj(x)))  # [B, T, N, H]
        k = self.k_norm(self._heads(self.k_proj(x)))  # [B, T, K, H]
        v = self._heads(self.v_proj(x))
        kv = kv.update(self._rope(k, kv.positions), v)
        out = kv.attend(self._rope(q, kv.positions), window=spec.window, scale=spec.attention_scale)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), kv

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1, self.spec.head_dim)

    def _rope(self, x: Array, positions: Array) -> Array:
        rope = self.spec.rope
        return ops.rope(x, positions, theta=rope.theta, factor=rope.factor)


class MLP(nnx.Module):
    """GeGLU: down(gelu(gate(x)) * up(x))."""

    def __init__(self, config: TextConfig, spec: LayerSpec, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        hidden, inner = config.hidden_size, spec.intermediate_size
        make: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.gate_proj = Linear(hidden, inner, ("mlp", "embed"), **make)
        self.up_proj = Linear(hidden, inner, ("mlp", "embed"), **make)
        self.down_proj = Linear(inner, hidden, ("embed", "mlp"), **make)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return the update of the residual."""
        return self.down_proj(ops.geglu(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nnx.Module):
    """Attention and MLP, each between a norm before and a norm after, around the residual.

    Source: transformers modeling_gemma3.py, Gemma3DecoderLayer.
    """

    def __init__(self, config: TextConfig, spec: LayerSpec, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        hidden = config.hidden_size
        self.self_attn = Attention(config, spec, dtype=dtype, rngs=rngs)
        self.mlp = MLP(config, spec, dtype=dtype, rngs=rngs)
        self.input_layernorm = RMSNorm(hidden, config, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(hidden, config, dtype=dtype)
        self.pre_feedforward_layernorm = RMSNorm(hidden, config, dtype=dtype)
        self.post_feedforward_layernorm = RMSNorm(hidden, config, dtype=dtype)

    def __call__(self, x: Float[Array, "B T D"], kv: View) -> tuple[Float[Array, "B T D"], View]:
        """Return the residual stream after the layer, and `kv` with this step taken in."""
        with jax.named_scope("attention"):
            out, kv = self.self_attn(self.input_layernorm(x), kv)
            x = x + self.post_attention_layernorm(out)
        with jax.named_scope("mlp"):
            out = self.mlp(self.pre_feedforward_layernorm(x))
            x = x + self.post_feedforward_layernorm(out)
        return x, kv
