"""The engine's thread: whoever comes, leaves or fails, each answer is the one it has alone."""

import asyncio
import dataclasses
import functools
import itertools
import json
import re
import time

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve.running import OPTIONS, idle, make_kitchen, of_family, stop, wait_until

from gemlax.engine import MAX_STEPS, Engine
from gemlax.generation import Reply, SamplingSettings
from gemlax.grammar import Choice, JsonSchema, Lark, Regex
from gemlax.serve.work import ChatRequest, CompletionRequest, ServeError

pytestmark = pytest.mark.deep

USER = {"role": "user", "content": "hello there"}


def chat(text="hello there", *, priority=0, key_id="", n=1, **sampling):
    messages = [{"role": "user", "content": text}]
    return ChatRequest(messages=messages, settings=sampling, priority=priority, key_id=key_id, n=n)


async def text_of(answers):
    """The text of a request's only answer, and its last update."""
    text, last = "", None
    async for update in answers:
        text += "".join(delta.text for delta in update.deltas)
        last = update
    return text, last


async def answered(kitchen, request):
    """The text of a chat's only answer, and its last update."""
    return await text_of(await kitchen.chat(request))


def run(work):
    return asyncio.run(asyncio.wait_for(work, 60))


@pytest.fixture(scope="module")
def alone(model):
    """What the model says to a text in an engine of its own."""
    engine = Engine(model.programs, 1, OPTIONS["context"])

    @functools.cache
    def say(text, seed, new):
        ids = model.chat_format.encode([{"role": "user", "content": text}])
        how = SamplingSettings(seed=seed, max_new_tokens=new, temperature=1.0, context=128)
        (request,) = model.chat_requests([ids], how).requests
        reply = Reply(engine, request, model.chat_format.parser(ids))
        return reply.finish(itertools.repeat(MAX_STEPS)).content

    return say


ARRIVALS = st.lists(
    st.tuples(
        st.sampled_from(["a", "hello there", "b c d e " * 4, "some words " * 5]),
        st.integers(0, 2),  # seed
        st.sampled_from([1, 6, 20]),
        st.integers(0, 3),  # turns of the loop before it comes
        st.sampled_from([None, None, None, 0, 2]),  # updates after which it is left
    ),
    min_size=1,
    max_size=9,
)  # fmt: skip


@settings(max_examples=15, deadline=None, derandomize=True)
@given(ARRIVALS)
def test_whoever_comes_and_leaves_each_answer_is_the_one_it_has_alone(arrivals):
    """Breakages 7 to 11 (answers of others, corrupted caches)."""
    kitchen, alone = SHARED["kitchen"], SHARED["alone"]

    async def one(text, seed, new, delay, leaves):
        await asyncio.sleep(delay * 0.01)
        ask = chat(text, seed=seed, max_new_tokens=new, temperature=1.0)
        answers = await kitchen.chat(ask)
        said, count = "", 0
        async for update in answers:
            said += "".join(delta.text for delta in update.deltas)
            count += 1
            if leaves is not None and count > leaves:
                await answers.cancel()
                break
        expected = alone(text, seed, new)
        assert expected.startswith(said) if leaves is not None else said == expected

    async def everybody():
        await asyncio.gather(*(one(*arrival) for arrival in arrivals))

    before = kitchen.model.programs.counters.programs
    run(everybody())
    wait_until(lambda: idle(kitchen), "free slots")
    assert kitchen.model.programs.counters.programs == before


SHARED = {}


@pytest.fixture(scope="module", autouse=True)
def shared(kitchen, model, alone):
    """Compile what the solo runs need first, so that what the server compiles can be counted."""
    for text in ("a", "hello there", "b c d e " * 4, "some words " * 5):
        for seed in range(3):
            for new in (1, 6, 20):
                alone(text, seed, new)
    SHARED.update(kitchen=kitchen, alone=alone)


def test_a_flood_gets_as_many_answers_as_there_are_places(kitchen):
    async def flood():
        asks = (kitchen.chat(chat(max_new_tokens=3)) for _ in range(100))
        came = await asyncio.gather(*asks, return_exceptions=True)
        admitted = [answers for answers in came if not isinstance(answers, Exception)]
        texts = await asyncio.gather(*map(text_of, admitted))
        return came, texts

    came, texts = run(flood())
    refused = [error for error in came if isinstance(error, ServeError)]
    assert len(texts) == 12 and len(refused) == 88
    assert {error.status for error in refused} == {429}
    assert all(last.finish_reason == "length" for _, last in texts)
    wait_until(lambda: idle(kitchen), "free slots")


def test_a_request_that_waits_or_is_being_read_is_cancelled(kitchen):
    """Breakages 1 to 3 (cancel ignored while queued or during the prompt)."""

    async def both():
        running = [await kitchen.chat(chat(max_new_tokens=90)) for _ in range(4)]
        waiting = [await kitchen.chat(chat(max_new_tokens=90)) for _ in range(3)]
        for answers in [*waiting, *running]:
            await answers.cancel()
            await answers.cancel()

    run(both())
    wait_until(lambda: idle(kitchen), "free slots")
    assert not kitchen.worker.running


def test_a_task_that_is_cancelled_while_its_prompt_is_rendered_leaves_nothing(kitchen):
    async def leave():
        task = asyncio.ensure_future(kitchen.chat(chat("word " * 20)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(leave())
    wait_until(lambda: idle(kitchen), "free slots")


def test_a_step_that_fails_ends_its_requests_and_the_next_is_answered(kitchen, alone, monkeypatch):
    """Breakage 5 (generation thread dead, every request hangs)."""
    engine, steps = kitchen.worker.engine, []
    step = engine._programs.decode

    def fail(*args, **options):
        steps.append(1)
        if len(steps) == 3:
            raise RuntimeError("injected")
        return step(*args, **options)

    async def ask():
        return await text_of(await kitchen.chat(chat(max_new_tokens=20, seed=0, temperature=1.0)))

    monkeypatch.setattr(engine._programs, "decode", fail)
    _, last = run(ask())
    assert last.finish_reason == "error" and last.error.status == 500
    text, last = run(ask())
    assert text == alone("hello there", 0, 20) and last.finish_reason == "length"
    assert kitchen.worker.is_healthy
    wait_until(lambda: idle(kitchen), "free slots")


def test_the_same_failure_twice_ends_the_engine(model, monkeypatch):
    kitchen = make_kitchen(model)

    def fail(*args, **options):
        raise RuntimeError("injected")

    async def ask():
        return await text_of(await kitchen.chat(chat(max_new_tokens=20)))

    monkeypatch.setattr(kitchen.worker.engine, "step", fail)
    assert run(ask())[1].finish_reason == "error"
    assert run(ask())[1].finish_reason == "error"
    wait_until(lambda: kitchen.worker.has_ended, "the end")
    assert not kitchen.worker.is_healthy and "injected" in kitchen.worker.failure
    with pytest.raises(ServeError) as caught:
        run(ask())
    assert (caught.value.status, caught.value.code) == (503, "failed")
    kitchen.close()


def test_a_step_that_hangs_is_noticed(kitchen, monkeypatch):
    """Breakage 6 (stalls mid-decode, health says ok)."""
    worker = kitchen.worker
    assert worker.is_healthy
    monkeypatch.setattr(worker, "_tick_begin", 0.0)
    monkeypatch.setattr(worker, "_longest", 0.0)
    monkeypatch.setattr("gemlax.serve.worker._HANGS", 0.0)
    assert worker.stuck_for > 0 and not worker.is_healthy


def test_who_waits_too_long_is_told(model):
    kitchen = make_kitchen(model, queue_timeout=0.1, request_timeout=0.6)
    step = kitchen.worker.engine.step

    def slow(*args):
        time.sleep(0.03)
        return step(*args)

    kitchen.worker.engine.step = slow

    async def everybody():
        asks = [await kitchen.chat(chat(max_new_tokens=100)) for _ in range(5)]
        return await asyncio.gather(*map(text_of, asks))

    *running, (_, waited) = run(everybody())
    assert all(text and last.error.code == "request_timeout" for text, last in running)
    assert waited.error.code == "queue_timeout" and waited.error.status == 503
    wait_until(lambda: idle(kitchen), "free slots")
    stop(kitchen)


def test_draining_lets_running_answers_end_and_takes_no_new_ones(model, alone):
    kitchen = make_kitchen(model)

    async def drain():
        answers = await kitchen.chat(chat(max_new_tokens=20, seed=1, temperature=1.0))
        kitchen.worker.drain(30)
        with pytest.raises(ServeError) as caught:
            await kitchen.chat(chat())
        assert caught.value.status == 503
        return await text_of(answers)

    text, last = run(drain())
    assert text == alone("hello there", 1, 20) and last.finish_reason == "length"
    assert kitchen.worker.join(20) and not kitchen.worker.failure
    kitchen.close()


def test_what_runs_when_the_time_to_drain_is_over_is_aborted(model):
    kitchen = make_kitchen(model)

    async def drain():
        answers = await kitchen.chat(chat(max_new_tokens=100))
        kitchen.worker.drain(0)
        return await text_of(answers)

    _, last = run(drain())
    assert last.finish_reason == "abort"
    assert kitchen.worker.join(20)
    kitchen.close()


def test_usage_says_what_was_found_in_a_cache(kitchen):
    async def twice():
        ask = chat("some words to be read " * 2, max_new_tokens=2)
        await text_of(await kitchen.chat(ask))
        _, last = await text_of(await kitchen.chat(ask))
        return last.usage

    usage = run(twice())
    assert usage.cached == usage.prompt - 1
    assert usage.completion == 2


def test_tokens_are_counted_while_they_come_and_once(kitchen, monkeypatch):
    counts, tell = [], kitchen.worker._tell

    def generated():
        text = kitchen.metrics.text().decode()
        return float(re.search(r"^vllm:generation_tokens_total\{.*\} (\S+)$", text, re.M)[1])

    def note(ticket, update):
        counts.append(generated())
        tell(ticket, update)

    begin = generated()
    monkeypatch.setattr(kitchen.worker, "_tell", note)
    run(answered(kitchen, chat(max_new_tokens=5)))
    assert [count - begin for count in counts] == [1, 2, 3, 4, 5]


def test_prefixes_are_shared_within_a_salt_alone(kitchen):
    """Breakages 14 and 15 (prefixes that tell what others asked)."""

    async def cached(salt):
        ask = CompletionRequest(
            prompts=["quite a few words " * 4], settings={"max_new_tokens": 1}, cache_salt=salt
        )
        _, last = await text_of(await kitchen.complete(ask))
        return last.usage.cached

    async def in_turn():
        return [await cached(salt) for salt in ("one", "one", "other", "other")]

    first, again, other, other_again = run(in_turn())
    assert first == other == 0 and again == other_again > 0


BOUNDED = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
    "additionalProperties": False,
}


def test_answers_keep_to_their_grammars_beside_others_that_have_none(kitchen, alone):
    asks = {
        "schema": chat(seed=1, temperature=1.0),
        "choice": CompletionRequest(prompts=["a"], grammar=Choice(["yes", "no"])),
    }
    asks["schema"] = dataclasses.replace(asks["schema"], grammar=JsonSchema(BOUNDED))

    async def together():
        free = kitchen.chat(chat("a", seed=1, max_new_tokens=20, temperature=1.0))
        came = await asyncio.gather(free, kitchen.chat(asks["schema"]),
                                    kitchen.complete(asks["choice"]))  # fmt: skip
        return await asyncio.gather(*map(text_of, came))

    before = kitchen.model.programs.counters.programs
    (free, _), (written, last), (chosen, _) = run(together())
    assert free == alone("a", 1, 20)
    jsonschema.validate(json.loads(written), BOUNDED)
    assert last.finish_reason == "stop"
    assert chosen in ("yes", "no")
    assert kitchen.model.programs.counters.programs == before


def test_a_grammar_that_cannot_be_held_to_is_refused(kitchen):
    for grammar in (JsonSchema({"not": {}}), Regex("(a"), Lark("start: nothing")):
        with pytest.raises(ServeError) as caught:
            run(kitchen.complete(CompletionRequest(prompts=["a"], grammar=grammar)))
        assert caught.value.status == 400
    with pytest.raises(ServeError, match="tool_choice"):
        run(kitchen.chat(ChatRequest(messages=[USER], tool_choice="required")))
    assert idle(kitchen)


def test_a_call_that_is_required_comes_piece_by_piece(model):
    tool = {
        "type": "function",
        "function": {"name": "rate", "parameters": BOUNDED},
    }
    kitchen = make_kitchen(of_family(model, "gemma4"), slots=1, context=256)
    try:
        ask = chat(seed=2, temperature=1.0)
        ask = dataclasses.replace(
            ask, tools=[tool], tool_choice="required", parallel_tool_calls=False
        )

        async def read():
            deltas = []
            async for update in await kitchen.chat(ask):
                deltas += update.deltas
            return deltas, update

        deltas, last = run(read())
        assert [delta for delta in deltas if delta.kind == "call"] == [("call", "rate")]
        pieces = [delta.text for delta in deltas if delta.kind == "arguments"]
        assert len(pieces) > 1
        jsonschema.validate(json.loads("".join(pieces)), BOUNDED)
        assert last.finish_reason == "tool_calls"
    finally:
        stop(kitchen)
