"""What a model costs, from its config alone: nothing is allocated."""

from gemlax.config import LayerSpec, TextConfig

__all__ = ["decode_flops", "kv_bytes", "kv_bytes_per_token", "layer_parameters", "parameters"]


def layer_parameters(config: TextConfig, spec: LayerSpec) -> int:
    """Count the weights of one layer: projections, MLP and norms."""
    hidden, size = config.hidden_size, spec.head_dim
    attention = 2 * hidden * size * (config.num_attention_heads + spec.num_key_value_heads)
    return attention + 3 * hidden * spec.intermediate_size + 4 * hidden + 2 * size


def parameters(config: TextConfig) -> int:
    """Count the weights of the text model. The table is tied: it counts once."""
    layers = sum(layer_parameters(config, spec) for spec in config.layers)
    return config.vocab_size * config.hidden_size + layers + config.hidden_size


def kv_bytes_per_token(config: TextConfig, itemsize: int) -> int:
    """Return the bytes of keys and values that one token adds, over all layers that own some."""
    owners = (spec for spec in config.layers if spec.owns_kv)
    return sum(2 * spec.num_key_value_heads * spec.head_dim * itemsize for spec in owners)


def kv_bytes(config: TextConfig, tokens: int, itemsize: int) -> int:
    """Return the bytes of the dense caches of one row of `tokens` tokens, positions included."""
    kinds = {spec.kind for spec in config.layers if spec.owns_kv}
    return tokens * (kv_bytes_per_token(config, itemsize) + 4 * len(kinds))


def decode_flops(config: TextConfig, context: int) -> int:
    """Return the floating-point operations of one decode step that sees `context` tokens.

    Two per weight of the matrices and the head, four per query head, dimension and key seen.
    """
    matrices = parameters(config) - config.hidden_size
    attention = 0
    for spec in config.layers:
        matrices -= 4 * config.hidden_size + 2 * spec.head_dim
        seen = context if spec.window is None else min(context, spec.window)
        attention += 4 * config.num_attention_heads * spec.head_dim * seen
    return 2 * matrices + attention
