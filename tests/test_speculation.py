"""Drafts from the text so far: what is proposed, and that nothing but speed changes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import build
from golden.conditioned import conditioned_weights
from scipy import stats
from test_generate import CONFIG, assert_greedy, prompts, toy_tokenizer

from gemlax import Model, RequestError, cache, generate, ops, speculation
from gemlax.config import TextConfig
from gemlax.names import text_weights
from gemlax.sampling import make_sampling
from gemlax.speculation import Drafting, Drafts

VOCAB = 512
D = 3
LONG = 1040  # tokens: longer than a ring, and in the bucket of what is generated
# Places, mod 20, of wrong drafts: steps of 1, 1, 2, 3, 4, 5 and 4 tokens, where four are drafted.
WRONG = (0, 1, 3, 6, 10)


# --- what is proposed --------------------------------------------------------------------------


def reference(row: list[int], room: int, most: int) -> list[int]:
    """The same by slices of lists."""
    for n in (3, 2):
        for end in range(len(row) - 2, n - 2, -1):
            if row[end - n + 1 : end + 1] == row[-n:]:
                followed = row[end + 1 :]
                return (followed * most)[: min(most, room)]
    return []


def padded(rows: list[list[int]], size: int = 24):
    tokens = np.full((len(rows), size), VOCAB, np.int32)
    for at, row in zip(tokens, rows, strict=True):
        at[: len(row)] = row
    return jnp.asarray(tokens), jnp.asarray([len(row) for row in rows], jnp.int32)


propose = jax.jit(speculation.propose, static_argnums=3)


def proposed(rows, room=None, most=8):
    tokens, lengths = padded(rows)
    room = [most] * len(rows) if room is None else room
    drafts = propose(tokens, lengths, jnp.asarray(room, jnp.int32), most)
    return [row[:count].tolist() for row, count in zip(*map(np.asarray, drafts), strict=True)]


@pytest.mark.parametrize(
    ("row", "draft"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], [4, 5, 1, 2, 3, 4, 5, 1]),  # goes on after its own end
        ([7, 2, 3, 4, 9, 2, 3], [4, 9, 2, 3, 4, 9, 2, 3]),  # two tokens
        ([1, 2, 3, 5, 8, 2, 3, 6, 1, 2, 3], [5, 8, 2, 3, 6, 1, 2, 3]),  # three before two
        ([2, 3, 5, 2, 3, 6, 2, 3], [6, 2, 3, 6, 2, 3, 6, 2]),  # the last of several
        ([4, 4, 4], [4] * 8),  # an occurrence may overlap
        ([1, 2, 3, 4, 5], []),
        ([5, 1, 2, 3, 5], []),  # one token is not enough
        ([5, 5], []),
        ([5], []),
    ],
    ids=str,
)
def test_drafts_are_what_followed_the_last_tokens_before(row, draft):
    assert proposed([row]) == [draft]
    assert reference(row, 8, 8) == draft


def test_drafts_of_random_rows_are_those_of_the_reference():
    random = np.random.default_rng(3)
    rows = [random.integers(0, 4, random.integers(1, 25)).tolist() for _ in range(64)]
    room = random.integers(0, 10, 64).tolist()
    expected = [reference(row, r, 8) for row, r in zip(rows, room, strict=True)]
    assert proposed(rows, room) == expected
    assert sum(bool(draft) for draft in expected) > 20


def test_a_row_without_room_drafts_no_more_than_fits():
    row = [1, 2, 3, 4, 5, 1, 2, 3]
    assert proposed([row] * 3, [0, 2, 9]) == [[], [4, 5], [4, 5, 1, 2, 3, 4, 5, 1]]


# --- when it is tried --------------------------------------------------------------------------


def drafts(*counts, most=D):
    return Drafts(jnp.zeros((len(counts), most), jnp.int32), jnp.asarray(counts, jnp.int32))


@pytest.mark.parametrize(
    ("counts", "done", "tried"),
    [
        ([0], [False], False),
        ([3], [False], True),
        ([1], [False], True),  # saves as much as it takes: 1 * 3 / (1 + 2)
        ([3, 0], [False, False], True),  # 3 of 2 * 2 * 3 / (2 + 2)
        ([3, 0, 0, 0], [False] * 4, False),
        ([3, 3, 3, 0], [False] * 4, True),
        ([3, 0, 0, 0], [False, True, True, True], True),
    ],
    ids=str,
)
def test_a_long_step_is_taken_where_it_may_pay_for_all_rows(counts, done, tried):
    assert bool(speculation.worthwhile(drafts(*counts), jnp.asarray(done))) == tried


def test_a_row_whose_drafts_are_wrong_loses_a_fiftieth_of_its_steps():
    drafting: Drafting = jax.tree.map(jnp.asarray, speculation.start(1))
    wanted, tries, steps = drafts(D), 0, 500
    for _ in range(steps):
        tried = bool(speculation.afford(wanted, drafting).counts[0])
        tries += tried
        drafting = speculation.account(drafting, wanted, jnp.asarray(tried), jnp.asarray([1]))
    # Each costs a step; one and a half are granted, the others wait for their income.
    assert 2 <= tries <= 2 + 0.02 * steps
    assert int(drafting.steps[0]) == steps


def test_right_drafts_are_saved_up_to_a_limit_and_done_rows_run_no_step():
    drafting: Drafting = jax.tree.map(jnp.asarray, speculation.start(2))
    for _ in range(20):
        drafting = speculation.account(
            drafting, drafts(D, 0), jnp.asarray(True), jnp.asarray([D + 1, 0])
        )
    assert drafting.budget.tolist() == pytest.approx([2.0, 1.4 + 0.0], abs=1e-5)
    assert drafting.steps.tolist() == [20, 0]


# --- that nothing changes ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    """A toy that loops: its own embeddings make the last tokens likely again."""
    weights = conditioned_weights("test_speculation", text_weights(CONFIG.text))
    return Model(CONFIG, build(CONFIG, weights, "index"), toy_tokenizer())


def repeating(*lengths, period=7):
    """Prompts that repeat a few tokens, so that there is always something to draft."""
    return [([2, *prompt[1:period]] * length)[:length] for prompt, length in
            zip(prompts(*[40] * len(lengths)), lengths, strict=True)]  # fmt: skip


def right_drafts(monkeypatch, path):
    """Draft what `path` says comes next: right, but at some places."""

    def oracle(tokens, lengths, room, most):
        at = lengths[:, None] + jnp.arange(most, dtype=jnp.int32)[None]
        known = jnp.take(jnp.asarray(path, jnp.int32), at, mode="clip")
        wrong = jnp.isin(at % 20, jnp.asarray(WRONG, jnp.int32))
        known = jnp.where(wrong, (known + 1) % 500, known)
        return Drafts(known, jnp.clip(room, 0, most))

    monkeypatch.setattr(speculation, "propose", oracle)
    monkeypatch.setattr(speculation, "afford", lambda drafts, drafting: drafts)
    monkeypatch.setattr(speculation, "worthwhile", lambda drafts, done: jnp.any(drafts.counts > 0))


SETTINGS = [
    {},
    {"temperature": 1.0, "top_k": 40, "seed": 3},
    {"temperature": 1.3, "top_p": 0.9, "min_p": 0.01, "seed": 4},
    {"temperature": 0.8, "top_k": 9, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"presence_penalty": 0.7, "frequency_penalty": 0.3, "logit_bias": {300: 5.0, 301: -np.inf}},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_ragged_batch_says_what_it_says_without_drafts(model, settings):
    """Samples too: each token is drawn with the key of its place, drafted or not."""
    some = repeating(30, 9, 21)
    settings = {"max_new_tokens": 24, "logprobs": 3, **settings}
    plain = model.generate(some, **settings)
    found = model.generate(some, speculate=D, **settings)
    for prompt, a, b in zip(some, plain, found, strict=True):
        if not settings.get("temperature") and a.tokens != b.tokens:
            assert_greedy(model, prompt, b.tokens)  # they part at a near tie
            continue
        assert (b.tokens, b.text, b.finish_reason) == (a.tokens, a.text, a.finish_reason)
        for one, other in zip(a.logprobs, b.logprobs, strict=True):
            assert other.logprob == pytest.approx(one.logprob, abs=1e-3)
            assert list(other.top.values()) == pytest.approx(list(one.top.values()), abs=1e-3)
        assert a.accepted_per_step is None
        assert 0 <= b.accepted_per_step <= D


@pytest.fixture(scope="module")
def oracle(model):
    """A prompt that fills its rings, its continuation, and an engine whose drafts are those.

    Some are wrong, so that all numbers of accepted drafts come up.
    """
    (prompt,) = prompts(LONG)
    (plain,) = model.generate([prompt], max_new_tokens=60, logprobs=0)
    drafted = Model(model.config, model.decoder, model.tokenizer)  # has compiled nothing
    with pytest.MonkeyPatch.context() as patch:
        right_drafts(patch, [*prompt, *plain.tokens])
        drafted.generate([prompt], max_new_tokens=1, logprobs=0, speculate=4)
    programs = drafted.engine.counters.programs
    yield prompt, plain, drafted
    assert drafted.engine.counters.programs == programs


def test_rejected_drafts_leave_no_trace_in_caches_and_rings(oracle, model):
    prompt, plain, drafted = oracle
    (found,) = drafted.generate([prompt], max_new_tokens=60, logprobs=0, speculate=4)
    assert found.tokens == plain.tokens
    for one, other in zip(plain.logprobs, found.logprobs, strict=True):
        assert other.logprob == pytest.approx(one.logprob, abs=1e-4)
    assert 1 < found.accepted_per_step < 4


def test_after_each_step_caches_hold_all_but_the_last_token_and_no_draft(oracle):
    prompt, _, drafted = oracle
    request = drafted._request([prompt], {"max_new_tokens": 60, "speculate": 4, "logprobs": 0})
    seen = []
    for rows in request.run(itertools.repeat(1)):
        caches, kept = rows.state.caches, rows.lengths - 1
        assert {type(held) for held in caches.values()} == {cache.DenseCache, cache.RingCache}
        for held in caches.values():
            assert int(held.positions.max()) == kept[0] - 1
        assert cache.holds(drafted.config.text, caches, kept).tolist() == [True]
        seen.append(int(rows.lengths[0]))
    assert set(np.diff(seen).tolist()) == {1, 2, 3, 4, 5}


def test_a_stop_id_inside_a_draft_ends_the_row_there(oracle):
    prompt, plain, drafted = oracle
    places = {token: i for i, token in reversed(list(enumerate(plain.tokens)))}
    # The first place of some token, with right drafts on both sides of it.
    stop, at = next((t, i) for t, i in places.items() if i > 2 and (LONG + i) % 20 in (12, 13, 14))
    (found,) = drafted.generate(
        [prompt], max_new_tokens=60, logprobs=0, speculate=4, stop_ids=[stop]
    )
    assert found.tokens == plain.tokens[: at + 1]
    assert found.finish_reason == "stop"


def test_output_ends_at_its_limits_whatever_is_drafted(oracle):
    prompt, plain, drafted = oracle
    for new in (1, 2, 3, 4, 7):
        settings = {"logprobs": 0, "speculate": 4}
        (found,) = drafted.generate([prompt], max_new_tokens=new, **settings)
        assert found.tokens == plain.tokens[:new]
        (found,) = drafted.generate([prompt], max_new_tokens=60, context=LONG + new, **settings)
        assert found.tokens == plain.tokens[:new]


def test_a_ring_too_short_for_the_drafts_is_refused_and_the_shortest_loses_nothing(model):
    """Slots of a window and a chunk, less one: a rejected draft takes no place that is seen."""
    config = model.config.text
    (sliding,) = {spec for spec in config.layers if spec.window}
    window = sliding.window
    chunk = 16 - (window - 1) % 16 % 16  # a ring without a slot to spare
    assert sliding.cache_slots(1024, chunk) == window + chunk - 1
    caches = cache.new_caches(config, 1, 1024, "float32", chunk=chunk)
    at = jnp.arange(200, dtype=jnp.int32)[None]
    for begin in range(0, 192, 8):
        caches = cache.mark(caches, at[:, begin : begin + 8])
    for begin in range(192, 200):  # a step from `begin` whose drafts are all rejected
        steps = begin + jnp.arange(chunk, dtype=jnp.int32)[None]
        after = cache.rollback(cache.mark(caches, steps), np.array([begin + 1]))
        assert cache.holds(config, after, np.array([begin + 1])).tolist() == [True]
        longer = begin + jnp.arange(chunk + 1, dtype=jnp.int32)[None]
        lost = cache.rollback(cache.mark(caches, longer), np.array([begin + 1]))
        assert cache.holds(config, lost, np.array([begin])).tolist() == [False]
        with pytest.raises(ValueError, match="tokens at a time"):
            caches["sliding_attention"].layer(0, longer, sliding, None)
        caches = cache.mark(caches, at[:, begin : begin + 1])


# --- samples -----------------------------------------------------------------------------------


class Fixed:
    """A decoder whose logits after token t are row t of a table, plus what position adds."""

    def __init__(self, vocab: int):
        table = np.random.default_rng(8).standard_normal((vocab, vocab)) * 1.5
        self.config = None
        self.table = jnp.asarray(table, jnp.float32)

    def __call__(self, tokens, positions, caches, *, cache_rows=None):
        return jax.nn.one_hot(tokens, len(self.table)), caches

    def logits(self, hidden):
        return hidden @ self.table


def test_two_sampled_tokens_have_the_distribution_of_the_model():
    """8,192 rows of a vocabulary of 6, half with drafts: chi-square over all pairs."""
    vocab, batch, fixed = 6, 8192, Fixed(6)
    row = [0, 1, 2, 4, 5, 0, 1]  # 2 and 4 are drafted
    tokens = jnp.tile(jnp.asarray([[*row, *[vocab] * 9]], jnp.int32), (batch, 1))
    settings = jax.tree.map(
        lambda a: jnp.tile(a, (batch,) + (1,) * (a.ndim - 1)),
        make_sampling(1, vocab, [0], temperature=1.0, top_k=5, frequency_penalty=0.9),
    )
    settings = settings._replace(
        key=jax.random.key_data(jax.random.split(jax.random.key(5), batch))
    )
    full = functools.partial(jnp.full, (batch,), dtype=jnp.int32)
    limits = generate.Limits(full(7), full(10), jnp.full(16, -1, jnp.int32))
    program = generate._Program(fixed, vocab, None, limits, settings)
    state = generate.DecodeState({}, tokens, full(7), jnp.zeros(batch, bool))
    room = jnp.where(jnp.arange(batch) % 2 == 0, 2, 0)
    drafts = speculation.propose(tokens, state.lengths, room, 2)
    assert drafts.tokens[0].tolist() == [2, 4]
    step = jax.jit(functools.partial(generate._step, program))
    new = jax.jit(lambda s: generate._verify(program, drafts, s))(state)
    again = step(new)
    while bool(jnp.any(again.lengths < 9)):
        again = step(again._replace(done=again.lengths >= 9))
    pairs = np.asarray(again.tokens)[:, 7:9]
    expected = pair_distribution(np.asarray(fixed.table, np.float64))
    for half in (pairs[::2], pairs[1::2]):
        counts = np.bincount(half[:, 0] * vocab + half[:, 1], minlength=vocab**2)
        assert p_value(counts, expected) > 1e-3
        wrong = pair_distribution(np.asarray(fixed.table, np.float64), penalty=0.0)
        assert p_value(counts, wrong) < 1e-6  # the gate tells another distribution apart
    accepted = np.asarray(new.lengths)[::2] - 8
    assert set(accepted.tolist()) == {0, 1, 2}
    assert set(np.asarray(new.lengths)[1::2].tolist()) == {8}


def pair_distribution(table, penalty=0.9, top=5):
    """The exact distribution of two tokens after token 1."""

    def after(token, counts):
        logits = table[token] - penalty * counts
        logits[np.argsort(logits)[: len(table) - top]] = -np.inf
        p = np.exp(logits - logits.max())
        return p / p.sum()

    first = after(1, np.zeros(len(table)))
    return np.concatenate([first[i] * after(i, np.eye(len(table))[i]) for i in range(len(table))])


def p_value(counts, p):
    big = p * counts.sum() >= 5
    seen = np.append(counts[big], counts[~big].sum())
    wanted = np.append(p[big], p[~big].sum()) * counts.sum()
    used = wanted > 0
    assert not seen[~used].any()
    return stats.chi2.sf(((seen - wanted)[used] ** 2 / wanted[used]).sum(), used.sum() - 1)


# --- forms and fronts --------------------------------------------------------------------------


PLACES = make_sampling(1, 512, [0]).places()


def test_without_drafts_the_program_is_the_one_it_was(model):
    keys = model.engine.counters.keys
    model.generate([[2, 5, 6]], max_new_tokens=3, speculate=0)
    model.generate([[2, 5, 6]], max_new_tokens=3)
    assert keys[-1] == ("decode", 1, 16, *PLACES, False)
    model.generate([[2, 5, 6]], max_new_tokens=3, speculate=2)
    assert keys[-1] == ("decode", 1, 16, *PLACES, False, 2)
    state, _ = model.engine.start([[2, 5, 6]], 3, 100, [1])
    assert state.drafting is None


def test_a_stream_and_a_stop_string_cut_drafted_text_alike(model):
    prompt = "abcabcabcabcab"
    settings = {"max_new_tokens": 24, "temperature": 1.0, "seed": 3}
    free = model.generate(prompt, **settings)
    stream = model.stream(prompt, speculate=D, **settings)
    assert "".join(stream) == free.text == stream.completion.text
    stop = free.text[len(free.text) // 2 :][:3]
    plain = model.generate(prompt, stop=stop, **settings)
    found = model.generate(prompt, stop=stop, speculate=D, **settings)
    assert (found.text, found.tokens) == (plain.text, plain.tokens)
    assert found.finish_reason == "stop"


@pytest.mark.slow
def test_unrolled_layers_and_8_bit_caches_take_drafts_too():
    weights = conditioned_weights("test_speculation", text_weights(CONFIG.text))
    small = Model(CONFIG, build(CONFIG, weights, "unroll"), kv_cache="int8")
    (prompt,) = repeating(30)
    settings = {"max_new_tokens": 16, "temperature": 1.0, "top_k": 20}
    (plain,) = small.generate([prompt], **settings)
    (found,) = small.generate([prompt], speculate=D, **settings)
    assert found.tokens == plain.tokens
    assert found.accepted_per_step is not None


@pytest.mark.parametrize("wrong", [-1, 16, 2.5, True, "3"], ids=str)
def test_a_number_of_drafts_out_of_range_is_named(model, wrong):
    with pytest.raises(RequestError) as error:
        model.generate("abc", speculate=wrong)
    assert f"speculate must be None or in [0, 15] drafts, got {wrong!r}" in str(error.value)


def test_speculation_needs_no_more_tokens_than_the_kernel_takes():
    assert speculation.MOST + 1 == ops.cpu.MAX_ROWS
    assert isinstance(CONFIG.text, TextConfig)
