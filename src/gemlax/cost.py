"""What a model costs, from its config alone: nothing is allocated."""

import math
from typing import NamedTuple

from gemlax.config import TextConfig
from gemlax.names import text_weights

__all__ = [
    "KVMemory",
    "decode_bytes",
    "kv_bytes",
    "kv_bytes_per_token",
    "kv_memory",
    "naive_kv_bytes",
    "parameters",
]

# The contexts that `kv_memory` reports: 4k, 32k, 128k.
_CONTEXTS = (4096, 32_768, 131_072)


def parameters(config: TextConfig) -> int:
    """Count the weights of the text model. A table that is tied counts once."""
    return sum(map(math.prod, text_weights(config).values()))


def kv_bytes_per_token(config: TextConfig, itemsize: int) -> int:
    """Return the bytes of keys and values that one token adds, over all layers that own some."""
    owners = (spec for spec in config.layers if spec.owns_kv)
    return sum(2 * spec.num_key_value_heads * spec.head_dim * itemsize for spec in owners)


def kv_bytes(config: TextConfig, tokens: int, itemsize: int, *, scale_bytes: int = 0) -> int:
    """Return the bytes of the caches of one row of `tokens` tokens, positions included.

    Sliding layers hold a ring (`LayerSpec.cache_slots`). `scale_bytes` come on top for each token
    and K/V head: int8 codes have an itemsize of 1 and a float32 scale, 4.
    """
    total = 0
    for spec in {spec.kind: spec for spec in config.layers if spec.owns_kv}.values():
        head = spec.head_dim * itemsize + scale_bytes
        slot = 2 * spec.num_key_value_heads * head * config.plan.cache_rows(spec.kind)
        total += spec.cache_slots(tokens) * (slot + 4)
    return total


def naive_kv_bytes(config: TextConfig, tokens: int, itemsize: int) -> int:
    """Return the bytes if every layer held all tokens: no windows, no layer that shares K/V."""
    heads = sum(spec.num_key_value_heads * spec.head_dim for spec in config.layers)
    return 2 * heads * itemsize * tokens


class KVMemory(NamedTuple):
    """Bytes of the caches of one row of `tokens` tokens."""

    tokens: int
    naive_bytes: int  # bfloat16, see `naive_kv_bytes`
    bfloat16_bytes: int
    int8_bytes: int


def kv_memory(config: TextConfig) -> list[KVMemory]:
    """Return what caches take at 4k, 32k and 128k tokens, as far as the model goes."""
    return [
        KVMemory(
            tokens,
            naive_kv_bytes(config, tokens, 2),
            kv_bytes(config, tokens, 2),
            kv_bytes(config, tokens, 1, scale_bytes=4),
        )
        for tokens in _CONTEXTS
        if tokens <= config.max_position_embeddings
    ]


def decode_bytes(
    config: TextConfig, context: int, batch: int, weight_itemsize: float, kv_itemsize: int
) -> int:
    """Return the bytes that one decode step of `batch` rows of `context` tokens must read.

    Weights once: of a table that makes no logits its rows alone, of the experts as many as
    `batch` tokens meet if they choose evenly. Keys and values as each layer sees them, so shared
    ones count for every layer that reads them.
    """
    tables = ["embed_tokens_per_layer.weight"]
    tables += [] if config.tie_word_embeddings else ["embed_tokens.weight"]
    weights = 0.0
    for name, shape in text_weights(config).items():
        size: float = math.prod(shape)
        if name in tables:
            size = size // shape[0] * batch
        elif ".experts." in name:
            size *= 1 - (1 - config.top_k_experts / shape[0]) ** batch
        weights += size
    keys_values = 0
    for spec in config.layers:
        seen = context if spec.window is None else min(context, spec.window)
        keys_values += 2 * spec.num_key_value_heads * spec.head_dim * seen
    return round(weights * weight_itemsize) + batch * keys_values * kv_itemsize
