"""What the device knows of the running requests: one row per slot, donated from step to step."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemlax import ops
from gemlax.cache import Caches
from gemlax.engine.request import STOP_PLACES, Request
from gemlax.sampling import Sampling, make_sampling

__all__ = ["Changing", "Joining", "Settled", "State", "join", "joining", "new_rows"]


Changing = tuple[Caches, jax.Array, jax.Array]
Settled = tuple[Any, ...]


class State(NamedTuple):
    """Arrays of B slots, of which a call runs some.

    `tokens` [B, S] hold prompt and answer; unused places hold the vocabulary size. A call of the
    decoder changes the first three fields, only `join` the others.
    """

    caches: Caches
    tokens: Any  # [B, S]
    lengths: Any  # [B]: how many tokens there are
    prompts: Any  # [B]: how many of them are the prompt
    max_lengths: Any  # [B]
    stop_ids: Any  # [B, STOP_PLACES], filled up with -1
    settings: Sampling  # [B, ...]
    adapters: Any = None  # [B], entries of the tables of adapters; None: there are none

    def parts(self) -> tuple[Changing, Settled]:
        """Return what a call of the decoder changes, and what it only reads."""
        return self[:3], self[3:]

    def changed(self, fields: Changing) -> "State":
        """Return the state with other arrays in place of those that a call changes."""
        caches, tokens, lengths = fields
        return self._replace(caches=caches, tokens=tokens, lengths=lengths)


class Joining(NamedTuple):
    """What a request brings to its slot: a row of everything but the caches."""

    slot: Any
    num_cached: Any  # positions from here on are forgotten
    tokens: Any  # [S]
    length: Any
    max_length: Any
    stop_ids: Any  # [STOP_PLACES]
    settings: Any
    adapter: Any


def new_rows(
    num_slots: int, capacity: int, num_tokens: int, places: Sequence[int]
) -> dict[str, Any]:
    """Return the arrays of a state without its caches, on the host; every slot is free.

    `places` say how wide the settings are: `Sampling.places`.
    """
    settings = make_sampling(num_tokens, [0] * num_slots).widened(places, num_tokens)
    return {
        "tokens": np.full((num_slots, capacity), num_tokens, np.int32),
        "lengths": np.ones(num_slots, np.int32),
        "prompts": np.ones(num_slots, np.int32),
        "max_lengths": np.ones(num_slots, np.int32),
        "stop_ids": np.full((num_slots, STOP_PLACES), -1, np.int32),
        "settings": settings,
    }


def joining(request: Request, slot: int, num_cached: int, state: State, num_tokens: int) -> Joining:
    """Lay out a request for `join`, as wide as the state is."""
    tokens = np.full(state.tokens.shape[1], num_tokens, np.int32)
    tokens[: len(request.prompt)] = request.prompt
    stop_ids = np.full(STOP_PLACES, -1, np.int32)
    stop_ids[: len(request.stop_ids)] = request.stop_ids
    settings = request.settings.widened(state.settings.places(), num_tokens)
    return Joining(
        slot=np.int32(slot),
        num_cached=np.int32(num_cached),
        tokens=tokens,
        length=np.int32(len(request.prompt)),
        max_length=np.int32(request.max_length),
        stop_ids=stop_ids,
        settings=jax.tree.map(lambda row: np.asarray(row)[0], settings),
        adapter=np.int32(request.adapter),
    )


def join(state: State, new: Joining) -> State:
    """Write a request into its slot. Of the caches only the positions of that row change."""

    def forget(cache: Any) -> Any:
        row = cache.positions[new.slot]
        row = jnp.where(row < new.num_cached, row, ops.EMPTY)
        positions = cache.positions.at[new.slot].set(row)
        return dataclasses.replace(cache, positions=positions)

    def put(rows: Any, row: Any) -> Any:
        return rows.at[new.slot].set(row)

    return State(
        caches={kind: forget(cache) for kind, cache in state.caches.items()},
        tokens=put(state.tokens, new.tokens),
        lengths=put(state.lengths, new.length),
        prompts=put(state.prompts, new.length),
        max_lengths=put(state.max_lengths, new.max_length),
        stop_ids=put(state.stop_ids, new.stop_ids),
        settings=jax.tree.map(put, state.settings, new.settings),
        adapters=None if state.adapters is None else put(state.adapters, new.adapter),
    )
