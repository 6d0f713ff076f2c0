"""Prefix reuse in an engine: nothing is prefilled twice, and no token is another one."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from adapters import build
from golden.conditioned import conditioned_weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora import put_table
from test_engine import drain, prompt_of
from test_snapshots import assert_same, seen

from gemlax.engine import Engine, PrefixCache, Programs, Request, reuse
from gemlax.errors import UnsupportedError
from gemlax.names import text_weights
from gemlax.presets import preset, tiny
from gemlax.sampling import make_sampling
from gemlax.sharding import make_mesh

CONFIG = tiny(preset("gemma-3-270m"), num_hidden_layers=6)
SYSTEM, OTHER = prompt_of(1, 70), prompt_of(2, 70)


def request(prompt, new=4, *, adapter=0, salt="", at=(), drafts=0):
    return Request(
        tuple(map(int, prompt)),
        len(prompt) + new,
        make_sampling(512, [0], temperature=0.0),
        adapter=adapter,
        num_drafts=drafts,
        salt=salt,
        snapshot_at=tuple(at),
    )


def make_programs(config, adapters=False):
    decoder = build(config, conditioned_weights("reuse", text_weights(config.text)), "index")
    if adapters:
        put_table(decoder, {"*.q_proj": 2}, {"*.k_proj": 3})
    names = ("one", "two") if adapters else ()
    return Programs(decoder, num_tokens=512, dtype=jnp.dtype("float32"), adapters=names)


@pytest.fixture(scope="module")
def programs():
    return make_programs(CONFIG, adapters=True)


@pytest.fixture(autouse=True)
def few_widths(monkeypatch):
    """Pad prompts to three widths: programs take longer to compile than to run."""

    def width(size):
        return next(one for one in (16, 128, 512) if size <= one)

    for module in ("engine", "compiled"):
        monkeypatch.setattr(f"gemlax.engine.{module}.prefill_width", width)


@pytest.fixture(scope="module")
def alone(programs):
    """Return what a request says in an engine of its own, without reuse."""

    @functools.cache
    def run(prompt, adapter, new):
        engine = Engine(programs, 1, 128)
        number = engine.submit(request(prompt, new, adapter=adapter))
        return drain(engine, 8)[0][number]

    return lambda one: run(one.prompt, one.adapter, one.max_length - len(one.prompt))


def run(engine, *requests):
    """Run requests to their ends; return tokens and usage of each."""
    numbers, said, usage = [engine.submit(one) for one in requests], {}, {}
    while engine.num_running or engine.num_waiting:
        for event in engine.step(8):
            said.setdefault(event.request_id, []).extend(event.tokens)
            usage[event.request_id] = event.usage
    return [(said[number], usage[number]) for number in numbers]


PROMPTS = st.tuples(
    st.sampled_from([SYSTEM, SYSTEM, OTHER]),
    st.integers(1, 40),  # of its tokens
    st.integers(0, 3),  # what follows
    st.integers(0, 20),  # how much of it
)
ARRIVALS = st.lists(
    st.tuples(
        PROMPTS,
        st.sampled_from([0, 0, 0, 1, 2]),  # adapter
        st.sampled_from(["", "", "salt"]),
        st.lists(st.integers(1, 60), max_size=2),  # snapshots
        st.integers(0, 12),  # comes at a step
        st.sampled_from([None, None, None, 1, 3]),  # leaves after steps
        st.sampled_from([0, 0, 3]),  # drafts
    ),
    min_size=2,
    max_size=8,
)


@pytest.mark.deep
@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(ARRIVALS, st.sampled_from([None, 16]), st.sampled_from([0, 60_000, 10**9]))
def test_reuse_changes_no_token_of_any_request(programs, alone, arrivals, interleaved, budget):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reuse, "WORTH_SAVING", 6)
        patch.setattr(reuse, "WORTH_REUSING", 3)
        patch.setattr(reuse, "EVERY", 20)
        said = answers_of(programs, arrivals, interleaved, budget)
    for one, tokens, cancelled in said:
        expected = alone(one)
        assert tokens == (expected[: len(tokens)] if cancelled else expected)


def answers_of(programs, arrivals, interleaved, budget):
    """Run arrivals to their ends; return each with its tokens and whether it was cancelled."""
    cache = PrefixCache(budget)
    engine = Engine(programs, 2, 128, interleaved=interleaved, prefix_cache=cache)
    requests = []
    for (base, size, seed, more), adapter, salt, places, *_, drafts in arrivals:
        prompt = (*base[:size], *prompt_of(10 + seed, more))
        requests.append(request(prompt, adapter=adapter, salt=salt, at=places, drafts=drafts))
    numbers, said, cancelled, step = {}, {}, set(), 0
    while len(numbers) < len(arrivals) or engine.num_running or engine.num_waiting:
        for i, (*_, come, leave, _) in enumerate(arrivals):
            if come == step:
                numbers[i] = engine.submit(requests[i])
            if leave is not None and step == come + leave and engine.cancel(numbers[i]):
                cancelled.add(i)
        for event in engine.step(2):
            said.setdefault(event.request_id, []).extend(event.tokens)
        step += 1
        assert step < 200 and cache.num_bytes <= budget
    assert engine.num_free_slots == 2
    return [(one, said.get(numbers[i], []), i in cancelled) for i, one in enumerate(requests)]


def test_a_system_text_that_requests_share_is_prefilled_once(programs, alone):
    engine = Engine(programs, 2, 128, prefix_cache=PrefixCache(10**9))
    requests = [request((*SYSTEM, *prompt_of(10 + i, 9)), at=[70]) for i in range(4)]
    before = programs.counters.prefill_tokens
    answers = run(engine, *requests)
    assert programs.counters.prefill_tokens - before == 70 + 4 * 8
    assert [tokens for tokens, _ in answers] == [alone(one) for one in requests]
    assert [usage.num_cached_tokens for _, usage in answers] == [0, 70, 70, 70]


def test_the_third_request_needs_no_hint_of_what_is_shared(programs):
    engine = Engine(programs, 1, 128, prefix_cache=PrefixCache(10**9))
    cached = []
    for i in range(3):
        # The ring of each slot has moved on: another prompt comes between.
        one = request((*SYSTEM, *prompt_of(10 + i, 30)), at=[90])
        cached += [run(engine, one)[0][1].num_cached_tokens, run(engine, request(OTHER))]
    # The toys have no ring here: the first window reaches back to 70 only where it was taken.
    assert cached[::2] == [0, 0, 70]


def test_adapters_and_salts_share_nothing(programs, alone):
    """No. 14: names that collide in a key; no. 15: what others asked shows in the time it takes."""
    cache = PrefixCache(10**9)
    for _ in range(2):
        engine = Engine(programs, 1, 128, prefix_cache=cache)
        for adapter in (0, 1, 2):
            for salt in ("", "1", "2"):
                one = request((*SYSTEM, 5), adapter=adapter, salt=salt, at=[70])
                ((tokens, usage),) = run(engine, one)
                assert tokens == alone(one)
                assert usage.num_cached_tokens == (70 if _ else 0)
    assert len({tuple(alone(request((*SYSTEM, 5), adapter=i))) for i in range(3)}) > 1


def test_what_an_adapter_made_is_forgotten_with_it(programs):
    engine = Engine(programs, 2, 128, prefix_cache=PrefixCache(10**9))
    ones = [request((*SYSTEM, 5), adapter=adapter, at=[70]) for adapter in (1, 2)]
    run(engine, *ones)
    engine.forget_adapter(1)
    assert [usage.num_cached_tokens for _, usage in run(engine, *ones)] == [0, 70]


def test_a_cancelled_prefill_keeps_its_prefix(programs, alone, monkeypatch):
    """No. 4: a client that gives up before the first token never got any, attempt after attempt."""
    monkeypatch.setattr(reuse, "EVERY", 40)
    monkeypatch.setattr("gemlax.engine.engine.CHUNK", 32)
    engine = Engine(programs, 1, 128, prefix_cache=PrefixCache(10**9))
    long, cached = request(prompt_of(4, 110)), []
    for _ in range(3):
        number = engine.submit(long)
        engine.step()
        engine.step()
        cached.append(engine._scheduler.find(number).num_cached)
        assert engine.cancel(number)
        run(engine, request(OTHER))  # takes the slot
    # Two chunks each: 64 tokens, of which the last snapshot has the first 40; then 40 more.
    assert cached == [0, 40, 80]
    ((tokens, usage),) = run(engine, long)
    assert (tokens, usage.num_cached_tokens) == (alone(long), 80)


def test_requests_one_after_the_other_do_not_corrupt_each_other(programs, alone):
    """No. 10: caches that the next request found dirty."""
    engine = Engine(programs, 1, 128, prefix_cache=PrefixCache(10**9))
    long = prompt_of(4, 110)
    requests = [
        request(long, at=[80]), request(OTHER), request((*long[:90], 7, 8), at=[80]),
        request(long[:60], at=[30]), request((*OTHER[:50], *long[:40])), request(long),
    ]  # fmt: skip
    cached = []
    for one in requests:
        ((tokens, usage),) = run(engine, one)
        assert tokens == alone(one)
        cached.append(usage.num_cached_tokens)
    assert cached[2] >= 80 and cached[5] >= 80


@pytest.mark.deep
@pytest.mark.parametrize(
    "name", ["gemma-3-270m", pytest.param("gemma-4-e2b", marks=pytest.mark.deep)]
)
def test_rings_of_other_lengths_and_shared_layers_are_restored(programs, name):
    """Nos. 8 and 11: merged rings of different lengths, and layers that share keys and values."""
    if name != "gemma-3-270m":
        programs = make_programs(tiny(preset(name)))
    cache, long = PrefixCache(10**9), prompt_of(4, 850)
    expected = [run(Engine(programs, 1, 1024), request(p))[0][0] for p in (long[:100], long)]
    # Saved without rings, restored where there are some; the state grows while others run.
    small = Engine(programs, 2, 128, prefix_cache=cache)
    run(small, request(long[:100], 1, at=[90]))
    large = Engine(programs, 1, 1024, prefix_cache=cache)
    ((tokens, usage),) = run(large, request(long[:401], 1, at=[90, 400]))
    assert usage.num_cached_tokens == 90
    answers = run(small, request(long[:100]), request(long, at=[400]))
    assert [tokens for tokens, _ in answers] == expected
    assert answers[1][1].num_cached_tokens == 400
    assert tokens == run(Engine(programs, 1, 1024), request(long[:401], 1))[0][0]


def test_caches_are_those_without_reuse_bit_for_bit(programs):
    size, long = 338, prompt_of(4, 850)
    off = Engine(programs, 1, 1024)
    cache = PrefixCache(10**9)
    for engine in (off, Engine(programs, 1, 1024, prefix_cache=cache)):
        run(engine, request((*long[:size], long[size] ^ 1), 1, at=[size]))
    on = Engine(programs, 1, 1024, prefix_cache=cache)  # nothing in its slots
    for engine in (off, on):
        ((_, usage),) = run(engine, request(long, 1))
        assert usage.num_cached_tokens == size
    assert_same(*(seen(programs, engine._state, 0, 849) for engine in (on, off)))


def test_a_warm_engine_with_reuse_compiles_nothing(programs):
    for _ in range(2):
        before = programs.counters.programs
        engine = Engine(programs, 2, 128, prefix_cache=PrefixCache(10**9))
        for i in range(4):
            run(engine, request((*SYSTEM, *prompt_of(10 + i, 9 + i)), at=[70]))
    assert programs.counters.programs == before


def test_a_mesh_is_refused():
    decoder = build(CONFIG, conditioned_weights("reuse", text_weights(CONFIG.text)), "index")
    programs = Programs(
        decoder, num_tokens=512, dtype=jnp.dtype("float32"), mesh=make_mesh("data=8")
    )
    with pytest.raises(UnsupportedError, match="not reused on a mesh"):
        Engine(programs, 1, 128, prefix_cache=PrefixCache(1))


def test_a_budget_of_nothing_is_no_cache():
    assert not PrefixCache(0) and PrefixCache(1)
    assert np.asarray(PrefixCache(1).match((), (1, 2), 4).length) == 0
