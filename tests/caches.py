"""What caches hold, asked of their positions: an oracle for rings, drafts and slots."""

import jax.numpy as jnp


def can_resume(config, caches, kept):
    """Return for which rows all that a query at position `kept` sees is held.

    A ring may have overwritten it, when more was decoded than is kept.
    """
    kept = jnp.asarray(kept)
    complete = jnp.ones(kept.shape, bool)
    for spec in {spec.kind: spec for spec in config.layers if spec.owns_kv}.values():
        first = jnp.zeros_like(kept)
        if spec.window is not None:
            first = jnp.maximum(kept - spec.window + 1, 0)
        positions = caches[spec.kind].positions
        seen = (positions >= first[:, None]) & (positions < kept[:, None])
        complete &= seen.sum(axis=1) == kept - first
    return complete
