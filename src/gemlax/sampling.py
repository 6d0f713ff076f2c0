"""Logits to token: every setting is a traced array, one value per row.

Three ways through one program, chosen by what the rows ask for: arg-max; the best `CANDIDATES`
logits alone, which serves any top_k up to that number; or all of V. Sorting 262,144 logits
takes 60 to 90 ms on CPU, so nothing here sorts V: the best few are looked for in the blocks that
hold the best block maxima (0.2 ms), and thresholds over all of V are found by bisection.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from gemlax.errors import RequestError

__all__ = [
    "CANDIDATES",
    "TOP_LOGPROBS",
    "Sampling",
    "adjust",
    "allow",
    "check_number",
    "check_seed",
    "make_sampling",
    "sample",
    "top_logprobs",
]

CANDIDATES = 64  # Gemma's own default top_k
TOP_LOGPROBS = 20
_BLOCK, _SMALL_BLOCK = 512, 64  # of logits: for arg-max, and for the best few
_OFF = -jnp.inf
_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST = float(np.finfo(np.float32).tiny)  # below it a CPU counts everything as 0
# Places that one program has room for; what takes more gets four times as many.
_BIASED, _SEQUENCES, _HELD = 8, 8, 32
_SEQUENCE = 8  # tokens
_ANY = -1  # a place of a sequence that every token fits
# Fixed, so that a seed gives the same tokens whatever `jax_default_prng_impl` says.
_RANDOM = "threefry2x32"


class Sampling(NamedTuple):
    """Settings of B rows. Arrays of [B], where nothing else is said."""

    temperature: Any  # 0: arg-max
    top_k: Any  # 0: off
    top_p: Any  # 1: off
    min_p: Any  # 0: off
    repetition_penalty: Any  # 1: off; on prompt and output
    presence_penalty: Any  # 0: off; on output
    frequency_penalty: Any  # 0: off; on output
    no_repeat_ngram_size: Any  # 0: off; on prompt and output
    sequences: Any  # [B, w, n]; the last token is biased where those before it come last
    sequence_bias: Any  # [B, w]
    held_ids: Any  # [B, p]; forbidden
    held_until: Any  # [B, p]; until the output has so many tokens
    bias_ids: Any  # [B, p]; vocabulary size: unused place
    bias: Any  # [B, p]
    key: Any  # uint32 [B, 2]

    def row(self, index: int) -> "Sampling":
        """Return the settings of one row: [1, ...]."""
        return Sampling(*(array[index : index + 1] for array in self))

    def quiet(self, running: Array) -> "Sampling":
        """Return settings in which rows that do not run ask for nothing that takes time."""

        def only(values: Array, neutral: float) -> Array:
            mask = running.reshape(-1, *[1] * (values.ndim - 1))
            return jnp.where(mask, values, jnp.asarray(neutral, values.dtype))

        return self._replace(
            temperature=only(self.temperature, 0),
            repetition_penalty=only(self.repetition_penalty, 1),
            presence_penalty=only(self.presence_penalty, 0),
            frequency_penalty=only(self.frequency_penalty, 0),
            no_repeat_ngram_size=only(self.no_repeat_ngram_size, 0),
            sequence_bias=only(self.sequence_bias, 0),
            held_until=only(self.held_until, 0),
        )

    def places(self) -> tuple[int, ...]:
        """Return the sizes that a program depends on, besides B."""
        lists = (self.bias_ids, self.sequences, self.held_ids)
        return tuple(size for ids in lists for size in ids.shape[1:])

    def widened(self, places: Sequence[int], vocab_size: int) -> "Sampling":
        """Return host copies with more places: those that `places` has."""
        biased, count, width, forbidden = places
        sequences = _padded(np.array(self.sequences), (0, 0), (width, _ANY), left=True)
        sequences = _padded(sequences, (count, _ANY), (0, 0))
        sequences[:, self.sequences.shape[1] :, -1] = vocab_size
        return self._replace(
            sequences=sequences,
            sequence_bias=_padded(np.asarray(self.sequence_bias), (count, 0)),
            held_ids=_padded(np.asarray(self.held_ids), (forbidden, vocab_size)),
            held_until=_padded(np.asarray(self.held_until), (forbidden, 0)),
            bias_ids=_padded(np.asarray(self.bias_ids), (biased, vocab_size)),
            bias=_padded(np.asarray(self.bias), (biased, 0)),
        )


def _padded(array: np.ndarray, *sizes: tuple[int, int], left: bool = False) -> np.ndarray:
    """Return an array whose last axes have these sizes at least, filled up with what is given."""
    lead = array.ndim - len(sizes)
    for axis, (size, fill) in enumerate(sizes, lead):
        more = max(size - array.shape[axis], 0)
        widths = [(0, 0)] * array.ndim
        widths[axis] = (more, 0) if left else (0, more)
        array = np.pad(array, widths, constant_values=fill)
    return array


def make_sampling(
    vocab_size: int,
    seeds: Sequence[int],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    no_repeat_ngram_size: int = 0,
    logit_bias: Mapping[int, float] | None = None,
    sequence_bias: Mapping[tuple[int, ...], float] | None = None,
    forbidden_until: Mapping[int, int | Sequence[int]] | None = None,
) -> Sampling:
    """Lay settings out for one row per seed, on the host. Numbers are in their ranges already.

    Args:
        logit_bias: By id; -inf forbids one.
        sequence_bias: By tokens, of the last after those before it; -inf forbids it there.
        forbidden_until: By id, how many tokens the output must have before it may come, for all or
            by row.

    Raises:
        RequestError: an id outside the vocabulary, or a bias that is not a number.
    """
    bias_ids, bias = _bias(logit_bias or {}, vocab_size)
    sequences, sequence_biases = _sequences(sequence_bias or {}, vocab_size)
    held_ids, held_until = _held(forbidden_until or {}, len(seeds), vocab_size)

    def rows(value: Any, dtype: Any = np.float32) -> np.ndarray:
        value = np.asarray(value, dtype)
        return np.broadcast_to(value, (len(seeds), *value.shape))

    return Sampling(
        temperature=rows(temperature if temperature >= _SMALLEST else 0),
        top_k=rows(min(max(top_k, 0), vocab_size), np.int32),
        top_p=rows(top_p),
        min_p=rows(min_p),
        repetition_penalty=rows(repetition_penalty),
        presence_penalty=rows(presence_penalty),
        frequency_penalty=rows(frequency_penalty),
        no_repeat_ngram_size=rows(min(no_repeat_ngram_size, np.iinfo(np.int32).max), np.int32),
        sequences=rows(sequences, np.int32),
        sequence_bias=rows(sequence_biases),
        held_ids=rows(held_ids, np.int32),
        held_until=held_until,
        bias_ids=rows(bias_ids, np.int32),
        bias=rows(bias),
        key=np.stack([_key_data(seed) for seed in seeds]),
    )


def _key_data(seed: int) -> np.ndarray:
    """Return what `jax.random.key(seed, impl=_RANDOM)` holds: a call of jax takes 0.5 ms."""
    return np.array([0, seed], np.uint32)


def check_number(
    name: str, value: Any, low: float, high: float, *, open_low: bool = False
) -> float:
    """Return a finite number in a range, or raise RequestError, which names it."""
    number = isinstance(value, (int, float, np.integer, np.floating))
    inside = number and abs(value) <= _LARGEST and low <= value <= high
    if isinstance(value, bool) or not inside or (open_low and value == low):
        brackets = ("(" if open_low or low == -math.inf else "[") + f"{low}, {high}"
        raise RequestError(
            f"{name} must be a finite number in {brackets}{')' if high == math.inf else ']'}, "
            f"got {value!r}"
        )
    return float(value)


def check_seed(seed: Any) -> int:
    """Return a seed, or raise RequestError."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise RequestError(f"seed must be an integer in [0, 2**32), got {seed!r}")
    return int(seed)


def _places(count: int, smallest: int) -> int:
    """Return the bucket of so many places, so that few programs serve all."""
    places = smallest
    while places < count:
        places *= 4
    return places


def _bias(bias: Mapping[int, float], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    for token, value in bias.items():
        whole = isinstance(token, (int, np.integer)) and not isinstance(token, bool)
        if not whole or not 0 <= token < vocab_size:
            raise RequestError(f"logit_bias: id {token!r} is outside [0, {vocab_size})")
        _check_bias(f"logit_bias[{token}]", value)
    if len(bias) >= vocab_size and all(value == -math.inf for value in bias.values()):
        raise RequestError(f"logit_bias: all {vocab_size} tokens are forbidden, none is left")
    places = _places(len(bias), _BIASED)
    ids = np.full(places, vocab_size, np.int32)
    values = np.zeros(places, np.float32)
    ids[: len(bias)] = list(bias.keys())
    values[: len(bias)] = [_bounded(value) for value in bias.values()]
    return ids, values


def _check_bias(name: str, value: Any) -> None:
    number = isinstance(value, (int, float, np.integer, np.floating))
    if not number or isinstance(value, bool) or math.isnan(value) or value == math.inf:
        raise RequestError(f"{name} must be a number or -inf, got {value!r}")


def _bounded(value: float) -> float:
    """Return a bias whose sums stay finite in float32; it wins against any logit all the same."""
    return value if value == -math.inf else max(min(float(value), 1e37), -1e37)


def _sequences(
    bias: Mapping[tuple[int, ...], float], vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Lay sequences out to the right: what comes before their first token may be anything."""
    width = _SEQUENCE
    while width < max(map(len, bias), default=0):
        width *= 2
    places = _places(len(bias), _SEQUENCES)
    ids = np.full((places, width), _ANY, np.int32)
    ids[:, -1] = vocab_size
    values = np.zeros(places, np.float32)
    for place, (sequence, value) in enumerate(bias.items()):
        _check_bias(f"sequence_bias[{sequence}]", value)
        ids[place, width - len(sequence) :] = sequence
        values[place] = _bounded(value)
    return ids, values


def _held(
    forbidden_until: Mapping[int, int | Sequence[int]], batch: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    places = _places(len(forbidden_until), _HELD)
    ids = np.full(places, vocab_size, np.int32)
    until = np.zeros((batch, places), np.int32)
    ids[: len(forbidden_until)] = list(forbidden_until.keys())
    for place, tokens in enumerate(forbidden_until.values()):
        until[:, place] = tokens
    return ids, until


def adjust(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    history: Int[Array, "B S"],
    prompts: Int[Array, " B"],
    lengths: Int[Array, " B"],
) -> Float[Array, "B V"]:
    """Apply penalties, prohibitions and bias at the ids they concern, without a pass over V.

    `history` holds prompt and output so far, padded with V or more; they end at `prompts` and
    `lengths`. A row in which prohibitions leave no token is free of them for this token.
    Sources: CTRL (arXiv 1909.05858) for repetition_penalty; the OpenAI API reference for presence
    and frequency; transformers' logits_process.py for what is forbidden when.
    """
    penalised = (
        jnp.any(sampling.repetition_penalty != 1)
        | jnp.any(sampling.presence_penalty != 0)
        | jnp.any(sampling.frequency_penalty != 0)
    )
    limited = (
        jnp.any(sampling.no_repeat_ngram_size > 0)
        | jnp.any(sampling.sequence_bias != 0)
        | jnp.any((lengths - prompts)[:, None] < sampling.held_until)
    )
    way = jnp.where(limited, 2, jnp.where(penalised, 1, 0))
    ways = (lambda x, *_: x, _penalise, _limit)
    return _add_bias(
        jax.lax.switch(way, ways, logits, sampling, history, prompts, lengths), sampling
    )


def _add_bias(logits: Array, sampling: Sampling) -> Array:
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    return logits.at[rows, sampling.bias_ids].add(sampling.bias, mode="drop")


def _limit(
    logits: Array, sampling: Sampling, history: Array, prompts: Array, lengths: Array
) -> Array:
    """Apply what is forbidden as well as the penalties."""
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    beyond = logits.shape[1]
    biased = _add_sequences(logits, sampling, history, lengths)
    limited = _penalise(biased, sampling, history, prompts, lengths)
    repeated = _repeats(history, lengths, sampling.no_repeat_ngram_size)
    early = (lengths - prompts)[:, None] < sampling.held_until
    for ids, forbidden in ((history, repeated), (sampling.held_ids, early)):
        limited = limited.at[rows, jnp.where(forbidden, ids, beyond)].set(_OFF, mode="drop")
    left = jnp.max(_add_bias(limited, sampling), axis=-1, keepdims=True) > _OFF
    return jnp.where(left, limited, _penalise(logits, sampling, history, prompts, lengths))


def _add_sequences(logits: Array, sampling: Sampling, history: Array, lengths: Array) -> Array:
    """Add the bias of each sequence whose tokens but the last are the row's last ones."""
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    before, last = sampling.sequences[..., :-1], sampling.sequences[..., -1]
    back = jnp.arange(before.shape[-1], 0, -1, dtype=jnp.int32)[None]
    places = lengths[:, None] - back
    tail = jnp.take_along_axis(history, jnp.maximum(places, 0), axis=1)
    tail = jnp.where(places < 0, history.dtype.type(_ANY - 1), tail)[:, None]
    fits = jnp.all((before == _ANY) | (before == tail), axis=-1)
    bias = jnp.where(fits, sampling.sequence_bias, 0.0)
    return logits.at[rows, last].add(bias, mode="drop")


def _repeats(history: Array, lengths: Array, size: Array) -> Array:
    """Mark [B, S] the tokens that once followed a row's last size - 1 tokens."""
    columns = jnp.arange(history.shape[1], dtype=jnp.int32)[None]
    size, lengths = size[:, None], lengths[:, None]
    same = (size > 0) & (columns >= size - 1) & (columns < lengths)

    def step(back: Array, same: Array) -> Array:
        ending = jnp.take_along_axis(history, jnp.maximum(lengths - back, 0), axis=1)
        return same & ((back >= size) | (jnp.roll(history, back, axis=1) == ending))

    return jax.lax.fori_loop(1, jnp.minimum(size.max(), history.shape[1]), step, same)


def _penalise(
    logits: Array, sampling: Sampling, history: Array, prompts: Array, lengths: Array
) -> Array:
    columns = jnp.arange(history.shape[1], dtype=jnp.int32)[None]
    is_output = (columns >= prompts[:, None]) & (columns < lengths[:, None])
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    old = logits.at[rows, history].get(mode="fill", fill_value=0)
    repetition = sampling.repetition_penalty[:, None]
    new = jnp.minimum(jnp.where(old > 0, old / repetition, old * repetition), _LARGEST)
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
    best_blocks = jnp.take_along_axis(blocks, block[..., None], axis=1)
    best, place = jax.lax.top_k(best_blocks.reshape(rows, -1), count)
    return best, jnp.take_along_axis(block, place // size, axis=-1) * size + place % size


def allow(logits: Float[Array, "B V"], mask: UInt32[Array, "B W"]) -> Float[Array, "B V"]:
    """Forbid the ids whose bit is not set: id i is bit i % 32 of word i // 32.

    Taken apart word by word this costs 1% of a step; a gather of each id's word 70 times that.
    """
    bits = mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None] & jnp.uint32(1)
    is_allowed = bits.reshape(len(logits), -1)[:, : logits.shape[1]] != 0
    return jnp.where(is_allowed, logits, -jnp.inf)


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
    keys = jax.vmap(
        lambda key, n: jax.random.fold_in(jax.random.wrap_key_data(key, impl=_RANDOM), n)
    )(sampling.key, step)

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
    keep |= rank == 0
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
        level = _threshold(scaled, wanted)
        above = jnp.sum(scaled > level[:, None], axis=-1, dtype=jnp.int32)
        return jnp.where(_first(scaled, level, wanted - above), scaled, _OFF)

    def by_mass(scaled: Array, probabilities: Array) -> Array:
        # Summed in float32, all of V may fall short of 1 by rounding; top_p 0 wants something.
        wanted = jnp.maximum(sampling.top_p * (1 - 1e-6), _SMALLEST)
        level = _threshold(scaled, wanted, weights=probabilities)
        level = jnp.where(jnp.isnan(level), _OFF, level)  # all of them fall short
        mark = level[:, None]
        above = jnp.sum(jnp.where(scaled > mark, probabilities, 0.0), axis=-1)
        probability = jnp.max(jnp.where(scaled == mark, probabilities, 0.0), axis=-1)
        size = float(scaled.shape[-1])
        room = jnp.ceil((wanted - above) / jnp.where(probability > 0, probability, 1.0))
        room = jnp.where(probability > 0, jnp.clip(room, 1.0, size), size).astype(jnp.int32)
        return _first(scaled, level, room) | (sampling.top_p >= 1)[:, None]

    scaled = jax.lax.cond(jnp.any(sampling.top_k > 0), by_rank, lambda x: x, scaled)
    probabilities = jax.nn.softmax(scaled, axis=-1)
    by_peak = sampling.min_p * probabilities.max(axis=-1)
    keep = probabilities >= by_peak[:, None]
    limited = jnp.any(sampling.top_p < 1)
    everything = jnp.ones(scaled.shape, bool)
    keep &= jax.lax.cond(limited, by_mass, lambda *_: everything, scaled, probabilities)
    return jnp.where(keep, scaled, _OFF)


def _first(values: Array, level: Array, room: Array) -> Array:
    """Mark what is greater than `level`, and of what equals it the first `room` in each row."""
    columns = jnp.arange(values.shape[-1], dtype=jnp.int32)[None]
    equal = values == level[:, None]

    def step(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        count = jnp.sum(equal & (columns < middle[:, None]), axis=-1, dtype=jnp.int32)
        return jnp.where(count >= room, low, middle + 1), jnp.where(count >= room, middle, high)

    def end(_: Array) -> Array:
        bounds = (jnp.zeros_like(room), jnp.full_like(room, values.shape[-1]))
        return jax.lax.fori_loop(0, values.shape[-1].bit_length(), step, bounds)[1]

    # Equal values are rare: nothing is looked for where all of them have room.
    many = jnp.any(jnp.sum(equal, axis=-1, dtype=jnp.int32) > room)
    stop = jax.lax.cond(many, end, lambda x: jnp.full_like(x, values.shape[-1]), room)
    return (values > level[:, None]) | (equal & (columns < stop[:, None]))


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
        return jnp.sum(jnp.where(mask, weights, 0.0), axis=-1) >= wanted

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
    logprob = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - total
    best, ids = _top_k(logits, min(TOP_LOGPROBS, logits.shape[-1]))
    return logprob, ids, best - total[:, None]
