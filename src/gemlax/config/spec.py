"""The resolved config: every fact that differs between layers is in a `LayerSpec`.

Nothing here holds an array or knows a framework, and no later code asks what a model is called.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from gemlax.config.plan import StackPlan

__all__ = ["CHUNK", "KINDS", "GemmaConfig", "Kind", "LayerSpec", "RopeSpec", "TextConfig"]

Kind = Literal["sliding_attention", "full_attention"]
KINDS: tuple[Kind, ...] = ("sliding_attention", "full_attention")
CHUNK = 512  # the longest piece of a prompt that is prefilled at once


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding of one layer: frequencies are theta ** (-2i / head_dim) / factor.

    Only the first `rotated` share of the head_dim / 2 frequencies turn; the rest stand still
    (Gemma 4's "proportional" rope).
    """

    theta: float
    factor: float = 1.0
    rotated: float = 1.0


@dataclass(frozen=True)
class LayerSpec:
    """All that distinguishes one decoder layer from another. No index: equal layers are equal.

    `window` counts the tokens a query sees, itself included; None sees all. A layer with
    `owns_kv` False reads the keys and values of its donor (`StackPlan.donor`). With `k_eq_v` the
    values are made from the raw output of the key projection. `num_experts` 0: no experts.
    """

    kind: Kind
    window: int | None
    num_key_value_heads: int
    head_dim: int
    rope: RopeSpec
    attention_scale: float
    intermediate_size: int
    owns_kv: bool = True
    k_eq_v: bool = False
    num_experts: int = 0

    def cache_slots(self, capacity: int, chunk: int = CHUNK) -> int:
        """Return how many tokens a cache of this layer holds, of `capacity` in all.

        A window needs a ring of window + chunk - 1 slots: the first query of a chunk still sees
        its whole window when the chunk's last key is written. Rounded up to whole blocks.
        """
        if self.window is None:
            return capacity
        least = self.window + chunk - 1
        block = 256 if least > 256 else 16
        return min(capacity, -(-least // block) * block)


@dataclass(frozen=True)
class TextConfig:
    """The text decoder. Field names are those of transformers where it has one.

    Attributes:
        norm_offset: what RMSNorm adds to its weight (1 for Gemma 3, 0 for Gemma 4).
        v_norm: values are normed, without a weight.
        layer_scalar: each layer's output is multiplied by a stored scalar.
        hidden_size_per_layer_input: width of the per-layer embeddings; 0: there are none.
        query_pre_attn_scalar: kept only to be written back; layers read `attention_scale`.
        use_bidirectional_attention: "vision" where image tokens see each other; text is causal.
        tie_word_embeddings: the table makes the logits, too; else there is a head of its own.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    max_position_embeddings: int
    layers: tuple[LayerSpec, ...]
    query_pre_attn_scalar: float | None = None
    rms_norm_eps: float = 1e-6
    norm_offset: float = 1.0
    v_norm: bool = False
    layer_scalar: bool = False
    final_logit_softcapping: float | None = None
    hidden_size_per_layer_input: int = 0
    vocab_size_per_layer_input: int = 0
    top_k_experts: int = 0
    moe_intermediate_size: int = 0
    use_bidirectional_attention: str | None = None
    tie_word_embeddings: bool = True

    @property
    def num_hidden_layers(self) -> int:
        """How many decoder layers there are."""
        return len(self.layers)

    @property
    def num_ids(self) -> int:
        """How many ids can be embedded: a table of per-layer embeddings may be the shorter one."""
        if not self.hidden_size_per_layer_input:
            return self.vocab_size
        return min(self.vocab_size, self.vocab_size_per_layer_input)

    def refusal(self, token_id: int, named: str = "") -> str | None:
        """Say why an id cannot be embedded, or None if it can; `named` is put after the id."""
        if 0 <= token_id < self.num_ids:
            return None
        if not 0 <= token_id < self.vocab_size:
            return f"token id {token_id}{named} is outside [0, {self.vocab_size})"
        return (
            f"token id {token_id}{named} has no per-layer embedding: vocab_size is "
            f"{self.vocab_size}, vocab_size_per_layer_input only {self.num_ids}; grow "
            "embed_tokens_per_layer as well"
        )

    @property
    def plan(self) -> "StackPlan":
        """How the layers are stacked and scanned."""
        from gemlax.config.plan import StackPlan

        return StackPlan.of(self.layers)

    def first(self, kind: Kind) -> LayerSpec | None:
        """Return the spec of the first layer of `kind`, or None if there is no such layer."""
        return next((spec for spec in self.layers if spec.kind == kind), None)


@dataclass(frozen=True)
class GemmaConfig:
    """A whole checkpoint: the text decoder and the ids that generation needs.

    `placeholder_ids` stand for image, audio or video features and are never an output.
    """

    text: TextConfig
    bos_token_id: int = 2
    eos_token_id: tuple[int, ...] = (1,)
    pad_token_id: int = 0
    placeholder_ids: tuple[int, ...] = ()

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "GemmaConfig":
        """Resolve a Hugging Face `config.json` (text-only, or the text part of a multimodal one).

        Raises:
            UnsupportedError: another architecture, a key that is not known, or a known key at a
                value that is not supported; every offending key is named.
        """
        from gemlax.config import hf

        return hf.read(config)

    def to_hf(self) -> dict[str, Any]:
        """Write a `config.json` that transformers reads; `from_hf` reads it back equal.

        Raises:
            UnsupportedError: a config.json cannot hold this config; what it cannot is named.
        """
        from gemlax.config import hf_write

        return hf_write.write(self)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "GemmaConfig":
        """Resolve the metadata of a GGUF file (keys as llama.cpp writes them).

        Raises:
            UnsupportedError: another architecture, or a key that is missing or unknown.
        """
        from gemlax.config import gguf

        return gguf.read(metadata)
