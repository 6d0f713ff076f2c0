"""Prefill and decode programs, and the loop that feeds them.

Prefill only fills caches, with all tokens of a prompt but its last; every decode step takes a
row's last token, samples the next and appends it. So one program holds the head and the
sampler, and prefill skips whatever no later token reads. Programs are compiled once per bucket
of (batch, chunk, capacity); sampling settings, limits and stop ids are traced.
"""

import functools
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from gemlax import ops, sampling, sharding, speculation
from gemlax.cache import Caches, holds, new_caches, resume, rollback, round_capacity
from gemlax.config import CHUNK
from gemlax.decoder import Decoder
from gemlax.engine import Counters, bucket, cache_sharding, run_decoder
from gemlax.ops.storage import Storage
from gemlax.sampling import Sampling
from gemlax.speculation import Drafting, Drafts

__all__ = ["Counters", "DecodeState", "Engine", "Rows", "bucket"]

STOP_PLACES = 16


class DecodeState(NamedTuple):
    """What a decode step changes. It is donated: the caches are written in place.

    `tokens` [B, S] holds prompt and output; unused places hold the vocabulary size.
    `logprobs`, when asked for, are (own [B, S], ids [B, S, 20], values [B, S, 20]); `drafting` is
    there when tokens are drafted.
    """

    caches: Caches
    tokens: Any
    lengths: Any
    done: Any
    logprobs: Any = None
    drafting: Drafting | None = None


class Limits(NamedTuple):
    """What a decode step reads: per row where the prompt ends and where the output must."""

    prompts: Any  # [B]
    ends: Any  # [B]
    stop_ids: Any  # [STOP_PLACES], filled with -1
    adapters: Any = None  # [B], entries of the tables of adapters; None: there are none


class Rows(NamedTuple):
    """A host copy of what has been decoded so far, and the state it is of until the next step."""

    tokens: np.ndarray  # [B, S]
    lengths: np.ndarray  # [B]
    done: np.ndarray  # [B]
    logprobs: tuple[np.ndarray, ...] | None
    state: DecodeState
    steps: np.ndarray | None = None  # [B], of rows that draft


class Engine:
    """Compiles and runs the programs of one decoder. The decoder's weights must not change."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_tokens: int,
        dtype: jnp.dtype,
        mesh: Mesh | None = None,
        storage: Storage = None,
        implementation: ops.Implementation | None = None,
        adapters: Sequence[str] = (),
    ):
        """`num_tokens`: ids from here on are never sampled (rows without a token).

        On a `mesh`, that of the weights, caches are cut by rows and heads, all else is replicated.
        `storage` is that of the caches (`new_caches`), `implementation` that of stored weights and
        attention (`ops.implementation`). `adapters` are those of the decoder's tables, in order.
        """
        self.config, self.dtype, self.mesh = decoder.config, dtype, mesh
        self.storage: Storage = storage
        self.adapters = tuple(adapters)
        self.num_tokens = num_tokens
        self.counters = Counters()
        graphdef, self._weights = nnx.split(decoder)
        prefill = functools.partial(_prefill, graphdef, mesh)
        if mesh is not None and implementation is None:
            implementation = "xla"  # a kernel would gather what the mesh cuts
        self._prefill = jax.jit(ops.cpu.bind(implementation, prefill), donate_argnums=(3,))

        @functools.cache
        def decode(drafts: int) -> Any:
            program = functools.partial(_decode, graphdef, num_tokens, mesh, drafts)
            return jax.jit(ops.cpu.bind(implementation, program), donate_argnums=(1,))

        self._decode, self._drafting = decode(0), decode
        self._compiled: dict[tuple, Any] = {}

    def rows(self, prompts: int) -> int:
        """Return how many rows the bucket of so many prompts has: what cuts them divides it."""
        cuts = sharding.parts(self.mesh, "batch")
        return -(-bucket(prompts) // cuts) * cuts

    def put(self, tree: Any) -> Any:
        """Bring arrays of the host, which every process has alike, to all devices."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        return sharding.put(tree, sharding.replicated(self.mesh))

    def _caches(self, make: Any, *args: Any) -> Caches:
        """Run what makes caches; on a mesh each device makes its own part."""
        if self.mesh is None:
            return make(*args)
        placed = {}
        for kind, cache in jax.eval_shape(make, *args).items():
            batch = len(cache.positions)
            held = cache_sharding(self.mesh, self.config, kind, batch)
            rows = sharding.rows_sharding(self.mesh, batch)
            placed[kind] = cache._replace(k=held, v=held, positions=rows)
        return jax.jit(make, out_shardings=placed)(*args)

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        context: int,
        stop_ids: Sequence[int],
        *,
        logprobs: bool = False,
        drafts: int = 0,
        before: DecodeState | None = None,
        adapters: Sequence[int] = (),
    ) -> tuple[DecodeState, Limits]:
        """Prefill the prompts (each with at least one id) and return what `steps` needs.

        Rows beyond the prompts fill the batch up to its bucket; they are done from the start.
        `drafts` is what `steps` will be given.
        `before` is a state of as many rows, which is used up: what its caches hold of the same
        beginning of each prompt is not prefilled again; it took the same adapters. `adapters` are
        the entries of the decoder's tables that the prompts take; 0 is none.
        """
        batch = self.rows(len(prompts))
        max_new_tokens = min(max_new_tokens, context)
        lengths = np.ones(batch, np.int32)
        lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
        ends = np.minimum(lengths + max_new_tokens, context).astype(np.int32)
        capacity = round_capacity(int(ends.max()))
        if before is not None:
            capacity = max(capacity, before.tokens.shape[1])
        tokens = np.full((batch, capacity), self.num_tokens, np.int32)
        for row, prompt in zip(tokens, prompts, strict=False):
            row[: len(prompt)] = prompt
        done = np.arange(batch) >= len(prompts)
        filled = np.where(done, 0, lengths - 1)
        caches, kept = self._first_caches(before, tokens, filled)
        rows = self._entries(batch, adapters)
        caches = self._fill(caches, tokens, kept, filled, rows)
        state = DecodeState(
            caches=caches,
            tokens=self.put(tokens),
            lengths=self.put(lengths),
            done=self.put(done | (lengths >= ends)),
            logprobs=self.put(_logprob_buffers(batch, capacity, self.num_tokens))
            if logprobs
            else None,
            drafting=self.put(speculation.start(batch)) if drafts else None,
        )
        stops = np.full(STOP_PLACES, -1, np.int32)
        stops[: len(stop_ids)] = list(stop_ids)
        return state, self.put(Limits(lengths, ends, stops))._replace(adapters=rows)

    def _first_caches(
        self, before: DecodeState | None, tokens: np.ndarray, filled: np.ndarray
    ) -> tuple[Caches, np.ndarray]:
        """Return caches for `tokens`, and how many of each row's first tokens they hold."""
        batch, capacity = tokens.shape
        if before is None:
            caches = self._caches(
                lambda: new_caches(self.config, batch, capacity, self.dtype, storage=self.storage)
            )
            return caches, 0 * filled
        assert len(before.tokens) == batch
        kept = np.minimum(_same_start(before, tokens), filled)
        kept = np.where(self._holds(before.caches, kept), kept, 0)
        caches = self._caches(
            lambda old, kept: resume(self.config, old, kept, capacity),
            before.caches,
            self.put(kept),
        )
        return caches, kept

    def _entries(self, batch: int, adapters: Sequence[int]) -> Array | None:
        """Return the entry of the tables of adapters of each row; None: there are no tables."""
        if not self.adapters:
            return None
        chosen = np.zeros(batch, np.int32)
        chosen[: len(adapters)] = list(adapters)
        return self.put(chosen)

    def _holds(self, caches: Caches, kept: np.ndarray) -> np.ndarray:
        check: Any = functools.partial(holds, self.config)
        if self.mesh is not None:
            check = jax.jit(check, out_shardings=sharding.replicated(self.mesh))
        return np.asarray(check(caches, self.put(kept)))

    def _fill(
        self,
        caches: Caches,
        tokens: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
        adapters: Array | None,
    ) -> Caches:
        """Prefill the tokens from `starts` up to `lengths` of each row, in chunks."""
        capacity = tokens.shape[1]
        new = starts < lengths
        longest = int(lengths.max())
        begin = time.perf_counter()
        spent = self.counters.compile_s
        for start in range(int(starts[new].min(initial=longest)), longest, CHUNK):
            width = bucket(min(longest - start, CHUNK), 16)
            columns = np.arange(start, start + width, dtype=np.int32)
            valid = (columns[None] >= starts[:, None]) & (columns[None] < lengths[:, None])
            # A resumed chunk may reach beyond the buffer; nothing is valid there.
            chunk = np.where(valid, tokens[:, np.minimum(columns, capacity - 1)], 0)
            chunk = chunk.astype(np.int32)
            positions = np.where(valid, columns[None], ops.EMPTY).astype(np.int32)
            args = (self._weights, *self._by_rows((chunk, positions)), caches, adapters)
            program = self._program("prefill", self._prefill, (*chunk.shape, capacity), args, 3)
            caches = program(*args)
            self.counters.prefill_calls += 1
        self.counters.prefill_tokens += int((lengths - starts).sum())
        jax.block_until_ready(caches)
        compiled = self.counters.compile_s - spent
        self.counters.prefill_s += time.perf_counter() - begin - compiled
        return caches

    def _by_rows(self, tree: Any) -> Any:
        if self.mesh is None:
            return self.put(tree)
        return sharding.put(tree, sharding.rows_sharding(self.mesh, len(tree[0])))

    def steps(
        self,
        state: DecodeState,
        limits: Limits,
        settings: Sampling,
        sizes: Iterator[int],
        drafts: int = 0,
    ) -> Generator[Rows, np.ndarray | None, None]:
        """Decode in blocks of `sizes` steps; yield the rows after each, until all are done.

        The receiver may `send` a mask of rows that shall end (a stop string was met). A step adds
        a token to each row, and up to `drafts` more where drafts are right.
        """
        settings = self.put(settings)
        while not bool(np.all(np.asarray(state.done))):
            size = self.put(np.int32(next(sizes)))
            args = (self._weights, state, limits, settings, size)
            shape = (*state.tokens.shape, *settings.places(), state.logprobs is not None)
            shape += (drafts,) if drafts else ()
            program = self._program("decode", self._drafting(drafts), shape, args, 1)
            begin = time.perf_counter()
            before = np.asarray(state.lengths)
            state = program(*args)
            self.counters.decode_calls += 1
            rows = _to_host(state)
            self.counters.decode_s += time.perf_counter() - begin
            self.counters.decode_tokens += int((rows.lengths - before).sum())
            ended = yield rows
            if ended is not None:
                state = state._replace(done=state.done | self.put(ended))

    def _program(self, name: str, jitted: Any, shape: tuple, args: tuple, donated: int) -> Any:
        """Return the compiled program of a bucket; compile it at first use."""
        ops.check_compiles("generating")
        key = (name, *shape)
        if key not in self._compiled:
            begin = time.perf_counter()
            if self.mesh is not None:  # the result lies where the argument donated for it does
                placed = jax.tree.map(lambda x: x.sharding, args[donated])
                jitted = jax.jit(jitted.__wrapped__, donate_argnums=donated, out_shardings=placed)
            self._compiled[key] = jitted.lower(*args).compile()
            self.counters.compile_s += time.perf_counter() - begin
            self.counters.programs += 1
            self.counters.keys.append(key)
        return self._compiled[key]


def _same_start(before: DecodeState, tokens: np.ndarray) -> np.ndarray:
    """Return per row how many tokens agree with what the caches of `before` hold."""
    old = np.asarray(before.tokens)
    width = min(old.shape[1], tokens.shape[1])
    differ = np.ones((len(tokens), width + 1), bool)
    differ[:, :width] = old[:, :width] != tokens[:, :width]
    # A row's last token has not been through the decoder yet.
    return np.minimum(differ.argmax(axis=1), np.asarray(before.lengths) - 1)


def _logprob_buffers(batch: int, capacity: int, num_tokens: int) -> tuple[np.ndarray, ...]:
    best = min(sampling.TOP_LOGPROBS, num_tokens)
    return (
        np.zeros((batch, capacity), np.float32),
        np.zeros((batch, capacity, best), np.int32),
        np.zeros((batch, capacity, best), np.float32),
    )


def _to_host(state: DecodeState) -> Rows:
    """Copy: the state's own buffers are donated to the next block."""
    logprobs = state.logprobs
    return Rows(
        tokens=np.array(state.tokens),
        lengths=np.array(state.lengths),
        done=np.array(state.done),
        logprobs=None if logprobs is None else tuple(np.array(x) for x in logprobs),
        state=state,
        steps=None if state.drafting is None else np.array(state.drafting.steps),
    )


def _prefill(
    graphdef: Any,
    mesh: Mesh | None,
    weights: Any,
    tokens: Array,
    positions: Array,
    caches: Caches,
    adapters: Array | None = None,
) -> Caches:
    """Write one chunk into the caches. The hidden states are dropped, and what makes only them."""
    decoder = nnx.merge(graphdef, weights)
    return run_decoder(decoder, mesh, tokens, positions, caches, adapters=adapters)[1]


def _decode(
    graphdef: Any,
    num_tokens: int,
    mesh: Mesh | None,
    drafts: int,
    weights: Any,
    state: DecodeState,
    limits: Limits,
    settings: Sampling,
    steps: Array,
) -> DecodeState:
    """Run up to `steps` decode steps on the device; stop early when every row is done."""
    decoder = nnx.merge(graphdef, weights)
    program = _Program(decoder, num_tokens, mesh, limits, settings)

    def more(carry: Any) -> Array:
        return (carry[0] < steps) & ~jnp.all(carry[1].done)

    def step(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        return carry[0] + 1, _step(program, _replicated(mesh, carry[1]))

    if drafts:
        return _speculate(program, drafts, more, state)
    return jax.lax.while_loop(more, step, (jnp.int32(0), state))[1]


class _Program(NamedTuple):
    """What every step of a decode program reads."""

    decoder: Decoder
    num_tokens: int
    mesh: Mesh | None
    limits: Limits
    settings: Sampling


def _replicated(mesh: Mesh | None, state: DecodeState) -> DecodeState:
    """On a mesh, let every device know what every row has said: all but the caches."""
    if mesh is None:
        return state
    known = state._replace(caches={})
    known = jax.lax.with_sharding_constraint(known, sharding.replicated(mesh))
    return known._replace(caches=state.caches)


def _step(program: _Program, state: DecodeState) -> DecodeState:
    """Append one token to each row."""
    rows = jnp.arange(len(state.tokens), dtype=jnp.int32)
    last = state.lengths - 1
    # A row that is done writes nothing: neither cache nor token.
    positions = jnp.where(state.done, ops.EMPTY, last)[:, None]
    current = jnp.where(state.done, 0, state.tokens[rows, last])[:, None]
    hidden, caches = run_decoder(
        program.decoder, program.mesh, current, positions, state.caches,
        adapters=program.limits.adapters,
    )  # fmt: skip
    raw = program.decoder.logits(hidden[:, 0])[:, : program.num_tokens]
    return _append(program, raw, state)._replace(caches=caches)


def _append(program: _Program, raw: Array, state: DecodeState) -> DecodeState:
    """Sample a token from the logits `raw` [B, V] for each row that is not done."""
    limits, settings = program.limits, program.settings
    batch, capacity = state.tokens.shape
    rows = jnp.arange(batch, dtype=jnp.int32)
    logits = sampling.adjust(raw, settings, state.tokens, limits.prompts, state.lengths)
    native = {"arg_max": ops.cpu.arg_max} if program.mesh is None and ops.cpu.live() else {}
    token = sampling.sample(logits, settings, state.lengths - limits.prompts, **native)
    slot = jnp.where(state.done, capacity, state.lengths)
    logprobs = state.logprobs
    if logprobs is not None:
        new = sampling.top_logprobs(raw, token)
        logprobs = tuple(
            old.at[rows, slot].set(x, mode="drop") for old, x in zip(logprobs, new, strict=True)
        )
    lengths = state.lengths + (~state.done).astype(jnp.int32)
    stopped = jnp.any(token[:, None] == limits.stop_ids[None], axis=1)
    return state._replace(
        tokens=state.tokens.at[rows, slot].set(token, mode="drop"),
        lengths=lengths,
        done=state.done | stopped | (lengths >= limits.ends),
        logprobs=logprobs,
    )


def _speculate(
    program: _Program, most: int, more: Callable[[Any], Array], state: DecodeState
) -> DecodeState:
    """Run steps of one token a row, and of as many more as drafts are right where they may pay.

    Loops in a loop, because XLA copies the caches into the branches of a conditional.
    """

    def plan(steps: Array, state: DecodeState) -> _Carry:
        assert state.drafting is not None
        room = jnp.where(state.done, 0, program.limits.ends - state.lengths - 1)
        drafts = speculation.propose(state.tokens, state.lengths, room, most)
        drafts = speculation.afford(drafts, state.drafting)
        return _Carry(steps, state, drafts, speculation.worthwhile(drafts, state.done))

    def advance(old: _Carry, run: Callable[[DecodeState], DecodeState]) -> _Carry:
        state = _replicated(program.mesh, old.state)
        new = run(state)
        added = new.lengths - state.lengths
        assert state.drafting is not None
        drafting = speculation.account(state.drafting, old.drafts, old.tried, added)
        return plan(old.steps + 1, new._replace(drafting=drafting))

    def narrow(carry: _Carry) -> _Carry:
        return advance(carry, functools.partial(_step, program))

    def wide(carry: _Carry) -> _Carry:
        return advance(carry, functools.partial(_verify, program, carry.drafts))

    def both(carry: _Carry) -> _Carry:
        carry = jax.lax.while_loop(lambda c: more(c) & ~c.tried, narrow, carry)
        return jax.lax.while_loop(lambda c: more(c) & c.tried, wide, carry)

    return jax.lax.while_loop(more, both, plan(jnp.int32(0), state)).state


class _Carry(NamedTuple):
    """What a step with drafts hands to the next: how many have run, and the next drafts."""

    steps: Array
    state: DecodeState
    drafts: Drafts
    tried: Array  # the next step takes the drafts


def _verify(program: _Program, drafts: Drafts, state: DecodeState) -> DecodeState:
    """Run the last token and the drafts of each row at once, and append what is sampled.

    A row goes on while what it samples is what was drafted. So each token is drawn from the logits
    after the tokens before it, with its own key, as without drafts: nothing is to be corrected.
    """
    rows = jnp.arange(len(state.tokens), dtype=jnp.int32)
    last = state.lengths - 1
    order = jnp.arange(drafts.tokens.shape[1] + 1, dtype=jnp.int32)[None]
    wanted = (order <= drafts.counts[:, None]) & ~state.done[:, None]
    positions = jnp.where(wanted, last[:, None] + order, ops.EMPTY)
    current = jnp.concatenate([state.tokens[rows, last][:, None], drafts.tokens], axis=1)
    current = jnp.where(wanted, current, 0)
    hidden, caches = run_decoder(
        program.decoder, program.mesh, current, positions, state.caches,
        adapters=program.limits.adapters,
    )  # fmt: skip
    raw = program.decoder.logits(hidden)[..., : program.num_tokens]  # [B, d + 1, V]
    tried = jnp.pad(drafts.tokens, ((0, 0), (0, 1)))

    def more(carry: tuple[Array, Array, DecodeState]) -> Array:
        return jnp.any(carry[1])

    def one(carry: tuple[Array, Array, DecodeState]) -> tuple[Array, Array, DecodeState]:
        index, going, known = carry
        logits = jax.lax.dynamic_index_in_dim(raw, index, 1, keepdims=False)
        new = _append(program, logits, known._replace(done=~going))
        right = new.tokens[rows, known.lengths] == tried[rows, index]
        done = jnp.where(going, new.done, known.done)
        goes_on = going & ~done & right & (index < drafts.counts)
        return index + 1, goes_on, new._replace(done=done)

    begin = (jnp.int32(0), ~state.done, state._replace(caches={}))
    new = jax.lax.while_loop(more, one, begin)[2]
    # All but the last token of a row have been through the decoder.
    return new._replace(caches=rollback(caches, new.lengths - 1))
