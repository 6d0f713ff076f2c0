"""Paged attention: keys and values in pages of one pool, sequences of any length in one flat batch.

A pool is [P, S, C, L]: P pages of S tokens. A token's K/V heads stand as k0, v0, k1, v1, ... in
C >= 2K rows of L >= H lanes, each sequence's pages in its row of a block table. The layers of a
stack share one pool: layer l adds `first_block` = l * its number of pages to the tables.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from gemlax.ops import backend, storage
from gemlax.ops.attention import attend_blocks
from gemlax.ops.basic import EMPTY

__all__ = [
    "AttentionMetadata",
    "from_tpu_layout",
    "paged_attend",
    "to_tpu_layout",
    "write_pages",
]

# Bounds of the TPU kernel's blocks: bytes of its two page buffers, keys, queries. jax's own choice
# of 128 pages of 16 is 34 MB of buffers for Gemma 4 31B. Not tuned: no TPU has run them.
_BUFFER_BYTES, _KEYS, _QUERIES = 4 << 20, 512, 32


class AttentionMetadata(NamedTuple):
    """Which sequence and page each token of a flat batch [T] belongs to; all fields are int32.

    Any object with these attributes serves, such as tpu-inference's. The tokens of a sequence
    are adjacent, and tokens after those of the last request are padding.
    """

    # [T] absolute positions, for rotary embedding; not read here.
    input_positions: Any
    # [R, blocks per sequence], or flattened: page ids. A negative one is no page.
    block_tables: Any
    # [R] length of keys and values after this step; 0 for padding.
    seq_lens: Any
    # [R + 1] first token of each sequence; read up to the number of requests.
    query_start_loc: Any
    # [3] cumulative: decoding, and only prefilling, and all requests.
    request_distribution: Any


def write_pages(
    pages: Shaped[Array, "P S C L"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    metadata: Any,
    first_block: Int[Array, ""] | int,
) -> Shaped[Array, "P S C L"]:
    """Write this step's keys and values into the pool, in place where it is donated.

    Rows past 2K and lanes past H become zeros. Padding, and a token for whose position the table
    has no page, is dropped. That no two sequences own a page is not checked.
    """
    tokens, heads, size = k.shape
    _check_fits(pages, heads, size)
    count, block, width, lanes = pages.shape
    sequences, positions = _locate(metadata, tokens)
    page = _pages_at(metadata, sequences, positions // block, first_block, none=count)
    rows = jnp.stack([k, v], axis=2).reshape(tokens, 2 * heads, size)  # k0, v0, k1, v1, ...
    rows = jnp.pad(rows, ((0, 0), (0, width - 2 * heads), (0, lanes - size)))
    return pages.at[page, positions % block].set(storage.encode(rows, pages), mode="drop")


def paged_attend(
    q: Float[Array, "T N H"],
    pages: Shaped[Array, "P S C L"],
    metadata: Any,
    first_block: Int[Array, ""] | int,
    *,
    num_kv_heads: int,
    window: int | None,
    scale: float,
    implementation: backend.Backend | None = None,
) -> Float[Array, "T N H"]:
    """Attend to what the pool holds of each token's sequence; padding gets zeros.

    All keys and values come from the pool, so a layer without its own only calls this.

    Args:
        implementation: "xla" is the reference; "tpu" jax's Pallas kernel, which wants a sequence
            of at least one token in each request. None: `ops.choose`.
    """
    _check_fits(pages, num_kv_heads, q.shape[2])
    arguments = (q, pages, num_kv_heads)
    chosen = implementation or backend.choose("paged_attend", *arguments)
    if fault := backend.fault("paged_attend", chosen, *arguments):
        raise NotImplementedError(f'paged attention by "{chosen}": {fault}; use "xla"')
    if chosen == "tpu":
        return _attend_tpu(q, pages, metadata, first_block, window, scale)
    return _attend_xla(q, pages, metadata, first_block, num_kv_heads, window, scale)


def from_tpu_layout(array: Array) -> Array:
    """Turn [P, S, ceil(2K / packing), packing, L], as tpu-inference holds it, into a pool."""
    if array.ndim != 5:
        raise ValueError(f"a cache of tpu-inference has 5 axes, not those of {array.shape}")
    return array.reshape(*array.shape[:2], -1, array.shape[4])


def to_tpu_layout(pages: Array, packing: int) -> Array:
    """Turn a pool into tpu-inference's layout; `packing` is 32 / bits of a value."""
    if pages.ndim != 4:
        raise ValueError(f"a pool of pages has 4 axes, not those of {pages.shape}")
    if pages.shape[2] % packing:
        raise ValueError(f"{pages.shape[2]} rows per token are not a multiple of {packing}")
    return pages.reshape(*pages.shape[:2], -1, packing, pages.shape[3])


def _check_fits(pages: Array, num_kv_heads: int, size: int) -> None:
    if pages.shape[2] < 2 * num_kv_heads or pages.shape[3] < size:
        raise ValueError(
            f"pages of {pages.shape[2:]} per token are too small for {num_kv_heads} heads of "
            f"{size}: expected at least {(2 * num_kv_heads, size)}"
        )


def _locate(metadata: Any, tokens: int) -> tuple[Array, Array]:
    """Return each token's sequence and position, [T]; of padding, R (no sequence) and EMPTY."""
    starts, lengths = metadata.query_start_loc, metadata.seq_lens
    requests = metadata.request_distribution[2]
    rows = lengths.shape[0]
    token = jnp.arange(tokens, dtype=jnp.int32)
    # What stands behind the last request may be anything.
    ends = jnp.where(jnp.arange(rows) < requests, starts[1:], tokens)
    sequences = jnp.searchsorted(ends, token, side="right")
    positions = token + (lengths - starts[1:])[sequences]
    real = (sequences < requests) & (positions >= 0)
    return jnp.where(real, sequences, rows), jnp.where(real, positions, EMPTY)


def _tables(metadata: Any) -> Array:
    return metadata.block_tables.reshape(metadata.seq_lens.shape[0], -1)


def _pages_at(
    metadata: Any, sequences: Array, blocks: Array, first_block: Array | int, *, none: int
) -> Array:
    """Return the page of each (sequence, block), and `none` where the table has none."""
    page = _tables(metadata).at[sequences, blocks].get(mode="fill", fill_value=-1)
    return jnp.where(page < 0, none, page + first_block)


def _attend_xla(
    q: Array,
    pages: Array,
    metadata: Any,
    first_block: Array | int,
    num_kv_heads: int,
    window: int | None,
    scale: float,
) -> Array:
    """Attend by tokens: each walks the pages of its own sequence, from its own window's first."""
    tokens, _, size = q.shape
    count, block = pages.shape[:2]
    sequences, positions = _locate(metadata, tokens)
    first = jnp.zeros_like(positions)
    if window is not None:
        first = jnp.maximum(positions - window + 1, 0) // block
    steps = (positions // block + 1 - first).max()

    def read(index: Array) -> tuple[Array, Array, Array]:
        slots = jnp.arange(block, dtype=jnp.int32)[None]
        key_positions = (first + index)[:, None] * block + slots
        page = _pages_at(metadata, sequences, first + index, first_block, none=count)
        rows = pages.at[page].get(mode="clip")[:, :, : 2 * num_kv_heads, :size]
        # Later slots are masked, but unwritten memory may hold NaN, and 0 * NaN is NaN.
        known = key_positions <= positions[:, None]
        rows = jnp.where(known[:, :, None, None], storage.decode(rows, q.dtype), 0)
        return rows[:, :, 0::2], rows[:, :, 1::2], key_positions

    out = attend_blocks(
        q[:, None],
        read,
        (jnp.zeros_like(steps), steps),
        positions[:, None],
        num_kv_heads=num_kv_heads,
        window=window,
        scale=scale,
    )
    return out[:, 0]


def _attend_tpu(
    q: Array,
    pages: Array,
    metadata: Any,
    first_block: Array | int,
    window: int | None,
    scale: float,
) -> Array:
    """Attend with jax's kernel, which reads the pool whole and in place."""
    tokens, _, size = q.shape
    kernel = backend.tpu_paged_attention()
    assert kernel is not None
    tables = _tables(metadata) + first_block
    _, block, width, lanes = pages.shape
    page_bytes = block * width * lanes * pages.dtype.itemsize
    at_once = max(1, min(tables.shape[1], _KEYS // block, _BUFFER_BYTES // (2 * page_bytes)))
    out = kernel(
        jnp.pad(q, ((0, 0), (0, 0), (0, lanes - size))),
        pages,
        metadata.seq_lens,
        tables,
        metadata.query_start_loc,
        metadata.request_distribution[2:3],
        sm_scale=float(scale),  # its default is 1, whatever head_dim is
        sliding_window=window,
        num_kv_pages_per_block=at_once,
        num_queries_per_block=min(tokens, _QUERIES),
    )
    # Of padding the kernel writes nothing: what it leaves there is not defined.
    _, positions = _locate(metadata, tokens)
    return jnp.where((positions != EMPTY)[:, None, None], out[..., :size], 0)
