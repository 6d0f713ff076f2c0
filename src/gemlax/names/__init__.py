"""The ONE table of weights. It reads no file and knows no jax; what else names weights asks it."""

from gemlax.names.text import (
    HEAD,
    Weight,
    adaptable,
    from_orbax,
    layer_weights,
    resolve,
    text_weights,
    unused,
)

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
