"""Draws against the exact distribution (chi-square), and what each setting does to logits."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gemlax import RequestError, SamplingSettings, sampling
from gemlax.sampling import (
    CANDIDATES,
    Sampling,
    adjust,
    make_sampling,
    sample,
    top_logprobs,
)

VOCAB = 200  # more than CANDIDATES
DRAWS = 8192
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
LOGITS = (np.random.default_rng(1).standard_normal(VOCAB) * 2).astype(np.float32)


def settings(batch: int, vocab: int = VOCAB, **chosen) -> Sampling:
    """Settings with one key per row, made at once."""
    one = make_sampling(vocab, [0], **chosen)
    wide = jax.tree.map(lambda a: jnp.tile(a, (batch,) + (1,) * (a.ndim - 1)), one)
    keys = jax.random.key_data(jax.random.split(jax.random.key(5), batch))
    return wide._replace(key=keys)


def exact(logits, *, temperature, top_k, top_p, min_p):
    """The distribution by sorting, in float64."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")
    keep = np.zeros(len(logits), bool)
    keep[order[: top_k or len(logits)]] = True
    p = np.where(keep, np.exp(scaled - scaled.max()), 0)
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    keep[order] &= before < top_p
    keep[order[0]] = True
    keep &= p >= min_p * p.max()
    p = np.where(keep, p, 0)
    return p / p.sum()


CHOICES = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 5},
    {"top_k": CANDIDATES},
    {"top_k": CANDIDATES + 40},
    {"top_p": 0.5},
    {"top_p": 0.5, "top_k": 40},
    {"min_p": 0.05},
    {"min_p": 0.05, "top_k": 30},
    {"temperature": 0.8, "top_k": 64, "top_p": 0.95},
    {"temperature": 1.3, "top_k": 100, "top_p": 0.8, "min_p": 0.02},
]


@pytest.mark.parametrize("chosen", CHOICES, ids=str)
def test_draws_follow_the_exact_distribution(chosen):
    chosen = OFF | chosen
    logits = jnp.tile(jnp.asarray(LOGITS), (DRAWS, 1))
    tokens = np.asarray(sample(logits, settings(DRAWS, **chosen), jnp.zeros(DRAWS, jnp.int32)))
    counts = np.bincount(tokens, minlength=VOCAB)
    p = exact(LOGITS, **chosen)
    assert counts[p == 0].sum() == 0
    assert p_value(counts, p) > 1e-3
    # The gate's twin: a distribution at another temperature is told apart.
    assert (
        p_value(counts, exact(LOGITS, **chosen | {"temperature": chosen["temperature"] * 1.3}))
        < 1e-6
    )


def p_value(counts, p):
    """Chi-square over ids that are expected at least five times; the rest as one class."""
    expected = p * counts.sum()
    big = expected >= 5
    seen = np.append(counts[big], counts[~big].sum())
    wanted = np.append(expected[big], expected[~big].sum())
    used = wanted > 0
    seen, wanted = seen[used], wanted[used]
    return stats.chi2.sf(((seen - wanted) ** 2 / wanted).sum(), len(seen) - 1)


EDGES = [
    {"top_p": 0.0},
    {"top_p": 1e-30},
    {"top_p": 1e-6},
    {"top_p": 0.3},
    {"top_p": 0.999},
    {"min_p": 1.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": VOCAB},
    {"top_k": 10 * VOCAB},
    {"top_k": 70, "top_p": 1e-6},
    {"temperature": 1e-8},
    {"temperature": 1e-30, "top_p": 0.9},
    {"temperature": 1e30, "top_p": 0.9},
]


@pytest.mark.parametrize("chosen", EDGES, ids=str)
@pytest.mark.parametrize("logits", [LOGITS, np.round(LOGITS)], ids=["all differ", "ties"])
def test_what_is_kept_at_the_edges_is_what_numpy_keeps(logits, chosen):
    chosen = OFF | chosen
    want = exact(logits, **chosen) > 0
    made = settings(1, **chosen)
    kept = np.isfinite(sampling._narrow(sampling._scale(jnp.asarray(logits)[None], made), made))[0]
    np.testing.assert_array_equal(np.flatnonzero(kept & (want | ~tiny_mass(logits, chosen))),
                                  np.flatnonzero(want))  # fmt: skip
    draws = sample(jnp.tile(jnp.asarray(logits), (64, 1)), settings(64, **chosen),
                   jnp.zeros(64, jnp.int32))  # fmt: skip
    assert want[np.asarray(draws)].all()


def tiny_mass(logits, chosen):
    """Where float64 has a probability that is 0 in float32: nothing can be drawn there."""
    return (logits - logits.max()).astype(np.float64) / chosen["temperature"] < -80


def test_the_first_of_equal_logits_comes_where_little_is_kept():
    logits = np.zeros(VOCAB, np.float32)
    logits[[30, 31, 90]] = 4.0
    for chosen in ({"top_p": 0.0}, {"top_p": 1e-6}, {"top_k": 1}, {"top_k": 1, "min_p": 1.0}):
        drawn = sample(jnp.tile(jnp.asarray(logits), (64, 1)), settings(64, **OFF | chosen),
                       jnp.zeros(64, jnp.int32))  # fmt: skip
        np.testing.assert_array_equal(drawn, 30)


def test_a_temperature_that_a_cpu_counts_as_zero_takes_the_likeliest():
    logits = jnp.tile(jnp.asarray(LOGITS), (64, 1))
    for chosen in ({"temperature": 1e-40}, {"temperature": 1e-40, "top_k": 9}):
        drawn = sample(logits, settings(64, **OFF | chosen), jnp.zeros(64, jnp.int32))
        np.testing.assert_array_equal(drawn, int(LOGITS.argmax()))


def test_temperature_zero_takes_the_likeliest_and_a_tiny_one_agrees():
    logits = jnp.tile(jnp.asarray(LOGITS), (64, 1))
    step = jnp.zeros(64, jnp.int32)
    for chosen in (
        {"temperature": 0.0},
        {"temperature": 1e-30},
        {"temperature": 1e-30, "top_k": 9},
    ):
        tokens = sample(logits, settings(64, **OFF | chosen), step)
        np.testing.assert_array_equal(tokens, int(LOGITS.argmax()))


@pytest.mark.parametrize("chosen", [{"top_k": 5}, {}, {"top_p": 0.9}], ids=str)
def test_a_greedy_row_among_others_takes_the_likeliest(chosen):
    logits = jnp.tile(jnp.asarray(LOGITS) / 100, (64, 1))
    mixed = settings(64, **OFF | chosen)
    mixed = mixed._replace(temperature=mixed.temperature.at[::2].set(0.0))
    tokens = np.asarray(sample(logits, mixed, jnp.zeros(64, jnp.int32)))
    assert (tokens[::2] == LOGITS.argmax()).all()
    assert len(set(tokens[1::2].tolist())) > 3


def test_a_row_draws_the_same_whatever_its_batch():
    logits = jnp.asarray(np.random.default_rng(2).standard_normal((4, VOCAB)), jnp.float32)
    step = jnp.arange(4, dtype=jnp.int32)
    for chosen in ({"temperature": 1.0, "top_k": 40}, {"temperature": 1.0, "top_p": 0.9}):
        together = sample(logits, make_sampling(VOCAB, [7, 8, 9, 10], **chosen), step)
        for row in range(4):
            alone = make_sampling(VOCAB, [7 + row], **chosen)
            only = sample(logits[row : row + 1], alone, step[row : row + 1])
            assert int(only[0]) == int(together[row])


def test_draws_differ_from_step_to_step_and_seed_to_seed():
    logits = jnp.zeros((512, VOCAB), jnp.float32)
    same_seed = make_sampling(VOCAB, [3] * 512)
    by_step = sample(logits, same_seed, jnp.arange(512, dtype=jnp.int32))
    assert len(set(np.asarray(by_step).tolist())) > 100
    at_zero = sample(logits, same_seed, jnp.zeros(512, jnp.int32))
    assert len(set(np.asarray(at_zero).tolist())) == 1


def penalised(history, prompt, length, logits=LOGITS, **chosen):
    """The adjusted logits of one row: `prompt` tokens and then output, up to `length`."""
    ends = (jnp.asarray([n], jnp.int32) for n in (prompt, length))
    made = settings(1, len(logits), **chosen)
    out = adjust(jnp.asarray(logits)[None], made, jnp.asarray([history], jnp.int32), *ends)
    return np.asarray(out)[0]


def test_repetition_penalty_divides_or_multiplies_once_in_prompt_and_output():
    up, down = int(LOGITS.argmax()), int(LOGITS.argmin())  # one is divided, one multiplied
    history = [up, down, up, VOCAB]
    out = penalised(history, 1, 3, repetition_penalty=1.5)
    want = LOGITS.copy()
    assert want[up] > 0 > want[down]
    for token in (up, down):
        want[token] = want[token] / 1.5 if want[token] > 0 else want[token] * 1.5
    np.testing.assert_allclose(out, want, rtol=1e-6)


def test_presence_counts_once_and_frequency_each_time_in_the_output_alone():
    history = [4, 9, 9, 11, VOCAB]
    out = penalised(history, 1, 4, presence_penalty=0.5, frequency_penalty=0.25)
    want = LOGITS.copy()
    want[9] -= 0.5 + 2 * 0.25
    want[11] -= 0.5 + 0.25
    np.testing.assert_allclose(out, want, rtol=1e-5)


def test_bias_adds_and_minus_infinity_forbids():
    out = penalised([4], 1, 1, logit_bias={3: 2.5, 8: -np.inf})
    want = LOGITS.copy()
    want[3] += 2.5
    want[8] = -np.inf
    np.testing.assert_allclose(out, want, rtol=1e-6)


def test_more_bias_than_one_bucket_is_kept():
    bias = {i: float(i) for i in range(60)}
    np.testing.assert_allclose(
        penalised([4], 1, 1, logit_bias=bias)[:60], LOGITS[:60] + np.arange(60), rtol=1e-5
    )


def test_no_n_tokens_come_twice_whatever_their_number():
    history = [5, 9, 7, 5, 9, 8, 5, 9, VOCAB, VOCAB]
    follow = {1: {5, 9, 7, 8}, 2: {7, 8}, 3: {7, 8}, 4: set(), 8: set(), 20: set()}
    for size, forbidden in follow.items():
        out = penalised(history, 4, 8, no_repeat_ngram_size=size)
        assert set(np.flatnonzero(np.isinf(out)).tolist()) == forbidden, size
    assert np.isfinite(penalised([5, VOCAB], 1, 1, no_repeat_ngram_size=3)).all()


def test_a_sequence_is_biased_where_its_beginning_comes_last():
    history = [4, 9, 8, 11, VOCAB, VOCAB]
    bias = {(8, 11, 3): 2.0, (11, 5): -np.inf, (9, 11, 6): 3.0, (7,): 0.5, (1, 4, 9, 8, 11, 2): 9.0}
    out = penalised(history, 2, 4, sequence_bias=bias)
    want = LOGITS.copy()
    want[3] += 2
    want[5] = -np.inf
    want[7] += 0.5
    np.testing.assert_allclose(out, want, rtol=1e-6)


def test_more_and_longer_sequences_than_a_bucket_are_kept():
    bias = {(9, i): float(i + 1) for i in range(40)} | {(*range(12, 30), 50): 5.0}
    out = penalised([*range(12, 30), VOCAB], 2, 18, sequence_bias=bias)
    np.testing.assert_allclose(out[50], LOGITS[50] + 5, rtol=1e-6)
    out = penalised([9, VOCAB], 1, 1, sequence_bias=bias)
    np.testing.assert_allclose(out[:40], LOGITS[:40] + np.arange(1, 41), rtol=1e-5)


def test_a_held_id_comes_when_the_output_is_long_enough():
    history = [4, 9, 8, VOCAB]
    for length, forbidden in ((1, {3, 8}), (2, {3}), (3, set())):
        out = penalised(history, 1, length, forbidden_until={3: 2, 8: 1})
        assert set(np.flatnonzero(np.isinf(out)).tolist()) == forbidden


def test_each_row_holds_back_as_long_as_it_is_told():
    made = make_sampling(VOCAB, [0, 1], forbidden_until={3: [0, 5]})
    ends = jnp.asarray([1, 1], jnp.int32)
    out = adjust(jnp.tile(jnp.asarray(LOGITS), (2, 1)), made, jnp.full((2, 4), 7, jnp.int32), ends,
                 ends)  # fmt: skip
    np.testing.assert_array_equal(np.isinf(out).sum(axis=-1), [0, 1])


@pytest.mark.parametrize("chosen", [
    {"no_repeat_ngram_size": 1}, {"sequence_bias": {(i,): -np.inf for i in range(4)}},
    {"forbidden_until": dict.fromkeys(range(4), 9)},
    {"no_repeat_ngram_size": 1, "logit_bias": {2: -np.inf}},
], ids=str)  # fmt: skip
def test_where_nothing_is_left_the_row_is_free_for_a_token(chosen):
    logits = np.asarray([1.0, 3.0, 5.0, 2.0], np.float32)
    out = penalised([0, 1, 2, 3, 4], 2, 4, logits=logits, **chosen)
    best = 1 if "logit_bias" in chosen else 2
    assert int(np.argmax(out)) == best and not np.isnan(out).any()
    drawn = sample(jnp.asarray(out)[None], settings(1, 4), jnp.zeros(1, jnp.int32))
    assert int(drawn[0]) < 4


def test_a_bias_that_forbids_every_token_is_refused():
    with pytest.raises(RequestError, match="all 4 tokens are forbidden"):
        make_sampling(4, [0], logit_bias=dict.fromkeys(range(4), -np.inf))
    everywhere = penalised([4], 1, 1, logit_bias=dict.fromkeys(range(VOCAB), 1e300))
    assert np.isfinite(everywhere).all()


def test_top_logprobs_are_those_of_the_softmax():
    logits = jnp.asarray(LOGITS)[None]
    own, ids, values = top_logprobs(logits, jnp.asarray([17], jnp.int32))
    want = LOGITS.astype(np.float64) - np.log(np.exp(LOGITS.astype(np.float64)).sum())
    np.testing.assert_allclose(own[0], want[17], rtol=1e-5)
    np.testing.assert_array_equal(ids[0], np.argsort(-want)[:20])
    np.testing.assert_allclose(values[0], np.sort(want)[::-1][:20], rtol=1e-5)


def rows_of_logits(kind: str) -> np.ndarray:
    rng = np.random.default_rng(4)
    normal = rng.standard_normal((3, 16_384)).astype(np.float32)
    if kind == "ties":
        return np.round(normal * 2) / 2
    if kind == "one block":
        normal[:, 512:600] += 9
    if kind == "infinities":
        normal[:, rng.integers(0, 16_384, 16_300)] = -np.inf
        normal[0, 700] = np.inf
    if kind == "nan":
        normal[1, [900, 77, 5000]] = np.nan
    return normal


@pytest.mark.parametrize("kind", ["normal", "ties", "one block", "infinities", "nan"])
def test_arg_max_and_top_k_by_blocks_are_the_plain_ones(kind):
    logits = rows_of_logits(kind)
    np.testing.assert_array_equal(sampling._arg_max(jnp.asarray(logits)), logits.argmax(-1))
    if kind == "nan":  # what lax.top_k makes of NaN is not defined
        return
    best, ids = sampling._top_k(jnp.asarray(logits), 64)
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :64]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(best, np.take_along_axis(logits, order, -1))


def sorted_widths(function, *given) -> list[int]:
    """The row lengths that a program sorts, or takes the best of by a library call."""
    text = jax.jit(function).lower(*given).compile().as_text()
    lines = [line for line in text.splitlines() if " sort(" in line or '"TopK"' in line]
    return [int(n) for line in lines for n in re.findall(r"\[1,(\d+)\]", line)]


def test_nothing_sorts_the_vocabulary():
    vocab = 262_144
    logits = jnp.zeros((1, vocab), jnp.float32)
    step = jnp.zeros(1, jnp.int32)
    widths = sorted_widths(sample, logits, make_sampling(vocab, [0]), step)
    assert widths and max(widths) <= 4096
    widths = sorted_widths(top_logprobs, logits, step)
    assert widths and max(widths) <= 4096

    def twin(logits):  # XLA finds its TopK no more when a slice of it is wanted
        best, ids = jax.lax.top_k(logits, 64)
        return best * 2, ids, ids[:, 0]

    assert max(sorted_widths(twin, logits)) == vocab


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"temperature": -0.1}, "temperature must be a finite number in [0, inf), got -0.1"),
        ({"temperature": float("nan")}, "temperature must be a finite number"),
        ({"temperature": float("inf")}, "temperature must be a finite number"),
        ({"temperature": 1e300}, "temperature must be a finite number"),
        ({"top_p": -0.1}, "top_p must be a finite number in [0, 1], got -0.1"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"min_p": -1}, "min_p"),
        ({"min_p": "much"}, "min_p"),
        ({"top_k": -2}, "top_k must be an integer >= -1 (0 or -1 turns it off), got -2"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"temperature": True}, "temperature"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be an integer >= 0"),
        ({"no_repeat_ngram_size": 2.0}, "no_repeat_ngram_size"),
        ({"sequence_bias": {(3,): float("nan")}}, "sequence_bias[(3,)] must be a number"),
        ({"logit_bias": {True: 1.0}}, "logit_bias: id True"),
        ({"logit_bias": {3.0: 1.0}}, "logit_bias: id 3.0"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": float("inf")}, "presence_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"logit_bias": {VOCAB: 1.0}}, f"logit_bias: id {VOCAB} is outside [0, {VOCAB})"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias[3] must be a number"),
        ({"logit_bias": {3: float("inf")}}, "logit_bias[3]"),
    ],
    ids=str,
)
def test_a_setting_outside_its_range_is_named(chosen, said):
    with pytest.raises(RequestError) as error:
        if set(chosen) <= {field.name for field in dataclasses.fields(SamplingSettings)}:
            SamplingSettings(**chosen)
        make_sampling(VOCAB, [0], **chosen)
    assert said in str(error.value)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True])
def test_a_seed_outside_its_range_is_named(seed):
    with pytest.raises(RequestError, match="seed must be an integer"):
        SamplingSettings(seed=seed)


def test_the_key_of_a_seed_is_that_of_jax():
    seeds = [0, 7, 2**32 - 1]
    keys = [jax.random.key_data(jax.random.key(np.uint32(s), impl="threefry2x32")) for s in seeds]
    np.testing.assert_array_equal(make_sampling(VOCAB, seeds).key, np.stack(keys))


def test_a_row_that_does_not_run_asks_for_nothing_and_the_others_keep_what_they_ask():
    chosen = {"temperature": 0.7, "repetition_penalty": 1.3, "presence_penalty": 0.2,
              "frequency_penalty": 0.1, "no_repeat_ngram_size": 2, "top_k": 4,
              "sequence_bias": {(3, 4): -1.0}, "forbidden_until": {1: 3}}  # fmt: skip
    asked = make_sampling(VOCAB, [0, 1], **chosen)
    found = asked.quiet(jnp.array([True, False]))
    free = make_sampling(VOCAB, [0], temperature=0.0)
    for name in ("temperature", "repetition_penalty", "presence_penalty", "frequency_penalty",
                 "no_repeat_ngram_size"):  # fmt: skip
        assert found._asdict()[name][1] == free._asdict()[name][0], name
    assert not found.sequence_bias[1].any()
    assert not found.held_until[1].any()
    for array, given in zip(found.row(0), asked.row(0), strict=True):
        np.testing.assert_array_equal(array, given)
