"""One decoder layer: every fact that differs between layers. Holds no array, knows no framework."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["CHUNK", "KINDS", "Kind", "LayerSpec", "RopeSpec"]

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
