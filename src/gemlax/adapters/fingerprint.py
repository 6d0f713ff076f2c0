"""What tells one base from another: digests of its weights, stored with an adapter.

An adapter may be trained on codes and used with floats of the same checkpoint, so norms and other
vectors, which are never codes, are one digest, and a row of each matrix another, for floats only.
Both are taken of the weights rounded to bfloat16: the dtype a base was loaded in does not count.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from gemlax.decoder import Decoder, weight_path
from gemlax.names import text_weights
from gemlax.qtensor import Mixed, QTensor, Split, dense

__all__ = ["differs", "fingerprint"]


def fingerprint(decoder: Decoder) -> dict[str, str]:
    """Return the digests of a base: of "vectors", and of "matrices" where all are floats."""
    shapes = text_weights(decoder.config)
    vectors = hashlib.sha256(json.dumps(shapes).encode())
    matrices = hashlib.sha256()
    floats = True
    for name, row in _rows(decoder, list(shapes)):
        floats &= row is not None
        if row is not None:
            digest = vectors if len(shapes[name]) == 1 else matrices
            digest.update(row.astype(ml_dtypes.bfloat16).tobytes())
    of_vectors = {"vectors": vectors.hexdigest()}
    return of_vectors | ({"matrices": matrices.hexdigest()} if floats else {})


def differs(ours: dict[str, str], theirs: dict[str, Any]) -> bool:
    """Tell whether two digests that both have are different."""
    return any(ours[key] != theirs[key] for key in ours.keys() & theirs.keys())


def _rows(decoder: Decoder, names: list[str]) -> Iterator[tuple[str, np.ndarray | None]]:
    """Yield the first row of each weight, or None where it is codes that are not floats."""
    flat: dict[Any, Any] = dict(nnx.to_flat_state(nnx.state(decoder)))
    read: dict[Any, np.ndarray | None] = {}
    for name in names:
        path, row = weight_path(decoder.config, decoder.layout, name)
        if path not in read:
            read[path] = _first(flat[path].get_value(), stacked=row is not None)
        first = read[path]
        yield name, first if first is None or row is None else first[row]


def _first(weight: Any, *, stacked: bool) -> np.ndarray | None:
    """Return the first row of a weight, or of each layer of a stack."""
    weight = weight.whole if isinstance(weight, Split) else weight
    is_coded = isinstance(weight, QTensor) and weight.format not in ("float32", "bfloat16")
    if is_coded or isinstance(weight, Mixed):
        return None
    front = (slice(None),) * stacked
    row = jax.tree.map(lambda a: a[(*front, *(0,) * (a.ndim - 1 - stacked))], weight)
    return np.asarray(dense(row))
