"""Mixture of experts: the router, and the algorithms that run the experts that it chose.

Each gives each row the weighted sum of its `top_k` experts; none drops a row. Cost grows
with the experts that are active, except in the reference, which runs all of them.
Source: transformers modeling_gemma4.py, Gemma4TextRouter and Gemma4TextExperts.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemlax.ops.backend import platform
from gemlax.ops.basic import geglu, rms_norm
from gemlax.ops.matmul import product
from gemlax.qtensor import At, Weight, dense, is_stored, num_parts, num_rows, take, take_each

__all__ = ["Algorithm", "experts", "route"]

Algorithm = Literal["dense", "gather", "sorted", "ragged", "split"]

# Up to this many (row, expert) pairs the experts' weights are gathered per pair. Measured on CPU
# (docs/performance.md, "Experts"): at 32 rows of 8 experts gathering is still the fastest.
_FEW_PAIRS = 256
# Pairs of one expert that share a product in "sorted".
_BLOCK = 32


def route(
    x: Float[Array, "R D"],
    proj: Weight,
    scale: Float[Array, " D"],
    per_expert_scale: Float[Array, " E"],
    *,
    top_k: int,
    eps: float,
) -> tuple[Float[Array, "R k"], Int[Array, "R k"]]:
    """Return the float32 weights and the ids of the `top_k` experts of each row.

    `x` is the raw residual: it is normed here. The softmax runs over all experts, then the chosen
    ones are scaled to sum to one, then by `per_expert_scale`, once.
    """
    normed = rms_norm(x, None, eps=eps, offset=0.0) * scale.astype(x.dtype)[None]
    normed = normed * jnp.asarray(x.shape[-1] ** -0.5, x.dtype)
    probabilities = jax.nn.softmax(product(normed, dense(proj)), axis=-1)
    weights, ids = jax.lax.top_k(probabilities, top_k)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return weights * jnp.take(per_expert_scale.astype(jnp.float32), ids), ids


def experts(
    x: Float[Array, "R D"],
    weights: Float[Array, "R k"],
    ids: Int[Array, "R k"],
    gate_up: Weight,
    down: Weight,
    *,
    algorithm: Algorithm | None = None,
) -> Float[Array, "R D"]:
    """Return the weighted sum of each row's experts, accumulated in float32.

    Args:
        gate_up: [E, 2 * F, D], the gate's rows first.
        down: [E, D, F].
        algorithm: None: "split" for experts that are (`Split`), which has no gradient; else
            "gather" for few rows, or "sorted" on CPU and "ragged" elsewhere.
    """
    algorithms = {
        "dense": _dense,
        "gather": _gather,
        "sorted": _sorted,
        "ragged": _ragged,
        "split": _split,
    }
    run = algorithms[algorithm or _default(ids.size, num_parts(gate_up))]
    return run(x, weights, ids, gate_up, down).astype(x.dtype)


def _default(pairs: int, parts: int) -> Algorithm:
    if parts > 1:
        return "split"
    if pairs <= _FEW_PAIRS:
        return "gather"
    return "sorted" if platform() == "cpu" else "ragged"


def _expert(x: Array, gate_up: Array, down: Array) -> Array:
    """Run one expert on rows [R, D]; float32."""
    gate, up = jnp.split(product(x, gate_up), 2, axis=-1)
    return product(geglu(gate, up).astype(x.dtype), down)


def _dense(x: Array, weights: Array, ids: Array, gate_up: Weight, down: Weight) -> Array:
    """The reference: every expert on every row."""

    def step(total: Array, expert: Array) -> tuple[Array, None]:
        out = _expert(x, take(gate_up, expert), take(down, expert))
        share = jnp.where(ids == expert, weights, 0.0).sum(axis=-1)
        return total + out * share[:, None], None

    start = jnp.zeros(x.shape, jnp.float32)
    return jax.lax.scan(step, start, jnp.arange(num_rows(gate_up), dtype=jnp.int32))[0]


def _gather(x: Array, weights: Array, ids: Array, gate_up: Weight, down: Weight) -> Array:
    """Read the weights of each (row, expert) pair, and nothing else."""
    top_k = ids.shape[1]

    def pair(total: Array, index: Array) -> tuple[Array, None]:
        row, place = index // top_k, index % top_k
        expert = ids[row, place]
        out = _expert(x[row][None], take(gate_up, expert), take(down, expert))
        return total.at[row].add(out[0] * weights[row, place]), None

    start = jnp.zeros(x.shape, jnp.float32)
    return jax.lax.scan(pair, start, jnp.arange(ids.size, dtype=jnp.int32))[0]


def _sorted(x: Array, weights: Array, ids: Array, gate_up: Weight, down: Weight) -> Array:
    """Sort the pairs by expert and run blocks that each belong to one expert.

    Blocks that stay empty are skipped.
    """
    ends, blocks = _blocks(weights, ids, num_rows(gate_up), _BLOCK)
    frozen = all(isinstance(w, At) or is_stored(w) for w in (gate_up, down))
    run = _frozen_blocks if frozen else _run_blocks
    return run(x, blocks, ends[-1], gate_up, down)


def _run_blocks(x: Array, blocks: "_Block", count: Array, gate_up: Weight, down: Weight) -> Array:
    """Run the first `count` blocks; float32."""

    def step(total: Array, inputs: tuple[Array, _Block]) -> tuple[Array, None]:
        index, (expert, row, share) = inputs

        def run(total: Array) -> Array:
            out = _expert(x[row], take(gate_up, expert), take(down, expert))
            return total.at[row].add(out * share[:, None])

        return jax.lax.cond(index < count, run, lambda total: total, total), None

    start = jnp.zeros(x.shape, jnp.float32)
    return jax.lax.scan(step, start, (_numbers(blocks), blocks))[0]


def _numbers(blocks: "_Block") -> Array:
    return jnp.arange(len(blocks.expert), dtype=jnp.int32)


# With experts that have no gradient: for the backward pass nothing of them is kept.
_frozen_blocks = jax.custom_vjp(_run_blocks)


def _frozen_forward(*args: Any) -> tuple[Array, Any]:
    return _run_blocks(*args), args


def _frozen_backward(kept: Any, slopes: Array) -> tuple[Any, ...]:
    """Run each block once more, and back."""
    x, blocks, count, gate_up, down = kept

    def step(total: Array, inputs: tuple[Array, _Block]) -> tuple[Array, Array]:
        index, (expert, row, share) = inputs

        def run(total: Array) -> tuple[Array, Array]:
            weights = take(gate_up, expert), take(down, expert)
            out, pull = jax.vjp(lambda rows: _expert(rows, *weights), x[row])
            slope = slopes[row]
            (back,) = pull(slope * share[:, None])
            return total.at[row].add(back.astype(total.dtype)), (out * slope).sum(axis=-1)

        return jax.lax.cond(index < count, run, lambda t: (t, jnp.zeros_like(share)), total)

    start = jnp.zeros(x.shape, jnp.float32)
    total, shares = jax.lax.scan(step, start, (_numbers(blocks), blocks))
    return total.astype(x.dtype), _Block(None, None, shares), None, None, None


_frozen_blocks.defvjp(_frozen_forward, _frozen_backward)


def _split(x: Array, weights: Array, ids: Array, gate_up: Weight, down: Weight) -> Array:
    """Let each part of the experts run the blocks of its own, all parts in step, and sum up.

    Only rows and their results pass between parts. A part that has fewer blocks than another
    repeats one for nothing. The number of steps is dynamic, so this has no gradient.
    """
    parts, count = num_parts(gate_up), num_rows(gate_up)
    ends, blocks = _blocks(weights, ids, count, 1 if ids.size <= _FEW_PAIRS else _BLOCK)
    last = ends[count // parts - 1 :: count // parts]  # [parts]
    first = jnp.concatenate([jnp.zeros(1, jnp.int32), last[:-1]])
    begin = jnp.arange(parts, dtype=jnp.int32) * (count // parts)

    def step(index: Array, total: Array) -> Array:
        has_block = first + index < last
        expert, row, share = jax.tree.map(lambda a: a[first + index], blocks)
        local = jnp.where(has_block, expert - begin, 0)
        out = jax.vmap(_expert)(x[row], take_each(gate_up, local), take_each(down, local))
        out = out * jnp.where(has_block[:, None], share, 0.0)[..., None]
        return jax.vmap(lambda total, row, out: total.at[row].add(out))(total, row, out)

    start = jnp.zeros((parts, *x.shape), jnp.float32)
    return jax.lax.fori_loop(0, (last - first).max(), step, start).sum(axis=0)


class _Block(NamedTuple):
    """Pairs of one expert: its id, their rows and weights [size]; zero where there is no pair."""

    expert: Any
    row: Any
    share: Any


def _blocks(weights: Array, ids: Array, count: int, size: int) -> tuple[Array, _Block]:
    """Sort the pairs by expert and cut them into blocks of up to `size` pairs of one expert.

    Returns where the blocks of each expert end [E], and pairs / size + experts blocks, which are
    enough; those beyond the last end are empty.
    """
    order, sizes = _by_expert(ids, count)
    blocks = (sizes + size - 1) // size
    ends, block_ends = jnp.cumsum(sizes), jnp.cumsum(blocks)
    num_blocks = ids.size // size + min(count, ids.size)
    index = jnp.arange(num_blocks, dtype=jnp.int32)
    expert = (block_ends[None] <= index[:, None]).sum(axis=1, dtype=jnp.int32)
    expert = jnp.minimum(expert, count - 1)
    done = (index - (block_ends[expert] - blocks[expert])) * size
    lane = done[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
    inside = lane < sizes[expert][:, None]
    pair = order[jnp.where(inside, (ends - sizes)[expert][:, None] + lane, 0)]
    share = jnp.where(inside, weights.reshape(-1)[pair], 0.0)
    return block_ends, _Block(expert, pair // ids.shape[1], share)


def _ragged(x: Array, weights: Array, ids: Array, gate_up: Weight, down: Weight) -> Array:
    """Two grouped products over all pairs, by `jax.lax.ragged_dot_general`."""
    order, sizes = _by_expert(ids, num_rows(gate_up))
    row = order // ids.shape[1]
    gate, up = jnp.split(_grouped(x[row], dense(gate_up), sizes), 2, axis=-1)
    out = _grouped(geglu(gate, up).astype(x.dtype), dense(down), sizes)
    share = weights.reshape(-1)[order]
    return jnp.zeros(x.shape, jnp.float32).at[row].add(out * share[:, None])


def _grouped(x: Array, weight: Array, sizes: Array) -> Array:
    """Multiply rows, grouped by expert, with [E, out, in]; float32."""
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    return jax.lax.ragged_dot_general(
        x, weight.astype(x.dtype), sizes, numbers, preferred_element_type=jnp.float32
    )


def _by_expert(ids: Array, count: int) -> tuple[Array, Array]:
    """Return the pairs in the order of their experts, and how many pairs each expert has."""
    flat = ids.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    return order, jnp.zeros(count, jnp.int32).at[flat].add(1)
