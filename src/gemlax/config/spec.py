"""The resolved config, frozen: no later code asks what a model is called."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gemlax.config.layer import Kind, LayerSpec
from gemlax.config.plan import StackPlan
from gemlax.errors import UnsupportedError

__all__ = ["GemmaConfig", "TextConfig"]


@dataclass(frozen=True)
class TextConfig:
    """The text decoder. Field names are those of transformers where it has one.

    Attributes:
        norm_offset: what RMSNorm adds to its weight (1 for Gemma 3, 0 for Gemma 4).
        v_norm: values are normed, without a weight.
        layer_scalar: each layer's output is multiplied by a stored scalar.
        hidden_size_per_layer_input: width of the per-layer embeddings; 0: there are none.
        use_bidirectional_attention: "vision" where image tokens see each other; text is causal.
        tie_word_embeddings: the table makes the logits, too; else there is a head of its own.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    max_position_embeddings: int
    layers: tuple[LayerSpec, ...]
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
    def plan(self) -> StackPlan:
        """How the layers are stacked and scanned."""
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
    # The config.json that this was resolved from, cleaned; `dataclasses.replace` drops it.
    _hf: Mapping[str, Any] | None = field(default=None, init=False, repr=False, compare=False)

    def to_hf(self) -> dict[str, Any]:
        """Return the config.json of the text model, for transformers; `from_hf` reads it equal.

        Raises:
            UnsupportedError: the config was not made by `from_hf` or `from_gguf`.
        """
        if self._hf is None:
            raise UnsupportedError(
                "this config was made or changed by hand, so no config.json is known for it; "
                "make the change in the file's keys: from_hf(config.to_hf() | {key: value})"
            )
        return copy.deepcopy(dict(self._hf))
