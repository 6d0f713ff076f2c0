"""The table of the text decoder's weights: what each is called, its shape, where it lies in files.

Shapes are words of the project's dimension letters, so that `NH D` is [query heads * head_dim,
hidden]; a layout in another format is another order of the same letters, and its inverse is the
same pair read the other way. Loaders, writers and counts (cost.py) derive from it.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gemlax.config import LayerSpec, TextConfig

__all__ = [
    "HEAD",
    "Weight",
    "adaptable",
    "from_orbax",
    "layer_weights",
    "resolve",
    "text_weights",
    "unused",
]

# It lies beside the text model, not inside it: prefixes are not put before it.
HEAD = "lm_head.weight"

Shape = tuple[int, ...]
# Which layers have a weight.
_WHEN: dict[str, Callable[[TextConfig, LayerSpec], bool]] = {
    "always": lambda config, spec: True,
    "owns K/V": lambda config, spec: spec.owns_kv,
    "owns V": lambda config, spec: spec.owns_kv and not spec.k_eq_v,
    "V is K": lambda config, spec: spec.owns_kv and spec.k_eq_v,
    "dense": lambda config, spec: spec.num_experts == 0,
    "experts": lambda config, spec: spec.num_experts > 0,
    "input": lambda config, spec: config.hidden_size_per_layer_input > 0,
    "scalar": lambda config, spec: config.layer_scalar,
    "head": lambda config, spec: not config.tie_word_embeddings,
}


@dataclass(frozen=True)
class _Row:
    """One kind of weight; names of a layer's weights leave out the layer (`_FRONTS`).

    `name` is Hugging Face's without its prefix: canonical name, path of the module in the decoder
    and safetensors name are one. Two rows of one `name` are two layouts of it. `part` says which
    slice of a stacked Orbax array it is; None means all of it.
    """

    name: str
    shape: str
    gguf: str
    orbax: str
    orbax_shape: str = ""  # that of `shape`
    part: int | None = None
    when: str = "always"


_FRONTS = "layers.{i}.", "blk.{i}.", "layer_{i}/"
_BEFORE = (
    _Row("embed_tokens.weight", "V D", "token_embd.weight", "embedder/input_embedding"),
    _Row("embed_tokens_per_layer.weight", "U LP", "per_layer_token_embd.weight",
         "embedder/per_layer_embeddings", "U L P", when="input"),
    _Row("per_layer_model_projection.weight", "LP D", "per_layer_model_proj.weight",
         "embedder/per_layer_model_projection", "D L P", when="input"),
    _Row("per_layer_projection_norm.weight", "P", "per_layer_proj_norm.weight",
         "embedder/per_layer_projection_norm/scale", when="input"),
)  # fmt: skip
_ATTENTION = (
    _Row("input_layernorm.weight", "D", "attn_norm.weight", "pre_attention_norm/scale"),
    _Row("self_attn.q_proj.weight", "NH D", "attn_q.weight", "attn/q_einsum", "N D H"),
    _Row("self_attn.k_proj.weight", "KH D", "attn_k.weight", "attn/kv_einsum", "K D H",
         part=0, when="owns V"),
    _Row("self_attn.v_proj.weight", "KH D", "attn_v.weight", "attn/kv_einsum", "K D H",
         part=1, when="owns V"),
    _Row("self_attn.k_proj.weight", "KH D", "attn_k.weight", "attn/k_einsum", "K D H",
         when="V is K"),
    _Row("self_attn.o_proj.weight", "D NH", "attn_output.weight", "attn/attn_vec_einsum", "N H D"),
    _Row("self_attn.q_norm.weight", "H", "attn_q_norm.weight", "attn/query_norm/scale"),
    _Row("self_attn.k_norm.weight", "H", "attn_k_norm.weight", "attn/key_norm/scale",
         when="owns K/V"),
    _Row("post_attention_layernorm.weight", "D", "post_attention_norm.weight",
         "post_attention_norm/scale"),
)  # fmt: skip


def _mlp(norm: str, mlp: str, when: str) -> tuple[_Row, ...]:
    return (
        _Row("pre_feedforward_layernorm.weight", "D", "ffn_norm.weight", f"{norm}/scale",
             when=when),
        _Row("mlp.gate_proj.weight", "F D", "ffn_gate.weight", f"{mlp}/gating_einsum",
             part=0, when=when),
        _Row("mlp.up_proj.weight", "F D", "ffn_up.weight", f"{mlp}/gating_einsum",
             part=1, when=when),
        _Row("mlp.down_proj.weight", "D F", "ffn_down.weight", f"{mlp}/linear", "F D", when=when),
    )  # fmt: skip


# Google's names cross: its `mlp` are the experts and its `mlp2` is Hugging Face's `mlp`, and so
# for the norms around them.
_EXPERTS = (
    *_mlp("pre_ffw2_norm", "mlp2", "experts"),
    _Row("post_feedforward_layernorm_1.weight", "D", "post_ffw_norm_1.weight",
         "post_ffw2_norm/scale", when="experts"),
    _Row("router.scale", "D", "ffn_gate_inp.scale", "mlp/router_scale", when="experts"),
    _Row("router.proj.weight", "E D", "ffn_gate_inp.weight", "mlp/router_logits", "D E",
         when="experts"),
    _Row("router.per_expert_scale", "E", "ffn_down_exps.scale", "mlp/per_expert_scale",
         when="experts"),
    _Row("pre_feedforward_layernorm_2.weight", "D", "pre_ffw_norm_2.weight",
         "pre_ffw_norm/scale", when="experts"),
    _Row("experts.gate_up_proj", "E 2M D", "ffn_gate_up_exps.weight", "mlp/gating_einsum",
         "E 2 M D", when="experts"),
    _Row("experts.down_proj", "E D M", "ffn_down_exps.weight", "mlp/linear", "E M D",
         when="experts"),
    _Row("post_feedforward_layernorm_2.weight", "D", "post_ffw_norm_2.weight",
         "post_ffw1_norm/scale", when="experts"),
)  # fmt: skip
_OUTPUT = (
    _Row("post_feedforward_layernorm.weight", "D", "post_ffw_norm.weight", "post_ffw_norm/scale"),
    _Row("per_layer_input_gate.weight", "P D", "inp_gate.weight", "per_layer_input_gate", "D P",
         when="input"),
    _Row("per_layer_projection.weight", "D P", "proj.weight", "per_layer_projection", "P D",
         when="input"),
    _Row("post_per_layer_input_norm.weight", "D", "post_norm.weight",
         "post_per_layer_input_norm/scale", when="input"),
    _Row("layer_scalar", "1", "layer_output_scale.weight", "skip_scale", when="scalar"),
)  # fmt: skip
_LAYER = (*_ATTENTION, *_mlp("pre_ffw_norm", "mlp", "dense"), *_EXPERTS, *_OUTPUT)
# Google's layout has no head of its own: orbax.py refuses a config that has one.
_AFTER = (
    _Row("norm.weight", "D", "output_norm.weight", "final_norm/scale"),
    _Row(HEAD, "V D", "output.weight", "", when="head"),
)
# Sources: transformers 5.23.0, modeling_gemma3.py, modeling_gemma4.py and their convert_*.py;
# llama.cpp conversion/gemma.py and gguf 0.19.0 tensor_mapping.py; google-deepmind/gemma
# gm/nn/_modules.py, gm/nn/gemma4/_modules.py and _moe.py.


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
    weights = _take(_BEFORE, config, config.layers[0])
    for i, spec in enumerate(config.layers):
        weights += layer_weights(config, spec, i)
    weights += _take(_AFTER, config, config.layers[0])
    return {weight.name: weight for weight in weights}


def layer_weights(config: TextConfig, spec: LayerSpec, layer: int = 0) -> list[Weight]:
    """Return the weights of a layer of `config` that is as `spec` says."""
    return _take(_LAYER, config, spec, layer)


def text_weights(config: TextConfig) -> dict[str, Shape]:
    """Return the shape of every weight of `config` by canonical name, in order."""
    return {name: weight.shape for name, weight in resolve(config).items()}


def unused(config: TextConfig) -> list[Weight]:
    """Return what layers that share K/V would hold if they owned them.

    Published files store these; nothing reads them, and `save_pretrained` leaves them out.
    """
    idle = []
    for i, spec in enumerate(config.layers):
        if spec.owns_kv:
            continue
        used = {weight.name for weight in layer_weights(config, spec, i)}
        for k_eq_v in (False, True):
            owner = dataclasses.replace(spec, owns_kv=True, k_eq_v=k_eq_v)
            idle += [w for w in layer_weights(config, owner, i) if w.name not in used]
    return idle


def adaptable(config: TextConfig) -> dict[str, bool]:
    """Return the matrices that may have an adapter, by canonical name, in order.

    True: those of attention and MLP, which have one where nothing else is said.
    """
    return {
        name: match["always"] is not None
        for name in resolve(config)
        if (match := _ADAPTABLE.fullmatch(name))
    }


_ADAPTABLE = re.compile(
    r"(layers\.\d+\.((?P<always>(self_attn|mlp)\.\w+_proj)|per_layer_(input_gate|projection))"
    r"|per_layer_model_projection)\.weight"
)


def from_orbax(stored: np.ndarray, weight: Weight) -> np.ndarray:
    """View a whole Orbax array as `weight`, with shape `split_shape`; nothing is copied."""
    part = stored if weight.part is None else stored[weight.part]
    return part.transpose(weight.orbax_axes)


def _take(
    rows: tuple[_Row, ...], config: TextConfig, spec: LayerSpec, layer: int | None = None
) -> list[Weight]:
    sizes = {
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
    fronts = ("",) * 3 if layer is None else tuple(front.format(i=layer) for front in _FRONTS)
    return [_weight(row, config, sizes, fronts) for row in rows if _WHEN[row.when](config, spec)]


def _weight(
    row: _Row, config: TextConfig, sizes: dict[str, int], fronts: tuple[str, ...]
) -> Weight:
    name, gguf, orbax = (
        front + own for front, own in zip(fronts, (row.name, row.gguf, row.orbax), strict=True)
    )
    stored = (row.orbax_shape or row.shape).split()
    return Weight(
        name=name,
        shape=tuple(math.prod(sizes[letter] for letter in word) for word in row.shape.split()),
        gguf=gguf,
        # All else is the same number everywhere.
        gguf_offset=config.norm_offset if "norm" in row.name else 0.0,
        orbax=orbax,
        orbax_dims=tuple(sizes[letter] for letter in stored),
        orbax_axes=tuple(stored.index(letter) for letter in row.shape if letter != " "),
        part=row.part,
    )
