"""What a model costs, from its config alone: nothing is allocated."""

from typing import NamedTuple

from gemlax.config import LayerSpec, TextConfig

__all__ = [
    "KVMemory",
    "decode_bytes",
    "decode_flops",
    "kv_bytes",
    "kv_bytes_per_token",
    "kv_memory",
    "layer_matrices",
    "layer_parameters",
    "naive_kv_bytes",
    "parameters",
]

# Tokens at which `kv_memory` is told: 4k, 32k, 128k.
_CONTEXTS = (4096, 32_768, 131_072)


def layer_matrices(config: TextConfig, spec: LayerSpec) -> dict[str, int]:
    """Count the weights of the matrices of one layer, by part."""
    hidden, size = config.hidden_size, spec.head_dim
    made = (2 - spec.k_eq_v) if spec.owns_kv else 0
    return {
        "attention": hidden
        * size
        * (2 * config.num_attention_heads + made * spec.num_key_value_heads),
        "mlp": 3 * hidden * spec.intermediate_size,
        "router": hidden * spec.num_experts,
        "experts": 3 * hidden * config.moe_intermediate_size * spec.num_experts,
        "per_layer_input": 2 * hidden * config.hidden_size_per_layer_input,
    }


def layer_parameters(config: TextConfig, spec: LayerSpec) -> int:
    """Count the weights of one layer: matrices, norms and scales."""
    hidden = config.hidden_size
    has_experts = spec.num_experts > 0
    norms = 4 + 3 * has_experts + (config.hidden_size_per_layer_input > 0)
    heads = spec.head_dim * (2 if spec.owns_kv else 1)
    scales = (hidden + spec.num_experts) * has_experts + config.layer_scalar
    return sum(layer_matrices(config, spec).values()) + norms * hidden + heads + scales


def parameters(config: TextConfig) -> int:
    """Count the weights of the text model. A table that is tied counts once."""
    layers = sum(layer_parameters(config, spec) for spec in config.layers)
    width = config.hidden_size_per_layer_input
    packed = config.num_hidden_layers * width
    per_layer = packed * (config.vocab_size_per_layer_input + config.hidden_size) + width
    rows = config.vocab_size * (1 if config.tie_word_embeddings else 2)
    return (rows + 1) * config.hidden_size + layers + per_layer


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
    packed = config.num_hidden_layers * config.hidden_size_per_layer_input
    weights = parameters(config) - packed * (config.vocab_size_per_layer_input - batch)
    if not config.tie_word_embeddings:
        weights -= config.hidden_size * (config.vocab_size - batch)
    keys_values = 0
    for spec in config.layers:
        if spec.num_experts:
            met = 1 - (1 - config.top_k_experts / spec.num_experts) ** batch
            weights -= round((1 - met) * layer_matrices(config, spec)["experts"])
        seen = context if spec.window is None else min(context, spec.window)
        keys_values += 2 * spec.num_key_value_heads * spec.head_dim * seen
    return round(weights * weight_itemsize) + batch * keys_values * kv_itemsize


def decode_flops(config: TextConfig, context: int) -> int:
    """Return the floating-point operations of one decode step that sees `context` tokens.

    Two per weight of the matrices that a token meets (the active experts and the head, no
    embedding table), four per query head, dimension and key seen.
    """
    packed = config.num_hidden_layers * config.hidden_size_per_layer_input
    weights = config.hidden_size * (config.vocab_size + packed)
    attention = 0
    for spec in config.layers:
        parts = layer_matrices(config, spec)
        if spec.num_experts:
            parts["experts"] = parts["experts"] * config.top_k_experts // spec.num_experts
        weights += sum(parts.values())
        seen = context if spec.window is None else min(context, spec.window)
        attention += 4 * config.num_attention_heads * spec.head_dim * seen
    return 2 * weights + attention
