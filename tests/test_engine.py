"""The engine: whoever shares its batch, a request's tokens are those it has alone."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from adapters import build
from golden.conditioned import conditioned_weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora import put_table

from gemlax.engine import Engine, Event, Programs, Request, Usage
from gemlax.engine.compiled import prefill_width
from gemlax.errors import RequestError
from gemlax.names import text_weights
from gemlax.presets import preset, tiny
from gemlax.sampling import make_sampling

# Five sliding layers, one full.
CONFIG = tiny(preset("gemma-3-270m"), num_hidden_layers=6)
PATTERN = [40, 41, 42, 43]


def request(
    prompt, new, *, seed=0, stop_ids=(), num_drafts=0, logprobs=False, adapter=0, **sampling
):
    return Request(
        tuple(map(int, prompt)),
        len(prompt) + new,
        make_sampling(512, [seed], **sampling),
        tuple(stop_ids),
        adapter,
        num_drafts=num_drafts,
        logprobs=logprobs,
    )


@pytest.fixture(scope="module")
def programs():
    decoder = build(CONFIG, conditioned_weights("engine", text_weights(CONFIG.text)), "index")
    put_table(decoder, {"*.q_proj": 2}, {"*.mlp.*": 3})
    return Programs(decoder, num_tokens=512, dtype=jnp.dtype("float32"), adapters=("one", "two"))


def drain(engine, steps=1):
    """Run an engine until nothing is left; return tokens and reasons by request."""
    tokens, reasons = {}, {}
    while engine.num_running or engine.num_waiting:
        for event in engine.step(steps):
            tokens.setdefault(event.request_id, []).extend(event.tokens)
            if event.finish_reason:
                reasons[event.request_id] = event.finish_reason
    return tokens, reasons


@pytest.fixture(scope="module")
def alone(programs):
    """Return what a request says in an engine of its own, as (tokens, reason)."""

    @functools.cache
    def run(key):
        prompt, rest = key
        engine = Engine(programs, 1, 128)
        number = engine.submit(request(prompt, **dict(rest)))
        tokens, reasons = drain(engine, 128)
        return tokens[number], reasons[number]

    return lambda prompt, **how: run((tuple(prompt), tuple(sorted(how.items()))))


def prompt_of(seed, size):
    """Return a prompt: random, or one that repeats itself where drafts are right."""
    if seed % 3 == 0:
        return tuple((PATTERN * size)[:size])
    return tuple(int(i) for i in np.random.default_rng(seed).integers(3, 512, size))


HOW = st.fixed_dictionaries(
    {
        "new": st.integers(1, 24),
        "seed": st.integers(0, 5),
        "temperature": st.sampled_from([0.0, 0.0, 0.8]),
        "top_k": st.sampled_from([0, 20]),
        "repetition_penalty": st.sampled_from([1.0, 1.2]),
        "adapter": st.sampled_from([0, 0, 1, 2]),
        "stop_ids": st.sampled_from([(), tuple(range(3, 60))[:16], (41,)]),
    }
)
ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, 9), st.integers(1, 90), HOW, st.integers(0, 12), st.sampled_from([0, 0, 3]),
        st.sampled_from([None, None, None, 3, 8]),
    ),
    min_size=1,
    max_size=8,
)  # fmt: skip


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(ARRIVALS, st.sampled_from([None, 16]), st.sampled_from([1, 5]))
def test_who_shares_the_batch_changes_no_token(programs, alone, arrivals, interleaved, steps):
    engine = Engine(programs, 3, 128, interleaved=interleaved)
    numbers, said, reasons, cancelled = {}, {}, {}, set()
    step = 0
    while len(numbers) < len(arrivals) or engine.num_running or engine.num_waiting:
        for i, (seed, size, how, come, drafts, leave) in enumerate(arrivals):
            if come == step:
                numbers[i] = engine.submit(request(prompt_of(seed, size), num_drafts=drafts, **how))
            if leave is not None and step == come + leave and engine.cancel(numbers[i]):
                cancelled.add(numbers[i])
        for event in engine.step(steps):
            said.setdefault(event.request_id, []).extend(event.tokens)
            reasons[event.request_id] = event.finish_reason
        step += 1
    assert engine.num_free_slots == 4
    for i, (seed, size, how, *_) in enumerate(arrivals):
        tokens, reason = alone(prompt_of(seed, size), **how)
        number = numbers[i]
        if number in cancelled:
            assert said.get(number, []) == tokens[: len(said.get(number, []))]
        else:
            assert (said[number], reasons[number]) == (tokens, reason)


def test_adapters_change_what_is_said(alone):
    prompt = prompt_of(1, 20)
    said = {tuple(alone(prompt, new=8, temperature=0.0, adapter=i)[0]) for i in range(3)}
    assert len(said) == 3


def test_a_warm_engine_compiles_nothing(programs):
    for _ in range(2):
        before = programs.counters.programs
        engine = Engine(programs, 4, 64, interleaved=16)
        for seed in range(9):
            engine.submit(request(prompt_of(seed, 5 + 3 * seed), 4, num_drafts=3))
            engine.step()
        drain(engine)
    assert programs.counters.programs == before


def test_a_prompt_is_padded_by_less_than_half():
    widths = {size: prefill_width(size) for size in (1, 16, 17, 64, 65, 96, 97, 130, 200, 300, 512)}
    assert list(widths.values()) == [16, 16, 32, 64, 96, 96, 128, 192, 256, 384, 512]
    assert all(size <= prefill_width(size) < 1.5 * size for size in range(65, 513))


def test_prompts_share_a_prefill_while_it_is_small(programs, monkeypatch):
    assert programs.divide([500, 10, 12, 30, 100]) == [[1, 2, 3], [4], [0]]
    assert programs.divide([]) == []
    assert programs.divide([16] * 8) == [list(range(8))]
    monkeypatch.setattr("gemlax.ops.platform", lambda: "gpu")
    assert programs.divide([500, 10, 12, 30, 100]) == [[1, 2, 3, 4, 0]]


def test_prompts_of_mixed_lengths_take_the_places_of_each(programs, monkeypatch):
    engine, shapes, prefill = Engine(programs, 4, 128), [], programs.prefill

    def note(state, tokens, *rest):
        shapes.append(tokens.shape)
        return prefill(state, tokens, *rest)

    monkeypatch.setattr(programs, "prefill", note)
    for size in (4, 6, 100):
        engine.submit(request(prompt_of(1, size), 1))
    drain(engine)
    assert shapes == [(2, 16), (1, 128)]


def test_a_prompt_that_begins_as_an_earlier_one_is_prefilled_from_there(programs, alone):
    engine, first = Engine(programs, 1, 128), prompt_of(1, 60)
    engine.submit(request(first, 8))
    tokens, _ = drain(engine)
    longer = (*first, *tokens[0], 7, 8, 9)
    before = programs.counters.prefill_tokens
    number = engine.submit(request(longer, 8))
    again, _ = drain(engine)
    assert programs.counters.prefill_tokens - before <= 4
    assert again[number] == alone(longer, new=8)[0]


def test_what_a_ring_has_lost_is_prefilled_again(programs, alone):
    engine, first = Engine(programs, 1, 1024), prompt_of(2, 900)
    engine.submit(request(first, 30))
    drain(engine)
    before = programs.counters.prefill_tokens
    number = engine.submit(request(first[:90], 8))
    again, _ = drain(engine)
    assert programs.counters.prefill_tokens - before == 89
    assert again[number] == alone(first[:90], new=8)[0]


def test_an_engine_grows_with_the_longest_request_while_others_run(programs, alone):
    engine, said = Engine(programs, 2, 32), []
    short = engine.submit(request(prompt_of(1, 10), 20))
    for _ in range(3):
        said += [token for event in engine.step() for token in event.tokens]
    bias = dict.fromkeys(range(3, 40), -1.0)  # more places than the first one needed
    long = engine.submit(request(prompt_of(2, 90), 20, logit_bias=bias))
    tokens, _ = drain(engine)
    assert said + tokens[short] == alone(prompt_of(1, 10), new=20)[0]
    one = Engine(programs, 1, 128)
    number = one.submit(request(prompt_of(2, 90), 20, logit_bias=bias))
    assert tokens[long] == drain(one)[0][number]


def test_a_step_that_fails_ends_its_requests_and_the_engine_goes_on(programs, alone, monkeypatch):
    engine = Engine(programs, 2, 128)
    engine.submit(request(prompt_of(1, 10), 20))
    engine.step()

    def fail(*args, **options):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(programs, "decode", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.step()
    assert (engine.num_running, engine.num_free_slots) == (0, 2)
    number = engine.submit(request(prompt_of(1, 10), 20))
    assert drain(engine)[0][number] == alone(prompt_of(1, 10), new=20)[0]


def test_log_probabilities_are_those_of_the_request_alone(programs):
    engine = Engine(programs, 2, 128)
    numbers = [engine.submit(request(prompt_of(i, 20), 6, logprobs=True)) for i in (1, 2)]
    shared = {}
    while engine.num_running or engine.num_waiting:
        for event in engine.step(4):
            shared.setdefault(event.request_id, []).append(event.logprobs[0])
    for number, i in zip(numbers, (1, 2), strict=True):
        one = Engine(programs, 1, 128)
        one.submit(request(prompt_of(i, 20), 6, logprobs=True))
        own = []
        while one.num_running or one.num_waiting:
            own += [event.logprobs[0] for event in one.step(6)]
        np.testing.assert_allclose(np.concatenate(shared[number]), np.concatenate(own), atol=1e-4)


def test_a_request_without_room_ends_at_once_and_an_empty_one_is_refused(programs):
    engine = Engine(programs, 1, 32)
    number = engine.submit(request([5, 6], 0))
    assert engine.step() == [Event(number, [], Usage(2), None, "length")]
    with pytest.raises(RequestError, match="no token"):
        engine.submit(request([], 4))
    with pytest.raises(RequestError, match="at most 16 stop ids"):
        engine.submit(request([5], 4, stop_ids=range(17)))


def test_a_request_that_waits_or_runs_is_cancelled_once(programs):
    engine = Engine(programs, 1, 32)
    first, second = (engine.submit(request([5, 6], 9)) for _ in range(2))
    engine.step()
    assert engine.cancel(second) and engine.cancel(first)
    assert not engine.cancel(first)
    assert (engine.num_running, engine.num_waiting, engine.num_free_slots) == (0, 0, 1)
