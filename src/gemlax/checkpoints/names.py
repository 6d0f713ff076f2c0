"""The one table of weights: what each is called and how it lies in every checkpoint format.

A row holds one kind of weight. Shapes are words of the project's dimension letters, so that
`NH D` is [query heads * head_dim, hidden]; a layout in another format is another order of the
same letters, and its inverse is the same pair read the other way. This file reads no files.
"""

import math
from dataclasses import dataclass

import numpy as np

from gemlax.config import LayerSpec, TextConfig

__all__ = [
    "TABLE",
    "Weight",
    "WeightKind",
    "from_orbax",
    "resolve",
    "text_weights",
    "to_orbax",
]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class WeightKind:
    """One row. `{i}` stands for the layer; a pattern without it is there once.

    `name` is Hugging Face's without its prefix: canonical name and safetensors name are one.
    `part` says which slice of a stacked Orbax array it is; None means all of it. The GGUF file
    holds a `norm` weight plus `TextConfig.norm_offset`; all else is the same number everywhere.
    """

    name: str
    shape: str
    gguf: str
    orbax: str
    orbax_shape: str
    part: int | None = None
    norm: bool = False


def _norm(name: str, dim: str, gguf: str, orbax: str) -> WeightKind:
    return WeightKind(name, dim, gguf, orbax, dim, norm=True)


_BEFORE = (
    WeightKind(
        "embed_tokens.weight", "V D", "token_embd.weight", "embedder/input_embedding", "V D"
    ),
)
_LAYER = (
    _norm("layers.{i}.input_layernorm.weight", "D",
          "blk.{i}.attn_norm.weight", "layer_{i}/pre_attention_norm/scale"),
    WeightKind("layers.{i}.self_attn.q_proj.weight", "NH D",
               "blk.{i}.attn_q.weight", "layer_{i}/attn/q_einsum", "N D H"),
    WeightKind("layers.{i}.self_attn.k_proj.weight", "KH D",
               "blk.{i}.attn_k.weight", "layer_{i}/attn/kv_einsum", "K D H", part=0),
    WeightKind("layers.{i}.self_attn.v_proj.weight", "KH D",
               "blk.{i}.attn_v.weight", "layer_{i}/attn/kv_einsum", "K D H", part=1),
    WeightKind("layers.{i}.self_attn.o_proj.weight", "D NH",
               "blk.{i}.attn_output.weight", "layer_{i}/attn/attn_vec_einsum", "N H D"),
    _norm("layers.{i}.self_attn.q_norm.weight", "H",
          "blk.{i}.attn_q_norm.weight", "layer_{i}/attn/_query_norm/scale"),
    _norm("layers.{i}.self_attn.k_norm.weight", "H",
          "blk.{i}.attn_k_norm.weight", "layer_{i}/attn/_key_norm/scale"),
    _norm("layers.{i}.post_attention_layernorm.weight", "D",
          "blk.{i}.post_attention_norm.weight", "layer_{i}/post_attention_norm/scale"),
    _norm("layers.{i}.pre_feedforward_layernorm.weight", "D",
          "blk.{i}.ffn_norm.weight", "layer_{i}/pre_ffw_norm/scale"),
    WeightKind("layers.{i}.mlp.gate_proj.weight", "F D",
               "blk.{i}.ffn_gate.weight", "layer_{i}/mlp/gating_einsum", "F D", part=0),
    WeightKind("layers.{i}.mlp.up_proj.weight", "F D",
               "blk.{i}.ffn_up.weight", "layer_{i}/mlp/gating_einsum", "F D", part=1),
    WeightKind("layers.{i}.mlp.down_proj.weight", "D F",
               "blk.{i}.ffn_down.weight", "layer_{i}/mlp/linear", "F D"),
    _norm("layers.{i}.post_feedforward_layernorm.weight", "D",
          "blk.{i}.post_ffw_norm.weight", "layer_{i}/post_ffw_norm/scale"),
)  # fmt: skip
_AFTER = (_norm("norm.weight", "D", "output_norm.weight", "final_norm/scale"),)

# Sources: transformers 5.23.0 modeling_gemma3.py and convert_gemma3_weights.py; llama.cpp
# conversion/gemma.py and gguf 0.19.0 tensor_mapping.py; google-deepmind/gemma gm/nn/_modules.py.
TABLE: tuple[WeightKind, ...] = (*_BEFORE, *_LAYER, *_AFTER)


@dataclass(frozen=True)
class Weight:
    """A row of the table at one layer of one config.

    `gguf_offset` is what the GGUF file added. `orbax_dims` are the sizes of the Orbax array (of
    the part, where it is stacked) and `orbax_axes` the order in which they give `shape`.
    """

    name: str
    shape: Shape
    gguf: str
    gguf_offset: float
    orbax: str
    orbax_dims: Shape
    orbax_axes: tuple[int, ...]
    part: int | None

    @property
    def orbax_shape(self) -> Shape:
        """The shape of the whole Orbax array: gate and up, and k and v, are stacked in pairs."""
        return self.orbax_dims if self.part is None else (2, *self.orbax_dims)

    @property
    def split_shape(self) -> Shape:
        """`shape` with its products of letters taken apart, for example [N, H, D] for [NH, D]."""
        return tuple(self.orbax_dims[axis] for axis in self.orbax_axes)


def resolve(config: TextConfig) -> dict[str, Weight]:
    """Return every weight of `config` by canonical name, in the order of the forward pass."""
    first = _sizes(config, config.layers[0])
    weights = [_weight(kind, config, first) for kind in _BEFORE]
    for i, spec in enumerate(config.layers):
        sizes = _sizes(config, spec)
        weights += [_weight(kind, config, sizes, i) for kind in _LAYER]
    weights += [_weight(kind, config, first) for kind in _AFTER]
    return {weight.name: weight for weight in weights}


def text_weights(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of `config` by canonical name, in order."""
    return {name: weight.shape for name, weight in resolve(config).items()}


def from_orbax(stored: np.ndarray, weight: Weight) -> np.ndarray:
    """View a whole Orbax array as `weight`, with shape `split_shape`; nothing is copied."""
    part = stored if weight.part is None else stored[weight.part]
    return part.transpose(weight.orbax_axes)


def to_orbax(array: np.ndarray, weight: Weight) -> np.ndarray:
    """View `weight` as its Orbax array or, where that is stacked, as its part of it."""
    return array.reshape(weight.split_shape).transpose(np.argsort(weight.orbax_axes))


def _sizes(config: TextConfig, spec: LayerSpec) -> dict[str, int]:
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "N": config.num_attention_heads,
        "K": spec.num_key_value_heads,
        "H": spec.head_dim,
        "F": spec.intermediate_size,
    }


def _weight(kind: WeightKind, config: TextConfig, sizes: dict[str, int], i: int = -1) -> Weight:
    stored = kind.orbax_shape.split()
    return Weight(
        name=kind.name.format(i=i),
        shape=tuple(math.prod(sizes[letter] for letter in word) for word in kind.shape.split()),
        gguf=kind.gguf.format(i=i),
        gguf_offset=config.norm_offset if kind.norm else 0.0,
        orbax=kind.orbax.format(i=i),
        orbax_dims=tuple(sizes[letter] for letter in stored),
        orbax_axes=tuple(stored.index(letter) for letter in kind.shape if letter != " "),
        part=kind.part,
    )
