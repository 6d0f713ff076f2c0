"""Drafts from the text so far: what is proposed, and that nothing but speed changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import build
from caches import can_resume
from golden.conditioned import conditioned_weights
from scipy import stats
from test_generate import CONFIG, assert_greedy, prompts, toy_tokenizer

from gemlax import Model, RequestError, SamplingSettings, cache, ops
from gemlax.config import TextConfig
from gemlax.engine import MAX_DRAFTS, drafts, programs
from gemlax.engine.drafts import Proposer
from gemlax.engine.state import State
from gemlax.names import text_weights
from gemlax.sampling import make_sampling
from gemlax.sharding import Layout

pytestmark = pytest.mark.deep

VOCAB = 512
D = 3
LONG = 1040  # tokens: longer than a ring, and in the bucket of what is generated
# Places, mod 20, of wrong drafts: steps of 1, 1, 2, 3, 4, 5 and 4 tokens, where four are drafted.
WRONG = (0, 1, 3, 6, 10)


def reference(row: list[int], num_drafts: int) -> list[int]:
    """The same by slices of lists."""
    for n in (3, 2):
        for end in range(len(row) - 2, n - 2, -1):
            if row[end - n + 1 : end + 1] == row[-n:]:
                return (row[end + 1 :] * num_drafts)[:num_drafts]
    return []


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
    assert Proposer(row).propose(8) == draft
    assert reference(row, 8) == draft


def test_drafts_of_random_rows_are_those_of_the_reference():
    random = np.random.default_rng(3)
    rows = [random.integers(0, 4, random.integers(1, 25)).tolist() for _ in range(64)]
    room = random.integers(0, 10, 64).tolist()
    expected = [reference(row, r) for row, r in zip(rows, room, strict=True)]
    assert [Proposer(row).propose(r) for row, r in zip(rows, room, strict=True)] == expected
    assert sum(bool(draft) for draft in expected) > 20


@pytest.mark.parametrize(
    ("counts", "tried"),
    [
        ([0], False),
        ([3], True),
        ([1], True),  # saves as much as it takes: 1 * 3 / (1 + 2)
        ([3, 0], True),  # 3 of 2 * 2 * 3 / (2 + 2)
        ([3, 0, 0, 0], False),
        ([3, 3, 3, 0], True),
    ],
    ids=str,
)
def test_a_long_step_is_taken_where_it_may_pay_for_all_rows(counts, tried):
    assert drafts.is_worthwhile(counts, D) == tried


def test_a_row_whose_drafts_are_wrong_loses_a_fiftieth_of_its_steps():
    proposer, tries, steps = Proposer([4, 4, 4]), 0, 500
    for _ in range(steps):
        tried = bool(proposer.propose(D))
        tries += tried
        proposer.account(1, drafts.extra_steps(1, D) if tried else None)
    # Each costs a step; one and a half are granted, the others wait for their income.
    assert 2 <= tries <= 2 + 0.02 * steps


def test_the_time_that_right_drafts_save_is_kept_up_to_a_limit():
    proposer = Proposer([4, 4, 4])
    for _ in range(20):
        proposer.account(D + 1, drafts.extra_steps(1, D))
    assert proposer.budget == pytest.approx(2.0)


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

    def oracle(self, num_drafts):
        places = range(len(self._tokens), min(len(self._tokens) + num_drafts, len(path)))
        return [path[i] if i % 20 not in WRONG else (path[i] + 1) % 500 for i in places]

    monkeypatch.setattr(Proposer, "propose", oracle)
    monkeypatch.setattr(drafts, "is_worthwhile", lambda counts, num_drafts: sum(counts) > 0)


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
def known(model):
    """A prompt that fills its rings, and its continuation."""
    (prompt,) = prompts(LONG)
    (plain,) = model.generate([prompt], max_new_tokens=60, logprobs=0)
    return prompt, plain


@pytest.fixture
def oracle(model, known, monkeypatch):
    """A prompt, its continuation, and a model whose drafts are those, some of them wrong.

    So all numbers of accepted drafts come up. One program serves them all.
    """
    prompt, plain = known
    right_drafts(monkeypatch, [*prompt, *plain.tokens])
    yield prompt, plain, model
    shapes = {key[-2:] for key in model.programs.compiled if key[0] == "verify"}
    assert len([shape for shape in shapes if shape == (4, True)]) <= 1


def test_rejected_drafts_leave_no_trace_in_caches_and_rings(oracle, model):
    prompt, plain, drafted = oracle
    (found,) = drafted.generate([prompt], max_new_tokens=60, logprobs=0, speculate=4)
    assert found.tokens == plain.tokens
    for one, other in zip(plain.logprobs, found.logprobs, strict=True):
        assert other.logprob == pytest.approx(one.logprob, abs=1e-4)
    assert 1 < found.accepted_per_step < 4


def test_after_each_step_caches_hold_all_but_the_last_token_and_no_draft(oracle):
    prompt, plain, model = oracle
    settings = SamplingSettings(max_new_tokens=60, speculate=4, logprobs=0)
    (request,) = model.requests([prompt], settings).requests
    engine, seen, length = model._engine(1, request), set(), len(prompt)
    engine.submit(request)
    while engine.num_running or engine.num_waiting:
        events = engine.step(1)
        if not events:  # a chunk of the prompt
            continue
        seen.add(len(events[0].tokens))
        length += len(events[0].tokens)
        caches, kept = engine._state.caches, np.array([length - 1])
        assert {stack.is_ring for stack in caches.values()} == {False, True}
        for held in caches.values():
            assert int(held.positions.max()) == kept[0] - 1
        assert can_resume(model.config.text, caches, kept).tolist() == [True]
    assert length == len(prompt) + len(plain.tokens)
    assert seen == {1, 2, 3, 4, 5}


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
        caches = cache.record_positions(caches, at[:, begin : begin + 8])
    for begin in range(192, 200):  # a step from `begin` whose drafts are all rejected
        steps = begin + jnp.arange(chunk, dtype=jnp.int32)[None]
        after = cache.rollback(cache.record_positions(caches, steps), np.array([begin + 1]))
        assert can_resume(config, after, np.array([begin + 1])).tolist() == [True]
        longer = begin + jnp.arange(chunk + 1, dtype=jnp.int32)[None]
        lost = cache.rollback(cache.record_positions(caches, longer), np.array([begin + 1]))
        assert can_resume(config, lost, np.array([begin])).tolist() == [False]
        with pytest.raises(ValueError, match="tokens at a time"):
            caches["sliding_attention"].layer(0, longer, sliding, None)
        caches = cache.record_positions(caches, at[:, begin : begin + 1])


class Fixed:
    """A decoder whose logits after token t are row t of a table, plus what position adds."""

    def __init__(self, vocab: int):
        table = np.random.default_rng(8).standard_normal((vocab, vocab)) * 1.5
        self.config = None
        self.table = jnp.asarray(table, jnp.float32)

    def __call__(self, tokens, positions, caches, *, cache_rows=None, adapter_rows=None):
        return jax.nn.one_hot(tokens, len(self.table)), caches

    def logits(self, hidden):
        return hidden @ self.table


def test_two_sampled_tokens_have_the_distribution_of_the_model(monkeypatch):
    """8,192 rows of a vocabulary of 6, half with drafts: chi-square over all pairs."""
    vocab, batch, fixed = 6, 8192, Fixed(6)
    monkeypatch.setattr(programs.nnx, "merge", lambda *_: fixed)
    row = [0, 1, 2, 4, 5, 0, 1]
    full = functools.partial(jnp.full, (batch,), dtype=jnp.int32)
    settings = make_sampling(
        vocab, [0] * batch, temperature=1.0, top_k=5, frequency_penalty=0.9
    )._replace(key=jax.random.key_data(jax.random.split(jax.random.key(5), batch)))
    state = State(
        caches={},
        tokens=jnp.tile(jnp.asarray([[*row, *[vocab] * 9]], jnp.int32), (batch, 1)),
        lengths=full(7),
        prompts=full(7),
        max_lengths=full(10),
        stop_ids=jnp.full((batch, 16), -1, jnp.int32),
        settings=jax.tree.map(jnp.asarray, settings),
    )
    assert Proposer(row).propose(2) == [2, 4]
    proposed = jnp.tile(jnp.asarray([[2, 4]], jnp.int32), (batch, 1))
    counts = jnp.where(jnp.arange(batch) % 2 == 0, 2, 0)
    masks = jnp.full((batch, 3, 1), 0xFFFFFFFF, jnp.uint32)
    fixed_args = (
        None,
        vocab,
        Layout(),
        False,
        None,
    )  # graphdef, ids, layout, log-probabilities, weights
    step = jax.jit(
        lambda s: programs.decode(
            *fixed_args, s, None, s.lengths < 9, jnp.int32(3), jnp.bool_(False), masks[:, 0]
        )[0]
    )
    new = jax.jit(
        lambda s: programs.verify(*fixed_args, s, None, s.lengths > 0, proposed, counts, masks)[0]
    )(state)
    again = step(new)
    pairs = np.asarray(again.tokens)[:, 7:9]
    expected = pair_distribution(np.asarray(fixed.table, np.float64))
    for half in (pairs[::2], pairs[1::2]):
        counted = np.bincount(half[:, 0] * vocab + half[:, 1], minlength=vocab**2)
        assert p_value(counted, expected) > 1e-3
        wrong = pair_distribution(np.asarray(fixed.table, np.float64), penalty=0.0)
        assert p_value(counted, wrong) < 1e-6  # the gate tells another distribution apart
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


def test_only_a_request_that_drafts_compiles_the_program_that_judges_drafts(model):
    known, prompt = model.programs.compiled, [2, 5, 6, 5, 6, 5, 6]
    model.generate([prompt], max_new_tokens=3, speculate=0)
    count = len(known)
    model.generate([prompt], max_new_tokens=3)
    assert len(known) == count
    model.generate([prompt], max_new_tokens=3, speculate=2)
    assert [key[0] for key in list(known)[count:]] == ["verify"]


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
    assert MAX_DRAFTS + 1 == ops.cpu.MAX_ROWS
    assert isinstance(CONFIG.text, TextConfig)
