"""Logits to token: every setting is a traced array, one value per row.

Three ways through one program, chosen by what the rows ask for: arg-max; the best `CANDIDATES`
logits alone, which serves any top_k up to that number; or all of V. Sorting 262,144 logits
takes 60 to 90 ms on CPU, so nothing here sorts V: the best few are looked for in the blocks that
hold the best block maxima (0.2 ms), and thresholds over all of V are found by bisection.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gemlax.errors import RequestError

__all__ = [
    "CANDIDATES",
    "TOP_LOGPROBS",
    "Sampling",
    "adjust",
    "make_sampling",
    "sample",
    "top_logprobs",
]

CANDIDATES = 64  # Gemma's own default top_k
TOP_LOGPROBS = 20
_BLOCK, _SMALL_BLOCK = 512, 64  # of logits: for arg-max, and for the best few
_OFF = -jnp.inf
_LARGEST = float(np.finfo(np.float32).max)


class Sampling(NamedTuple):
    """Settings of B rows. Arrays of [B], but for the bias, which is [B, biased ids]."""

    temperature: Any  # 0: arg-max
    top_k: Any  # 0: off
    top_p: Any  # 1: off
    min_p: Any  # 0: off
    repetition_penalty: Any  # 1: off; on prompt and output
    presence_penalty: Any  # 0: off; on output
    frequency_penalty: Any  # 0: off; on output
    bias_ids: Any  # vocabulary size: unused place
    bias: Any
    key: Any  # uint32 [B, 2]


def make_sampling(
    batch: int,
    vocab_size: int,
    seeds: list[int],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
) -> Sampling:
    """Check the settings and lay them out for `batch` rows; rows beyond `seeds` are idle ones.

    Raises:
        RequestError: a value outside its range; it is named with what was expected.
    """
    _check("temperature", temperature, 0, math.inf)
    _check("top_p", top_p, 0, 1, open_low=True)
    _check("min_p", min_p, 0, 1)
    _check("repetition_penalty", repetition_penalty, 0, math.inf, open_low=True)
    _check("presence_penalty", presence_penalty, -math.inf, math.inf)
    _check("frequency_penalty", frequency_penalty, -math.inf, math.inf)
    if isinstance(top_k, bool) or not isinstance(top_k, (int, np.integer)) or top_k < 0:
        raise RequestError(f"top_k must be an integer >= 0 (0 turns it off), got {top_k!r}")
    ids, values = _bias(logit_bias or {}, vocab_size)

    def rows(value: float, dtype: Any = np.float32) -> Array:
        return jnp.full((batch,), value, dtype)

    seeds = [*seeds, *[0] * (batch - len(seeds))]
    return Sampling(
        temperature=rows(temperature),
        top_k=rows(min(int(top_k), vocab_size), np.int32),
        top_p=rows(top_p),
        min_p=rows(min_p),
        repetition_penalty=rows(repetition_penalty),
        presence_penalty=rows(presence_penalty),
        frequency_penalty=rows(frequency_penalty),
        bias_ids=jnp.asarray(np.tile(ids, (batch, 1))),
        bias=jnp.asarray(np.tile(values, (batch, 1))),
        key=jnp.stack([jax.random.key_data(jax.random.key(_seed(seed))) for seed in seeds]),
    )


def _check(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    number = isinstance(value, (int, float, np.integer, np.floating))
    inside = number and abs(value) <= _LARGEST and low <= value <= high
    if not inside or (open_low and value == low):
        brackets = ("(" if open_low or low == -math.inf else "[") + f"{low}, {high}"
        raise RequestError(
            f"{name} must be a finite number in {brackets}{')' if high == math.inf else ']'}, "
            f"got {value!r}"
        )


def _seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise RequestError(f"seed must be an integer in [0, 2**32), got {seed!r}")
    return int(seed)


def _bias(bias: Mapping[int, float], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Lay out a bias in a bucket of places, so that few programs serve all of them."""
    for token, value in bias.items():
        if not isinstance(token, (int, np.integer)) or not 0 <= token < vocab_size:
            raise RequestError(f"logit_bias: id {token!r} is outside [0, {vocab_size})")
        if (
            not isinstance(value, (int, float, np.floating))
            or math.isnan(value)
            or value == math.inf
        ):
            raise RequestError(f"logit_bias[{token}] must be a number or -inf, got {value!r}")
    places = 8
    while places < len(bias):
        places *= 4
    ids = np.full(places, vocab_size, np.int32)
    values = np.zeros(places, np.float32)
    ids[: len(bias)] = list(bias.keys())
    values[: len(bias)] = list(bias.values())
    return ids, values


def adjust(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    history: Int[Array, "B S"],
    is_output: Array,
) -> Float[Array, "B V"]:
    """Apply penalties and bias at the ids they concern, without a pass over V.

    `history` holds prompt and output so far, padded with V or more; `is_output` [B, S] marks the
    output. Sources: CTRL (arXiv 1909.05858) for repetition_penalty; the OpenAI API reference for
    presence and frequency.
    """
    wanted = (
        jnp.any(sampling.repetition_penalty != 1)
        | jnp.any(sampling.presence_penalty != 0)
        | jnp.any(sampling.frequency_penalty != 0)
    )
    logits = jax.lax.cond(wanted, _penalise, lambda x, *_: x, logits, sampling, history, is_output)
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    return logits.at[rows, sampling.bias_ids].add(sampling.bias, mode="drop")


def _penalise(logits: Array, sampling: Sampling, history: Array, is_output: Array) -> Array:
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    own = logits.at[rows, history].get(mode="fill", fill_value=0)
    repetition = sampling.repetition_penalty[:, None]
    new = jnp.where(own > 0, own / repetition, own * repetition)
    counts = jnp.zeros(logits.shape, jnp.int32)
    counts = counts.at[rows, history].add(is_output.astype(jnp.int32), mode="drop")
    count = counts.at[rows, history].get(mode="fill", fill_value=0)
    new = new - jnp.where(count > 0, sampling.presence_penalty[:, None], 0.0)
    new = new - sampling.frequency_penalty[:, None] * count.astype(jnp.float32)
    return logits.at[rows, history].set(new, mode="drop")


def _arg_max(logits: Array) -> Array:
    """Return the first of the largest: XLA:CPU's own arg-max takes 1.2 ms for V, this 0.1."""
    rows, width = logits.shape
    if width % _BLOCK:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # XLA:CPU's maximum over a row may lose a NaN, which counts as the largest.
    blocks = jnp.where(jnp.isnan(logits), jnp.inf, logits).reshape(rows, -1, _BLOCK)
    block = jnp.argmax(blocks.max(axis=-1), axis=-1)[:, None]
    best = jnp.take_along_axis(blocks, block[..., None], axis=1)[:, 0]
    return (block[:, 0] * _BLOCK + jnp.argmax(best, axis=-1)).astype(jnp.int32)


def _top_k(logits: Array, count: int) -> tuple[Array, Array]:
    """Return what `lax.top_k` does, which over V turns into a full sort where its use is sliced.

    An element outside the `count` blocks of the largest maxima has `count` elements before it.
    """
    rows, width = logits.shape
    size = _SMALL_BLOCK
    if width % size or width // size <= count:
        best, ids = jax.lax.top_k(logits, count)
        return best, ids
    blocks = logits.reshape(rows, -1, size)
    # In the order of V, so that of equal logits the first comes first.
    block = jnp.sort(jax.lax.top_k(blocks.max(axis=-1), count)[1], axis=-1)
    held = jnp.take_along_axis(blocks, block[..., None], axis=1)
    best, place = jax.lax.top_k(held.reshape(rows, -1), count)
    return best, jnp.take_along_axis(block, place // size, axis=-1) * size + place % size


def sample(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    step: Int[Array, " B"],
    *,
    arg_max: Callable[[Array], Array] = _arg_max,
) -> Int[Array, " B"]:
    """Draw one token per row. `step` numbers a row's draws: its tokens depend on no other row.

    `arg_max` is taken of logits, and of logits with noise.
    """
    greedy = sampling.temperature == 0
    few = greedy | ((sampling.top_k > 0) & (sampling.top_k <= CANDIDATES))
    way = jnp.where(jnp.all(greedy), 0, jnp.where(jnp.all(few), 1, 2))
    keys = jax.vmap(lambda key, n: jax.random.fold_in(jax.random.wrap_key_data(key), n))(
        sampling.key, step
    )

    def greedily(logits: Array, sampling: Sampling, keys: Array) -> Array:
        return arg_max(logits)

    def from_all(logits: Array, sampling: Sampling, keys: Array) -> Array:
        # A row that could do with a few draws from these, whatever the other rows ask for.
        token = _from_all(logits, sampling, keys, arg_max)
        return jnp.where(few, _from_few(logits, sampling, keys), token)

    return jax.lax.switch(way, (greedily, _from_few, from_all), logits, sampling, keys)


def _from_few(logits: Array, sampling: Sampling, keys: Array) -> Array:
    """Sample among the best CANDIDATES logits, which are in descending order."""
    count = min(CANDIDATES, logits.shape[-1])
    best, ids = _top_k(logits, count)
    scaled = _scale(best, sampling)
    rank = jnp.arange(count, dtype=jnp.int32)[None]
    scaled = jnp.where(rank < sampling.top_k[:, None], scaled, _OFF)
    probabilities = jax.nn.softmax(scaled, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    keep = (before < sampling.top_p[:, None]) & (
        probabilities >= sampling.min_p[:, None] * probabilities[:, :1]
    )
    place = jnp.argmax(jnp.where(keep, scaled, _OFF) + _noise(keys, count), axis=-1)
    place = jnp.where(sampling.temperature == 0, 0, place)
    return jnp.take_along_axis(ids, place[:, None], axis=-1)[:, 0]


def _from_all(
    logits: Array, sampling: Sampling, keys: Array, arg_max: Callable[[Array], Array]
) -> Array:
    """Sample among all ids; top_k and top_p are thresholds found by bisection, where wanted."""
    scaled = _scale(logits, sampling)
    narrowed = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    scaled = jax.lax.cond(jnp.any(narrowed), _narrow, lambda x, _: x, scaled, sampling)
    noise = jnp.where(sampling.temperature[:, None] == 0, 0.0, _noise(keys, logits.shape[-1]))
    return arg_max(scaled + noise)


def _narrow(scaled: Array, sampling: Sampling) -> Array:
    def by_rank(scaled: Array) -> Array:
        wanted = jnp.where(sampling.top_k > 0, sampling.top_k, scaled.shape[-1])
        return jnp.where(scaled >= _threshold(scaled, wanted)[:, None], scaled, _OFF)

    def by_mass(probabilities: Array) -> Array:
        level = _threshold(probabilities, sampling.top_p, weights=probabilities)
        return jnp.where(sampling.top_p >= 1, 0.0, level)

    scaled = jax.lax.cond(jnp.any(sampling.top_k > 0), by_rank, lambda x: x, scaled)
    probabilities = jax.nn.softmax(scaled, axis=-1)
    by_peak = sampling.min_p * probabilities.max(axis=-1)
    limited = jnp.any(sampling.top_p < 1)
    level = jax.lax.cond(limited, by_mass, lambda _: jnp.zeros_like(by_peak), probabilities)
    keep = probabilities >= jnp.maximum(level, by_peak)[:, None]
    return jnp.where(keep, scaled, _OFF)


def _scale(logits: Array, sampling: Sampling) -> Array:
    temperature = jnp.where(sampling.temperature == 0, 1.0, sampling.temperature)
    # Relative to the best: a tiny temperature must not overflow.
    return (logits - logits.max(axis=-1, keepdims=True)) / temperature[:, None]


def _noise(keys: Array, width: int) -> Array:
    """Return the noise whose addition makes arg-max a draw (Gumbel-max), [B, width]."""
    return jax.vmap(lambda key: jax.random.gumbel(key, (width,), jnp.float32))(keys)


def _threshold(values: Array, wanted: Array, weights: Array | None = None) -> Array:
    """Return the largest value v such that the entries >= v number (or weigh) at least `wanted`.

    Bisection over the bits of a float32, which order as integers: exact after 32 passes.
    """
    ordered = _order(values)

    def enough(level: Array) -> Array:
        mask = ordered >= level[:, None]
        if weights is None:
            return jnp.sum(mask, axis=-1, dtype=jnp.int32) >= wanted
        # Summed in float32, all of V may fall short of 1 by rounding.
        return jnp.sum(jnp.where(mask, weights, 0.0), axis=-1) >= wanted - 1e-6

    def step(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        ok = enough(middle)
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle)

    low = jnp.zeros(values.shape[0], jnp.uint32)
    high = jnp.full(values.shape[0], np.uint32(0xFFFFFFFF))
    low, _ = jax.lax.fori_loop(0, 32, step, (low, high))
    return _unorder(low)


def _order(values: Array) -> Array:
    """Map float32 to uint32 so that order is kept."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    sign = np.uint32(0x80000000)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _unorder(levels: Array) -> Array:
    sign = np.uint32(0x80000000)
    bits = jnp.where(levels >= sign, levels & ~sign, ~levels)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def top_logprobs(
    logits: Float[Array, "B V"], token: Int[Array, " B"]
) -> tuple[Float[Array, " B"], Int[Array, "B n"], Float[Array, "B n"]]:
    """Return the log-probability of `token`, and the most likely ids with theirs."""
    total = jax.nn.logsumexp(logits, axis=-1)
    own = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - total
    best, ids = _top_k(logits, min(TOP_LOGPROBS, logits.shape[-1]))
    return own, ids, best - total[:, None]
