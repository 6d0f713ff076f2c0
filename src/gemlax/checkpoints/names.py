"""The one table of weights: what each is called and how it lies in every checkpoint format.

A row holds one kind of weight. Shapes are words of the project's dimension letters, so that
`NH D` is [query heads * head_dim, hidden]; a layout in another format is another order of the
same letters, and its inverse is the same pair read the other way. This file reads no files.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gemlax.config import LayerSpec, TextConfig

__all__ = [
    "HEAD",
    "TABLE",
    "Weight",
    "WeightKind",
    "from_orbax",
    "resolve",
    "text_weights",
    "to_orbax",
    "unused",
]

# It lies beside the text model, not inside it: prefixes are not put before it.
HEAD = "lm_head.weight"

Shape = tuple[int, ...]
When = Callable[[TextConfig, LayerSpec], bool]


def _always(config: TextConfig, spec: LayerSpec) -> bool:
    return True


def _owns_kv(config: TextConfig, spec: LayerSpec) -> bool:
    return spec.owns_kv


def _has_v(config: TextConfig, spec: LayerSpec) -> bool:
    return spec.owns_kv and not spec.k_eq_v


def _lacks_v(config: TextConfig, spec: LayerSpec) -> bool:
    return spec.owns_kv and spec.k_eq_v


def _is_dense(config: TextConfig, spec: LayerSpec) -> bool:
    return spec.num_experts == 0


def _has_experts(config: TextConfig, spec: LayerSpec) -> bool:
    return spec.num_experts > 0


def _has_input(config: TextConfig, spec: LayerSpec) -> bool:
    return config.hidden_size_per_layer_input > 0


def _has_head(config: TextConfig, spec: LayerSpec) -> bool:
    return not config.tie_word_embeddings


def _has_scalar(config: TextConfig, spec: LayerSpec) -> bool:
    return config.layer_scalar


@dataclass(frozen=True)
class WeightKind:
    """One row. `{i}` stands for the layer; a pattern without it is there once.

    `when` says which layers have it; two rows of one `name` are two layouts of it. `name` is
    Hugging Face's without its prefix: canonical name and safetensors name are one. `part` says
    which slice of a stacked Orbax array it is; None means all of it. The GGUF file holds a `norm`
    weight plus `TextConfig.norm_offset`; all else is the same number everywhere.
    """

    name: str
    shape: str
    gguf: str
    orbax: str
    orbax_shape: str
    part: int | None = None
    when: When = _always
    norm: bool = False


def _norm(name: str, dim: str, gguf: str, orbax: str, when: When = _always) -> WeightKind:
    return WeightKind(name, dim, gguf, orbax, dim, when=when, norm=True)


_BEFORE = (
    WeightKind(
        "embed_tokens.weight", "V D", "token_embd.weight", "embedder/input_embedding", "V D"
    ),
    WeightKind("embed_tokens_per_layer.weight", "U LP", "per_layer_token_embd.weight",
               "embedder/per_layer_embeddings", "U L P", when=_has_input),
    WeightKind("per_layer_model_projection.weight", "LP D", "per_layer_model_proj.weight",
               "embedder/per_layer_model_projection", "D L P", when=_has_input),
    _norm("per_layer_projection_norm.weight", "P", "per_layer_proj_norm.weight",
          "embedder/per_layer_projection_norm/scale", when=_has_input),
)  # fmt: skip
_ATTENTION = (
    _norm("layers.{i}.input_layernorm.weight", "D",
          "blk.{i}.attn_norm.weight", "layer_{i}/pre_attention_norm/scale"),
    WeightKind("layers.{i}.self_attn.q_proj.weight", "NH D",
               "blk.{i}.attn_q.weight", "layer_{i}/attn/q_einsum", "N D H"),
    WeightKind("layers.{i}.self_attn.k_proj.weight", "KH D", "blk.{i}.attn_k.weight",
               "layer_{i}/attn/kv_einsum", "K D H", part=0, when=_has_v),
    WeightKind("layers.{i}.self_attn.v_proj.weight", "KH D", "blk.{i}.attn_v.weight",
               "layer_{i}/attn/kv_einsum", "K D H", part=1, when=_has_v),
    WeightKind("layers.{i}.self_attn.k_proj.weight", "KH D", "blk.{i}.attn_k.weight",
               "layer_{i}/attn/k_einsum", "K D H", when=_lacks_v),
    WeightKind("layers.{i}.self_attn.o_proj.weight", "D NH",
               "blk.{i}.attn_output.weight", "layer_{i}/attn/attn_vec_einsum", "N H D"),
    _norm("layers.{i}.self_attn.q_norm.weight", "H",
          "blk.{i}.attn_q_norm.weight", "layer_{i}/attn/query_norm/scale"),
    _norm("layers.{i}.self_attn.k_norm.weight", "H",
          "blk.{i}.attn_k_norm.weight", "layer_{i}/attn/key_norm/scale", when=_owns_kv),
    _norm("layers.{i}.post_attention_layernorm.weight", "D",
          "blk.{i}.post_attention_norm.weight", "layer_{i}/post_attention_norm/scale"),
)  # fmt: skip
_DENSE = (
    _norm("layers.{i}.pre_feedforward_layernorm.weight", "D",
          "blk.{i}.ffn_norm.weight", "layer_{i}/pre_ffw_norm/scale", when=_is_dense),
    WeightKind("layers.{i}.mlp.gate_proj.weight", "F D", "blk.{i}.ffn_gate.weight",
               "layer_{i}/mlp/gating_einsum", "F D", part=0, when=_is_dense),
    WeightKind("layers.{i}.mlp.up_proj.weight", "F D", "blk.{i}.ffn_up.weight",
               "layer_{i}/mlp/gating_einsum", "F D", part=1, when=_is_dense),
    WeightKind("layers.{i}.mlp.down_proj.weight", "D F", "blk.{i}.ffn_down.weight",
               "layer_{i}/mlp/linear", "F D", when=_is_dense),
)  # fmt: skip
# Google's names cross: its `mlp` are the experts and its `mlp2` is Hugging Face's `mlp`, and so
# for the norms around them.
_EXPERTS = (
    _norm("layers.{i}.pre_feedforward_layernorm.weight", "D",
          "blk.{i}.ffn_norm.weight", "layer_{i}/pre_ffw2_norm/scale", when=_has_experts),
    WeightKind("layers.{i}.mlp.gate_proj.weight", "F D", "blk.{i}.ffn_gate.weight",
               "layer_{i}/mlp2/gating_einsum", "F D", part=0, when=_has_experts),
    WeightKind("layers.{i}.mlp.up_proj.weight", "F D", "blk.{i}.ffn_up.weight",
               "layer_{i}/mlp2/gating_einsum", "F D", part=1, when=_has_experts),
    WeightKind("layers.{i}.mlp.down_proj.weight", "D F", "blk.{i}.ffn_down.weight",
               "layer_{i}/mlp2/linear", "F D", when=_has_experts),
    _norm("layers.{i}.post_feedforward_layernorm_1.weight", "D", "blk.{i}.post_ffw_norm_1.weight",
          "layer_{i}/post_ffw2_norm/scale", when=_has_experts),
    WeightKind("layers.{i}.router.scale", "D", "blk.{i}.ffn_gate_inp.scale",
               "layer_{i}/mlp/router_scale", "D", when=_has_experts),
    WeightKind("layers.{i}.router.proj.weight", "E D", "blk.{i}.ffn_gate_inp.weight",
               "layer_{i}/mlp/router_logits", "D E", when=_has_experts),
    WeightKind("layers.{i}.router.per_expert_scale", "E", "blk.{i}.ffn_down_exps.scale",
               "layer_{i}/mlp/per_expert_scale", "E", when=_has_experts),
    _norm("layers.{i}.pre_feedforward_layernorm_2.weight", "D", "blk.{i}.pre_ffw_norm_2.weight",
          "layer_{i}/pre_ffw_norm/scale", when=_has_experts),
    WeightKind("layers.{i}.experts.gate_up_proj", "E 2M D", "blk.{i}.ffn_gate_up_exps.weight",
               "layer_{i}/mlp/gating_einsum", "E 2 M D", when=_has_experts),
    WeightKind("layers.{i}.experts.down_proj", "E D M", "blk.{i}.ffn_down_exps.weight",
               "layer_{i}/mlp/linear", "E M D", when=_has_experts),
    _norm("layers.{i}.post_feedforward_layernorm_2.weight", "D", "blk.{i}.post_ffw_norm_2.weight",
          "layer_{i}/post_ffw1_norm/scale", when=_has_experts),
)  # fmt: skip
_OUTPUT = (
    _norm("layers.{i}.post_feedforward_layernorm.weight", "D",
          "blk.{i}.post_ffw_norm.weight", "layer_{i}/post_ffw_norm/scale"),
    WeightKind("layers.{i}.per_layer_input_gate.weight", "P D", "blk.{i}.inp_gate.weight",
               "layer_{i}/per_layer_input_gate", "D P", when=_has_input),
    WeightKind("layers.{i}.per_layer_projection.weight", "D P", "blk.{i}.proj.weight",
               "layer_{i}/per_layer_projection", "P D", when=_has_input),
    _norm("layers.{i}.post_per_layer_input_norm.weight", "D", "blk.{i}.post_norm.weight",
          "layer_{i}/post_per_layer_input_norm/scale", when=_has_input),
    WeightKind("layers.{i}.layer_scalar", "1", "blk.{i}.layer_output_scale.weight",
               "layer_{i}/skip_scale", "1", when=_has_scalar),
)  # fmt: skip
_LAYER = (*_ATTENTION, *_DENSE, *_EXPERTS, *_OUTPUT)
# Google's layout has no head of its own: orbax.py refuses a config that has one.
_AFTER = (
    _norm("norm.weight", "D", "output_norm.weight", "final_norm/scale"),
    WeightKind(HEAD, "V D", "output.weight", "", "V D", when=_has_head),
)

# Sources: transformers 5.23.0, modeling_gemma3.py, modeling_gemma4.py and their convert_*.py;
# llama.cpp conversion/gemma.py and gguf 0.19.0 tensor_mapping.py; google-deepmind/gemma
# gm/nn/_modules.py, gm/nn/gemma4/_modules.py and _moe.py.
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
    weights = _those(_BEFORE, config, config.layers[0])
    for i, spec in enumerate(config.layers):
        weights += _those(_LAYER, config, spec, i)
    weights += _those(_AFTER, config, config.layers[0])
    return {weight.name: weight for weight in weights}


def unused(config: TextConfig) -> list[Weight]:
    """Return what layers that share K/V would hold if they owned them.

    Published files store these; nothing reads them, and `save_pretrained` leaves them out.
    """
    found = []
    for i, spec in enumerate(config.layers):
        if spec.owns_kv:
            continue
        kept = {weight.name for weight in _those(_LAYER, config, spec, i)}
        for k_eq_v in (False, True):
            owner = dataclasses.replace(spec, owns_kv=True, k_eq_v=k_eq_v)
            found += [w for w in _those(_LAYER, config, owner, i) if w.name not in kept]
    return found


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
        "L": config.num_hidden_layers,
        "P": config.hidden_size_per_layer_input,
        "U": config.vocab_size_per_layer_input,
        "E": spec.num_experts,
        "M": config.moe_intermediate_size,
        "1": 1,
        "2": 2,  # gate and up
    }


def _those(
    kinds: tuple[WeightKind, ...], config: TextConfig, spec: LayerSpec, i: int = -1
) -> list[Weight]:
    sizes = _sizes(config, spec)
    return [_weight(kind, config, sizes, i) for kind in kinds if kind.when(config, spec)]


def _weight(kind: WeightKind, config: TextConfig, sizes: dict[str, int], i: int) -> Weight:
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
