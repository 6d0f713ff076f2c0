"""Paged attention against `ops.attend` over whole sequences, its memory, and its TPU lowering.

The traffic is ragged: each step is one flat batch in which sequences of several tokens, of one
and of none stand side by side, with padding behind them, and the block tables are scrambled.
"""

import functools
import re
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as tpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from gemlax import ops
from gemlax.ops import AttentionMetadata, backend, paged

K, N, H = 2, 4, 8
TOKENS, ROWS, LENGTH = 16, 5, 32  # a flat batch, sequences in it, tokens a table has pages for
LAYERS = 3
# Sums of about 30 float32 products.
TOLERANCE = 1e-5

# What a step brings: sequence -> new tokens, in the order of the batch.
STEPS = [{0: 5, 1: 1, 2: 7}, {2: 1, 3: 9, 0: 1}, {1: 6, 0: 1, 3: 1, 2: 4, 4: 3}, {4: 1}]


class Step(NamedTuple):
    """One flat batch, and which rows of it belong to which sequence."""

    q: Any  # [TOKENS, N, H]
    k: Any  # [TOKENS, K, H]
    v: Any
    metadata: AttentionMetadata
    spans: dict[int, slice]


class Traffic(NamedTuple):
    """All steps; `k` and `v` hold each sequence whole, and `tables` the pages of each."""

    steps: list[Step]
    k: np.ndarray  # [sequence, LENGTH, K, H]
    v: np.ndarray
    tables: np.ndarray  # [sequence, blocks]


def make_traffic(block: int, *, flat: bool = False, seed: int = 0) -> Traffic:
    """Draw traffic. Padding carries NaN as keys, other sequences' pages, and senseless offsets."""
    rng = np.random.default_rng(seed)
    k, v = (rng.normal(size=(ROWS, LENGTH, K, H)).astype(np.float32) for _ in range(2))
    blocks = -(-LENGTH // block)
    tables = rng.permutation(ROWS * blocks).reshape(ROWS, blocks).astype(np.int32)
    lengths, steps = dict.fromkeys(range(ROWS), 0), []
    for new in STEPS:
        at = np.cumsum([0, *new.values()])
        spans = {s: slice(int(a), int(a) + n) for (s, n), a in zip(new.items(), at, strict=False)}
        flat_k, flat_v = (np.full((TOKENS, K, H), np.nan, np.float32) for _ in range(2))
        positions = np.zeros(TOKENS, np.int32)
        for s, span in spans.items():
            here = slice(lengths[s], lengths[s] + new[s])
            flat_k[span], flat_v[span] = k[s, here], v[s, here]
            positions[span] = np.arange(here.start, here.stop)
            lengths[s] = here.stop
        padding = ROWS - len(new)
        order = [*new, *rng.choice(list(new), padding)]  # padding rows: tables of the others
        metadata = AttentionMetadata(
            input_positions=jnp.asarray(positions),
            block_tables=jnp.asarray(tables[order].reshape(-1 if flat else ROWS, *[blocks][flat:])),
            seq_lens=jnp.asarray([lengths[s] for s in new] + [0] * padding, jnp.int32),
            query_start_loc=jnp.asarray([*at, *[int(at[-1])] * padding], jnp.int32),
            request_distribution=jnp.asarray([0, 0, len(new)], jnp.int32),
        )
        q = rng.normal(size=(TOKENS, N, H)).astype(np.float32)
        steps.append(Step(q, flat_k, flat_v, metadata, spans))
    return Traffic(steps, k, v, tables)


def make_pool(block: int, width: int = 2 * K, lanes: int = H, dtype: Any = np.float32):
    """Return pages for LAYERS layers, full of NaN as memory may be."""
    count = LAYERS * ROWS * -(-LENGTH // block)
    return jnp.asarray(np.full((count, block, width, lanes), np.nan, dtype))


write = jax.jit(ops.write_pages)
STATIC = ("num_kv_heads", "window", "scale", "implementation")
attend = jax.jit(ops.paged_attend, static_argnames=STATIC)
reference = jax.jit(ops.attend, static_argnames="scale")


def blocks_of(pool) -> int:
    """Pages of one layer."""
    return pool.shape[0] // LAYERS


def whole(step: Step, k, v, lengths, window, scale=1.0) -> np.ndarray:
    """The reference: each sequence by itself over whole arrays; padding is zero."""
    out = np.zeros_like(step.q)
    for s, span in step.spans.items():
        total = lengths[s] = lengths.get(s, 0) + span.stop - span.start
        keys = jnp.arange(LENGTH, dtype=jnp.int32)[None]
        q = (
            jnp.zeros((1, LENGTH, N, H))
            .at[0, total - span.stop + span.start : total]
            .set(step.q[span])
        )
        mask = ops.causal_mask(keys, keys, window)
        every = reference(q, jnp.asarray(k[s][None]), jnp.asarray(v[s][None]), mask, scale=scale)
        out[span] = np.asarray(every)[0, total - span.stop + span.start : total]
    return out


def check_all_steps(traffic: Traffic, pool, *, window=None, scale=1.0, layer=1, values=lambda x: x):
    """Write and attend step by step; compare each with the reference. Returns the pool."""
    first = jnp.asarray(layer * blocks_of(pool), jnp.int32)
    k, v = values(traffic.k), values(traffic.v)
    lengths: dict[int, int] = {}
    for step in traffic.steps:
        pool = write(pool, step.k, step.v, step.metadata, first)
        out = attend(step.q, pool, step.metadata, first, num_kv_heads=K, window=window, scale=scale)
        expected = whole(step, k, v, lengths, window, scale)
        np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE)
    assert sum(lengths.values()) == sum(sum(new.values()) for new in STEPS)
    return pool


def bits(pool) -> np.ndarray:
    pool = np.asarray(pool)
    return pool.view(np.uint32 if pool.itemsize == 4 else np.uint16)


@pytest.mark.parametrize("window", [None, 5, 1000])
@pytest.mark.parametrize("block", [1, 4, 16])
def test_paged_steps_give_what_whole_sequences_give(block, window):
    check_all_steps(make_traffic(block), make_pool(block), window=window)


def test_the_scale_is_applied():
    check_all_steps(make_traffic(4), make_pool(4), scale=0.3)


def test_flattened_block_tables_serve_alike():
    check_all_steps(make_traffic(4, flat=True), make_pool(4), window=5)


@pytest.mark.parametrize("padded", [(2 * K + 2, H), (2 * K, H + 5), (2 * K + 2, H + 5)])
def test_pools_wider_than_the_heads_serve_alike(padded):
    pool = check_all_steps(make_traffic(4), make_pool(4, *padded), window=5)
    written = np.asarray(pool)[~np.isnan(np.asarray(pool)[..., 0, 0])]
    assert len(written) == sum(sum(new.values()) for new in STEPS)
    assert not written[:, 2 * K :].any()
    assert not written[..., H:].any()


def test_pages_held_as_bits_of_bfloat16_serve_alike():
    """0x7FC0 is a NaN of bfloat16."""
    pool = jnp.full_like(make_pool(4), 0x7FC0, jnp.uint16)
    rounded = check_all_steps(
        make_traffic(4), pool, values=lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32)
    )
    assert rounded.dtype == jnp.uint16


def test_pages_of_bfloat16_hold_the_same_bits():
    traffic = make_traffic(4)
    plain = make_pool(4, dtype=ml_dtypes.bfloat16)
    step, first = traffic.steps[0], jnp.int32(0)
    held = write(jnp.asarray(bits(plain)), step.k, step.v, step.metadata, first)
    same = write(plain, step.k, step.v, step.metadata, first)
    np.testing.assert_array_equal(bits(held), bits(same))


def test_bfloat16_queries_give_bfloat16():
    traffic = make_traffic(4)
    step, pool, first = traffic.steps[0], make_pool(4), jnp.int32(0)
    pool = write(pool, step.k, step.v, step.metadata, first)
    out = attend(
        jnp.asarray(step.q, jnp.bfloat16), pool, step.metadata, first,
        num_kv_heads=K, window=None, scale=1.0,
    )  # fmt: skip
    assert out.dtype == jnp.bfloat16
    expected = whole(step, traffic.k, traffic.v, {}, None)
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=0, atol=0.03)


def test_a_sharing_layer_reads_its_donors_pages():
    """It owns no K/V: other queries, the same pages, nothing written."""
    traffic = make_traffic(4)
    pool, first, lengths = make_pool(4), jnp.int32(0), {}
    for step in traffic.steps:
        pool = write(pool, step.k, step.v, step.metadata, first)
        own = step._replace(q=step.q[:, ::-1] + 1)
        out = attend(own.q, pool, step.metadata, first, num_kv_heads=K, window=5, scale=1.0)
        expected = whole(own, traffic.k, traffic.v, lengths, 5)
        np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE)


def test_a_step_may_stand_in_other_rows_than_the_one_before():
    """The steps above order their sequences anew; here is the proof that they do."""
    orders = [list(new) for new in STEPS]
    assert any(a.index(s) != b.index(s) for a in orders for b in orders for s in {*a} & {*b})


def test_metadata_of_any_class_serves():
    class Foreign:
        def __init__(self, given: AttentionMetadata):
            self.block_tables, self.seq_lens = given.block_tables, given.seq_lens
            self.query_start_loc = given.query_start_loc
            self.request_distribution = given.request_distribution

    traffic = make_traffic(4)
    step = traffic.steps[0]
    foreign = Foreign(step.metadata)
    pool = ops.write_pages(make_pool(4), jnp.asarray(step.k), jnp.asarray(step.v), foreign, 0)
    out = ops.paged_attend(
        jnp.asarray(step.q), pool, foreign, 0, num_kv_heads=K, window=None, scale=1.0
    )
    expected = whole(step, traffic.k, traffic.v, {}, None)
    np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE)


def test_pages_before_a_tokens_window_are_not_read():
    """Each token starts at its own window, whatever else is in the batch: they may be NaN."""
    traffic = make_traffic(4)
    pool, first, lengths, lost_pages = make_pool(4), jnp.int32(0), {}, 0
    for step in traffic.steps:
        pool = write(pool, step.k, step.v, step.metadata, first)
        for s in step.spans:
            oldest = lengths.get(s, 0) - 5 + 1
            lost = traffic.tables[s, : max(oldest, 0) // 4]
            pool = pool.at[lost].set(jnp.nan)
            lost_pages += len(lost)
        out = attend(step.q, pool, step.metadata, first, num_kv_heads=K, window=5, scale=1.0)
        expected = whole(step, traffic.k, traffic.v, lengths, 5)
        np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE)
    assert lost_pages


@pytest.mark.parametrize("layer", range(LAYERS))
def test_only_the_new_tokens_of_one_layer_are_written(layer):
    """Not padding, not a free slot, not another sequence or layer: the whole pool is compared."""
    block = 4
    traffic, pool = make_traffic(block), make_pool(block)
    expected, lengths = np.array(pool), dict.fromkeys(range(ROWS), 0)
    first = layer * blocks_of(pool)
    for step in traffic.steps:
        pool = write(pool, step.k, step.v, step.metadata, jnp.int32(first))
        for s, span in step.spans.items():
            for row in range(span.start, span.stop):
                page = first + traffic.tables[s, lengths[s] // block]
                slot = expected[page, lengths[s] % block]
                slot[0::2], slot[1::2] = step.k[row], step.v[row]
                lengths[s] += 1
        np.testing.assert_array_equal(bits(pool), bits(expected))


def one_step(**fields) -> tuple[Step, Any]:
    """The first step with some fields replaced, and a pool of pages of 4."""
    step = make_traffic(4).steps[0]
    given = {name: jnp.asarray(value, jnp.int32) for name, value in fields.items()}
    return step._replace(metadata=step.metadata._replace(**given)), make_pool(4)


def written(step: Step, pool, first: int = 0) -> int:
    """How many slots a write changes."""
    # Padding would be written as NaN, so that it must differ from what is there.
    pool = jnp.zeros_like(pool)
    after = write(pool, step.k, step.v, step.metadata, jnp.int32(first))
    return int((bits(after) != 0).any(axis=(2, 3)).sum())


def test_a_batch_of_padding_alone_writes_nothing_and_gives_zeros():
    step, pool = one_step(seq_lens=[0] * 5, query_start_loc=[0] * 6, request_distribution=[0] * 3)
    assert written(step, pool) == 0
    out = attend(step.q, pool, step.metadata, jnp.int32(0), num_kv_heads=K, window=5, scale=1.0)
    assert not np.asarray(out).any()


@pytest.mark.parametrize(
    ("requests", "offsets", "tokens"), [(3, [0, 5, 6, 13, 0, 9], 13), (1, [0, 5, 0, 0, 0, 0], 5)]
)
def test_offsets_behind_the_last_request_are_not_read(requests, offsets, tokens):
    step, pool = one_step(
        query_start_loc=offsets, seq_lens=[5, 1, 7, 31, 31], request_distribution=[0, 0, requests]
    )
    assert written(step, pool) == tokens
    out = attend(
        step.q, jnp.ones_like(pool), step.metadata, jnp.int32(0),
        num_kv_heads=K, window=5, scale=1.0,
    )  # fmt: skip
    assert np.asarray(out)[:tokens].all()
    assert not np.asarray(out)[tokens:].any()


def test_tokens_of_a_sequence_of_length_zero_are_dropped():
    step, pool = one_step(seq_lens=[5, 1, 0, 0, 0])
    assert written(step, pool) == 6


def test_positions_past_the_table_are_dropped_not_clamped():
    step, pool = one_step(seq_lens=[5, 1, LENGTH + 3, 0, 0])
    assert written(step, pool) == 5 + 1 + 4


@pytest.mark.parametrize("first", [0, 40])
def test_a_negative_entry_of_a_table_is_no_page(first):
    """Added to a layer's first block it would be a page of the layer before."""
    tables = np.array(make_traffic(4).steps[0].metadata.block_tables)
    tables[2, 1] = -1  # tokens 4 .. 6 of the third sequence
    step, pool = one_step(block_tables=tables)
    assert written(step, pool, first) == 13 - 3


def test_metadata_passes_through_jit_as_a_pytree():
    metadata = make_traffic(4, flat=True).steps[0].metadata
    back = jax.jit(lambda m: m._replace(seq_lens=m.seq_lens + 1))(metadata)
    assert type(back) is AttentionMetadata
    np.testing.assert_array_equal(back.seq_lens, metadata.seq_lens + 1)
    assert len(jax.tree.leaves(metadata)) == 5


@pytest.mark.parametrize(("packing", "groups"), [(1, 4), (2, 2), (4, 1)])
def test_the_tpu_layout_is_a_reshape_with_an_inverse(packing, groups):
    array = jnp.arange(3 * 2 * groups * packing * 5).reshape(3, 2, groups, packing, 5)
    pages = ops.from_tpu_layout(array)
    assert pages.shape == (3, 2, 4, 5)
    # Row c of a token is (c // packing, c % packing): k0, v0, k1, v1, ...
    for c in range(4):
        np.testing.assert_array_equal(pages[:, :, c], array[:, :, c // packing, c % packing])
    np.testing.assert_array_equal(ops.to_tpu_layout(pages, packing), array)


def test_layouts_refuse_another_rank_or_packing():
    pages = jnp.zeros((3, 2, 6, 5))
    with pytest.raises(ValueError, match=r"5 axes, not those of \(3, 2, 6, 5\)"):
        ops.from_tpu_layout(pages)
    with pytest.raises(ValueError, match=r"4 axes, not those of \(1, 3, 2, 6, 5\)"):
        ops.to_tpu_layout(pages[None], 2)
    with pytest.raises(ValueError, match="6 rows per token are not a multiple of 4"):
        ops.to_tpu_layout(pages, 4)


@pytest.mark.parametrize("shape", [(2 * K - 1, H), (2 * K, H - 1)])
def test_pools_too_narrow_for_the_heads_are_refused(shape):
    step, pool = make_traffic(4).steps[0], make_pool(4, *shape)
    with pytest.raises(ValueError, match="too small for 2 heads of 8"):
        write(pool, step.k, step.v, step.metadata, jnp.int32(0))
    with pytest.raises(ValueError, match="too small for 2 heads of 8"):
        attend(step.q, pool, step.metadata, 0, num_kv_heads=K, window=None, scale=1.0)


DEPTH, BLOCKS, SEQUENCES = 8, 512, 4


def in_carry(pages, q, k, v, metadata):
    """The stack's form: one pool rides in the carry of a scan over layers."""

    def layer(pages, first):
        pages = ops.write_pages(pages, k, v, metadata, first)
        out = ops.paged_attend(q, pages, metadata, first, num_kv_heads=K, window=None, scale=1.0)
        return pages, out

    return jax.lax.scan(layer, pages, BLOCKS * jnp.arange(DEPTH, dtype=jnp.int32))


def stacked_list(layers, q, k, v, metadata):
    """The twin: a pool per layer, stacked for the scan and unstacked after it."""

    def layer(_, pages):
        pages = ops.write_pages(pages, k, v, metadata, 0)
        out = ops.paged_attend(q, pages, metadata, 0, num_kv_heads=K, window=None, scale=1.0)
        return None, (pages, out)

    pages, out = jax.lax.scan(layer, None, jnp.stack(layers))[1]
    return [pages[i] for i in range(DEPTH)], out


def compile_stack(run, dtype=jnp.float32, *, per_sequence=64, donate=True):
    """Compile eight tokens' step over a pool of pages of 16 tokens and heads of 64."""
    shape, tokens = (BLOCKS, 16, 2 * K, 64), 8
    if run is stacked_list:
        pool: Any = [jax.ShapeDtypeStruct(shape, dtype)] * DEPTH
    else:
        pool = jax.ShapeDtypeStruct((DEPTH * shape[0], *shape[1:]), dtype)
    q, kv = (jax.ShapeDtypeStruct((tokens, heads, 64), jnp.float32) for heads in (N, K))
    metadata = AttentionMetadata(
        *(
            jax.ShapeDtypeStruct(size, jnp.int32)
            for size in [(tokens,), (SEQUENCES, per_sequence), (SEQUENCES,), (SEQUENCES + 1,), (3,)]
        )
    )
    return (
        jax.jit(run, donate_argnums=(0,) if donate else ())
        .lower(pool, q, kv, kv, metadata)
        .compile()
    )


def memory_faults(program, dtype=jnp.float32) -> list[str]:
    """The pool is aliased whole, and temporaries are at most a twentieth of it."""
    size = DEPTH * BLOCKS * 16 * 2 * K * 64 * jnp.dtype(dtype).itemsize
    found = program.memory_analysis()
    faults = []
    if found.alias_size_in_bytes != size:
        faults.append(f"{found.alias_size_in_bytes} bytes aliased of {size}")
    if found.temp_size_in_bytes > 0.05 * size:
        faults.append(f"temporaries {found.temp_size_in_bytes} of {size}")
    return faults


@pytest.mark.parametrize("per_sequence", [1, 64])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.uint16])
def test_a_scan_over_layers_writes_the_pool_in_place(dtype, per_sequence):
    """One page per sequence too: a block that is a whole row once made XLA copy a cache."""
    program = compile_stack(in_carry, dtype, per_sequence=per_sequence)
    assert memory_faults(program, dtype) == []


def test_twin_that_stacks_and_unstacks_a_list_fails_the_gate():
    (fault,) = memory_faults(compile_stack(stacked_list))
    assert "temporaries" in fault


def test_twin_without_donation_fails_the_gate():
    assert "0 bytes aliased" in memory_faults(compile_stack(in_carry, donate=False))[0]


def test_a_prefill_reads_pages_not_sequences():
    """Temporaries of a step do not grow with the pages that a table may have."""
    small, large = (
        compile_stack(in_carry, per_sequence=pages).memory_analysis().temp_size_in_bytes
        for pages in (8, 512)
    )
    tables = 4 * SEQUENCES * (512 - 8)
    assert large - small <= 2 * tables


TPU = AbstractDevice(platform="tpu", device_kind="TPU v5 lite", num_cores=1)


def lower_for_tpu(
    head_dim=128, dtype=jnp.float32, *, block=16, lanes=None, window=None, scale=1.0
) -> str:
    """Lower a scan over three layers for a TPU, without one."""
    step = make_traffic(16).steps[0]

    def run(q, pages, metadata):
        def layer(q, first):
            out = ops.paged_attend(
                q, pages, metadata, first,
                num_kv_heads=K, window=window, scale=scale, implementation="tpu",
            )  # fmt: skip
            return out, None

        return jax.lax.scan(layer, q, 8 * jnp.arange(3, dtype=jnp.int32))[0]

    q = jax.ShapeDtypeStruct((TOKENS, N, head_dim), dtype)
    pages = jax.ShapeDtypeStruct((24, block, 2 * K, lanes or head_dim), dtype)
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=TPU)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(run).trace(q, pages, step.metadata)
        return traced.lower(lowering_platforms=("tpu",)).as_text()


def kernel_calls(text: str) -> list[str]:
    return [line for line in text.splitlines() if "custom_call @tpu_custom_call" in line]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("head_dim", [128, 256, 512])
def test_the_kernel_lowers_for_a_tpu_inside_a_scan(head_dim, dtype):
    text = lower_for_tpu(head_dim, dtype)
    (call,) = kernel_calls(text)
    assert "ragged_paged_attention_kernel" in call
    short = {jnp.float32: "f32", jnp.bfloat16: "bf16"}[dtype]
    assert f"tensor<24x16x{2 * K}x{head_dim}x{short}>" in call  # the pool whole, no slice of it
    assert "stablehlo.while" in text


def test_window_and_scale_reach_the_kernel():
    plain = kernel_calls(lower_for_tpu())
    assert plain == kernel_calls(lower_for_tpu())
    assert plain != kernel_calls(lower_for_tpu(window=5))
    assert plain != kernel_calls(lower_for_tpu(scale=0.25))


def test_a_page_longer_than_a_block_of_the_kernel_is_read_alone():
    assert len(kernel_calls(lower_for_tpu(block=4 * paged._KEYS))) == 1


def test_the_kernel_gets_padded_queries_and_the_output_is_cut():
    text = lower_for_tpu(96, lanes=128)
    (call,) = kernel_calls(text)
    assert f"tensor<{TOKENS}x{N}x128xf32>" in call
    assert re.search(rf"slice .*-> tensor<{TOKENS}x{N}x96xf32>", text)


@pytest.mark.slow
@pytest.mark.parametrize(("window", "lanes"), [(None, 128), (5, 256)])
def test_the_kernels_own_reference_gives_the_same(monkeypatch, window, lanes):
    """No TPU is needed for that: jax ships a reference with the kernel's arguments."""

    def kernel(*args, num_kv_pages_per_block, num_queries_per_block, **kwargs):
        q, lengths, tables = args[0], args[2], args[3]
        assert 1 <= num_kv_pages_per_block <= tables.shape[1]
        assert 1 <= num_queries_per_block <= q.shape[0]
        assert lengths.dtype == tables.dtype == jnp.int32
        out = tpu.ref_ragged_paged_attention(*args, **kwargs)
        # The kernel leaves padding as it was in memory.
        rest = jnp.full((q.shape[0] - out.shape[0], *q.shape[1:]), jnp.nan, q.dtype)
        return jnp.concatenate([out, rest])

    monkeypatch.setattr(backend, "tpu_paged_attention", lambda: kernel)
    traffic = make_traffic(4, flat=True)
    # Zeros, as the reference does not hide unwritten memory.
    pool, first, lengths = jnp.zeros_like(make_pool(4, lanes=lanes)), jnp.int32(40), {}
    for step in traffic.steps:
        pool = write(pool, step.k, step.v, step.metadata, first)
        out = ops.paged_attend(
            jnp.asarray(step.q), pool, step.metadata, first,
            num_kv_heads=K, window=window, scale=0.3, implementation="tpu",
        )  # fmt: skip
        expected = whole(step, traffic.k, traffic.v, lengths, window, 0.3)
        np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE)


# (rows per token, lanes, dtype of the pages, K/V heads, what the error says)
IMPOSSIBLE = [
    (6, 128, jnp.float32, 2, "6 rows per token, not the 4 of 2 heads"),
    (4, 64, jnp.float32, 2, "head_dim 64 is not a multiple of 128"),
    (4, 128, jnp.uint16, 2, "queries are float32, pages uint16"),
    (6, 128, jnp.float32, 3, "3 heads of float32 do not fill whole tiles"),
]


def shapes(width, lanes, dtype):
    q = jax.ShapeDtypeStruct((TOKENS, 6, min(lanes, 64)), jnp.float32)
    return (
        q,
        jax.ShapeDtypeStruct((24, 16, width, lanes), dtype),
        make_traffic(16).steps[0].metadata,
    )


@pytest.mark.parametrize(("width", "lanes", "dtype", "heads", "why"), IMPOSSIBLE)
def test_asking_for_the_kernel_where_it_cannot_says_why(width, lanes, dtype, heads, why):
    call = functools.partial(
        ops.paged_attend, first_block=0, num_kv_heads=heads, window=None, scale=1.0
    )
    with pytest.raises(NotImplementedError, match=f'"tpu": {why}'):
        jax.eval_shape(functools.partial(call, implementation="tpu"), *shapes(width, lanes, dtype))


def test_a_jax_without_the_kernel_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, tpu.__name__, None)
    monkeypatch.delattr(sys.modules[tpu.__name__.rpartition(".")[0]], "ragged_paged_attention")
    with pytest.raises(NotImplementedError, match=r"jax [\d.]+ has no ragged_paged_attention"):
        lower_for_tpu()


@pytest.mark.parametrize(
    ("lanes", "backend", "taken"), [(128, "tpu", 1), (64, "tpu", 0), (128, "cpu", 0)]
)
def test_the_default_is_the_kernel_on_a_tpu_where_it_can(monkeypatch, lanes, backend, taken):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    calls = []
    monkeypatch.setattr(paged, "_attend_tpu", lambda q, *rest: calls.append(rest) or q)
    call = functools.partial(
        ops.paged_attend, first_block=0, num_kv_heads=2, window=None, scale=1.0
    )
    out = jax.eval_shape(call, *shapes(4, lanes, jnp.float32))
    assert len(calls) == taken
    assert out.shape == (TOKENS, 6, min(lanes, 64))
