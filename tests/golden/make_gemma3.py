"""Writes tests/golden/<size>.npz: what transformers computes for five toy Gemma 3 models.

Run in an environment with torch and transformers (the `reference` extra); it needs no gemlax:

    cd tests && python -m golden.make_gemma3

A toy has its size's real layer pattern, head ratio, rope and query scale at small width. Weights
are not stored: `conditioned.py` makes them again.
"""

from typing import Any

import numpy as np
import torch
from golden import hf

COMMON = {
    "model_type": "gemma3_text",
    "vocab_size": 512,
    "hidden_size": 80,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "sliding_window": 32,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}
SMALL = {"num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32,
         "max_position_embeddings": 32_768}  # fmt: skip
LARGE = {"num_key_value_heads": 2, "head_dim": 32, "query_pre_attn_scalar": 32,
         "max_position_embeddings": 65_536,
         "rope_scaling": {"rope_type": "linear", "factor": 8.0}}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "gemma-3-270m": COMMON | SMALL | {"num_hidden_layers": 18},
    "gemma-3-1b": COMMON | SMALL | {"num_hidden_layers": 26},
    "gemma-3-4b": COMMON | LARGE | {"num_hidden_layers": 34},
    "gemma-3-12b": COMMON | LARGE | {"num_hidden_layers": 48},
    # The scale is (hidden / heads) ** -0.5 here, not head_dim ** -0.5.
    "gemma-3-27b": COMMON
    | LARGE
    | {"num_hidden_layers": 62, "head_dim": 16, "query_pre_attn_scalar": 20},
}
NUM_IDS = 64


def golden(size: str) -> dict[str, np.ndarray]:
    """Compute what the file of a size holds."""
    config = SIZES[size]
    last = config["num_hidden_layers"] - 1
    return hf.golden(size, config, (0, 1, 5, 6, last - 1, last), NUM_IDS)


def main() -> None:
    """Write one file per size beside this script."""
    torch.set_num_threads(2)
    for size in SIZES:
        np.savez_compressed(hf.path_of(size), **golden(size))


if __name__ == "__main__":
    main()
