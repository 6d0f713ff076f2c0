"""The device programs: join, prefill, decode and verify, each over some of the slots.

`rows` [b] are the slots of a call's rows and `running` [b] says which of them count: a bucket is
filled up with rows that write nothing. Settings, limits and stop ids are traced, so there is one
program per bucket. On a mesh `rows` is None: all slots run, as they are cut over the devices.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int, UInt32

from gemlax import ops, sampling
from gemlax.cache import Caches, rollback
from gemlax.decoder import Decoder
from gemlax.engine.state import State
from gemlax.sampling import Sampling
from gemlax.sharding import Layout, constrain

__all__ = ["MAX_STEPS", "Output", "decode", "prefill", "verify"]

# The most decode steps of one call: the width of what it returns.
MAX_STEPS = 128


class Output(NamedTuple):
    """What a call added to each of its rows: `counts` of `tokens` [b, n], and log-probabilities."""

    tokens: Any
    counts: Any
    logprobs: Any = None  # own [b, n], ids [b, n, 20], values [b, n, 20]


class _Local(NamedTuple):
    """The rows of a call, taken out of the state: small, next to the caches."""

    tokens: Array  # [b, S]
    lengths: Array  # [b]
    running: Array  # [b]
    output: Output


class _Fixed(NamedTuple):
    """What every step of a call reads."""

    decoder: Decoder
    num_tokens: int
    rows: Array | None
    adapters: Array | None
    prompts: Array
    max_lengths: Array
    stop_ids: Array
    settings: Sampling


def prefill(
    graphdef: Any,
    weights: Any,
    state: State,
    tokens: Int[Array, "b T"],
    positions: Int[Array, "b T"],
    rows: Int[Array, "b"] | None,
) -> State:
    """Write one chunk into the caches. The hidden states are dropped, and what makes only them."""
    decoder = nnx.merge(graphdef, weights)
    chosen = _take(state.adapters, rows)
    _, caches = decoder(tokens, positions, state.caches, cache_rows=rows, adapter_rows=chosen)
    return state._replace(caches=caches)


def decode(
    graphdef: Any,
    num_tokens: int,
    layout: Layout,
    logprobs: bool,
    weights: Any,
    state: State,
    rows: Int[Array, "b"] | None,
    running: Bool[Array, "b"],
    steps: Int[Array, ""],
    eager: Bool[Array, ""],
    masks: UInt32[Array, "b W"],
) -> tuple[State, Output]:
    """Run up to `steps` decode steps; stop when no row runs, or with `eager` when one ends.

    `masks` say in bits which ids may come, in each step alike (`sampling.allow`).
    """
    fixed = _fixed(graphdef, num_tokens, weights, state, rows, running)
    local = _local(fixed, state, running, MAX_STEPS, logprobs)

    def more(carry: tuple[Array, Caches, _Local]) -> Array:
        index, _, now = carry
        ended = eager & jnp.any(running & ~now.running)
        return (index < steps) & jnp.any(now.running) & ~ended

    def step(carry: tuple[Array, Caches, _Local]) -> tuple[Array, Caches, _Local]:
        index, caches, now = carry
        now = constrain(now, layout.replicated)  # every device knows what every row has said
        last = now.lengths - 1
        # A row that does not run writes nothing: neither cache nor token.
        positions = jnp.where(now.running, last, ops.EMPTY)[:, None]
        current = jnp.take_along_axis(now.tokens, last[:, None], axis=1)
        current = jnp.where(now.running[:, None], current, 0)
        hidden, caches = fixed.decoder(
            current, positions, caches, cache_rows=rows, adapter_rows=fixed.adapters
        )
        raw = fixed.decoder.logits(hidden[:, 0])[:, :num_tokens]
        return index + 1, caches, _append(fixed, raw, now, index, masks)

    _, caches, local = jax.lax.while_loop(more, step, (jnp.int32(0), state.caches, local))
    return _write_back(state, caches, local, rows, running), local.output


def verify(
    graphdef: Any,
    num_tokens: int,
    layout: Layout,
    logprobs: bool,
    weights: Any,
    state: State,
    rows: Int[Array, "b"] | None,
    running: Bool[Array, "b"],
    drafts: Int[Array, "b d"],
    counts: Int[Array, "b"],
    masks: UInt32[Array, "b places W"],
) -> tuple[State, Output]:
    """Run the last token and `counts` drafts of each row at once, and append what is sampled.

    A row goes on while what it samples is what was drafted. So each token is drawn from the logits
    after the tokens before it, with its own key and its own mask, as without drafts: nothing has
    to be corrected.
    """
    fixed = _fixed(graphdef, num_tokens, weights, state, rows, running)
    width = drafts.shape[1] + 1
    local = constrain(_local(fixed, state, running, width, logprobs), layout.replicated)
    last = local.lengths - 1
    order = jnp.arange(width, dtype=jnp.int32)[None]
    wanted = (order <= counts[:, None]) & running[:, None]
    positions = jnp.where(wanted, last[:, None] + order, ops.EMPTY)
    current = jnp.take_along_axis(local.tokens, last[:, None], axis=1)
    current = jnp.where(wanted, jnp.concatenate([current, drafts], axis=1), 0)
    hidden, caches = fixed.decoder(
        current, positions, state.caches, cache_rows=rows, adapter_rows=fixed.adapters
    )
    raw = fixed.decoder.logits(hidden)[..., :num_tokens]  # [b, d + 1, V]
    tried = jnp.pad(drafts, ((0, 0), (0, 1)))

    def more(carry: tuple[Array, Array, _Local]) -> Array:
        return jnp.any(carry[1])

    def one(carry: tuple[Array, Array, _Local]) -> tuple[Array, Array, _Local]:
        index, going, now = carry
        logits, mask = (
            jax.lax.dynamic_index_in_dim(each, index, 1, keepdims=False) for each in (raw, masks)
        )
        new = _append(fixed, logits, now._replace(running=going), index, mask)
        token = jax.lax.dynamic_index_in_dim(new.output.tokens, index, 1, keepdims=False)
        right = token == jax.lax.dynamic_index_in_dim(tried, index, 1, keepdims=False)
        runs = jnp.where(going, new.running, now.running)
        going = going & new.running & right & (index < counts)
        return index + 1, going, new._replace(running=runs)

    local = jax.lax.while_loop(more, one, (jnp.int32(0), running, local))[2]
    # All but the last token of a row have been through the decoder.
    caches = rollback(caches, local.lengths - 1, rows, running)
    return _write_back(state, caches, local, rows, running), local.output


def _fixed(
    graphdef: Any,
    num_tokens: int,
    weights: Any,
    state: State,
    rows: Array | None,
    running: Array,
) -> _Fixed:
    decoder = nnx.merge(graphdef, weights)
    taken = functools.partial(_take, rows=rows)
    return _Fixed(
        decoder,
        num_tokens,
        rows,
        taken(state.adapters),
        taken(state.prompts),
        taken(state.max_lengths),
        taken(state.stop_ids),
        taken(state.settings).quiet(running),
    )


def _take(tree: Any, rows: Array | None) -> Any:
    """Return the rows of arrays [B, ...] that a call runs."""
    return tree if rows is None else jax.tree.map(lambda x: x[rows], tree)


def _local(fixed: _Fixed, state: State, running: Array, width: int, logprobs: bool) -> _Local:
    batch = len(running)
    best = min(sampling.TOP_LOGPROBS, fixed.num_tokens)
    zeros: Any = None
    if logprobs:
        zeros = (
            jnp.zeros((batch, width), jnp.float32),
            jnp.zeros((batch, width, best), jnp.int32),
            jnp.zeros((batch, width, best), jnp.float32),
        )
    output = Output(jnp.zeros((batch, width), jnp.int32), jnp.zeros((batch,), jnp.int32), zeros)
    tokens, lengths = _take((state.tokens, state.lengths), fixed.rows)
    return _Local(tokens, lengths, running, output)


def _append(fixed: _Fixed, raw: Array, local: _Local, index: Array, mask: Array) -> _Local:
    """Sample a token from the logits `raw` [b, V] for each row that runs; note it at `index`."""
    tokens, lengths, running, output = local
    logits = sampling.adjust(raw, fixed.settings, tokens, fixed.prompts, lengths)
    logits = sampling.allow(logits, mask)
    native = {"arg_max": ops.cpu.arg_max} if ops.choose("arg_max") == "cpu" else {}
    token = sampling.sample(logits, fixed.settings, lengths - fixed.prompts, **native)
    each = jnp.arange(len(lengths), dtype=jnp.int32)
    place = jnp.where(running, lengths, tokens.shape[1])
    column = jnp.where(running, index, output.tokens.shape[1])

    def note(old: Array, new: Array) -> Array:
        return old.at[each, column].set(new, mode="drop")

    logprobs = output.logprobs
    if logprobs is not None:
        logprobs = tuple(map(note, logprobs, sampling.top_logprobs(raw, token)))
    lengths = lengths + running.astype(jnp.int32)
    stopped = jnp.any(token[:, None] == fixed.stop_ids, axis=1)
    counts = output.counts + running.astype(jnp.int32)
    return _Local(
        tokens.at[each, place].set(token, mode="drop"),
        lengths,
        running & ~stopped & (lengths < fixed.max_lengths),
        Output(note(output.tokens, token), counts, logprobs),
    )


def _write_back(
    state: State, caches: Caches, local: _Local, rows: Array | None, ran: Array
) -> State:
    """Put the rows of a call back into the state; rows that fill up the bucket are dropped."""
    if rows is None:
        return state._replace(caches=caches, tokens=local.tokens, lengths=local.lengths)
    where = jnp.where(ran, rows, len(state.lengths))
    return state._replace(
        caches=caches,
        tokens=state.tokens.at[where].set(local.tokens, mode="drop"),
        lengths=state.lengths.at[where].set(local.lengths, mode="drop"),
    )
