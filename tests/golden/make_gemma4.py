"""Writes tests/golden/<size>.npz: what transformers computes for five toy Gemma 4 models.

Run in an environment with torch and transformers (the `reference` extra); it needs no gemlax:

    cd tests && python -m golden.make_gemma4

A toy has its size's real layer pattern, K/V sharing, head ratios, rope and experts at small
width. Weights are not stored: `conditioned.py` makes them again.
"""

from typing import Any

import numpy as np
import torch
from golden import hf

SLIDING, FULL = "sliding_attention", "full_attention"
COMMON = {
    "model_type": "gemma4_text",
    "vocab_size": 512,
    "hidden_size": 80,
    "intermediate_size": 96,
    "max_position_embeddings": 65_536,
    "head_dim": 32,
    "global_head_dim": 64,
    "num_global_key_value_heads": None,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "sliding_window": 32,
    "final_logit_softcapping": 30.0,
    "use_bidirectional_attention": None,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
        FULL: {
            "rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25,
        },
    },
}  # fmt: skip
EDGE = COMMON | {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 512}
# The unified class has no per-layer inputs to switch off.
UNIFIED = COMMON | {"attention_k_eq_v": True, "use_bidirectional_attention": "vision"}
SERVER = UNIFIED | {"hidden_size_per_layer_input": 0}


def pattern(sliding: int, periods: int) -> dict[str, Any]:
    """Return the layers: `sliding` of one kind and one of the other, `periods` times."""
    return {
        "num_hidden_layers": (sliding + 1) * periods,
        "layer_types": ([SLIDING] * sliding + [FULL]) * periods,
    }


SIZES: dict[str, dict[str, Any]] = {
    "gemma-4-e2b": EDGE
    | pattern(4, 7)
    | {"num_attention_heads": 4, "num_key_value_heads": 1, "num_kv_shared_layers": 20,
       "use_double_wide_mlp": True},
    "gemma-4-e4b": EDGE
    | pattern(5, 7)
    | {"num_attention_heads": 8, "num_key_value_heads": 2, "num_kv_shared_layers": 18},
    "gemma-4-12b": UNIFIED
    | pattern(5, 8)
    | {"model_type": "gemma4_unified_text", "num_attention_heads": 4, "num_key_value_heads": 2,
       "num_global_key_value_heads": 1},
    "gemma-4-26b-a4b": SERVER
    | pattern(5, 5)
    | {"num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2,
       "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8,
       "moe_intermediate_size": 24},
    "gemma-4-31b": SERVER
    | pattern(5, 10)
    | {"num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2},
}  # fmt: skip
# One of each kind that owns K/V; then of each kind that shares them (the donors come first).
STORED = {"gemma-4-e2b": (13, 14, 15, 34), "gemma-4-e4b": (22, 23, 24, 41)}
NUM_IDS = 32


def golden(size: str) -> dict[str, np.ndarray]:
    """Compute what the file of a size holds."""
    config = SIZES[size]
    last = config["num_hidden_layers"] - 1
    return hf.golden(size, config, STORED.get(size, (0, 5, last - 1, last)), NUM_IDS)


def main() -> None:
    """Write one file per size beside this script."""
    torch.set_num_threads(2)
    for size in SIZES:
        np.savez_compressed(hf.path_of(size), **golden(size))


if __name__ == "__main__":
    main()
