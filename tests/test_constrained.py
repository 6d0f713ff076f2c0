"""Answers held to grammars: by the engine, from Python, in chats and on the command line."""

import itertools
import json

import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from adapters import build
from golden.conditioned import conditioned_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from schemas import objects
from vocabularies import chat_tokenizer

from gemlax import Message, Model, RequestError, sampling
from gemlax.engine import Engine, Event, Request
from gemlax.grammar import (
    Choice,
    JsonObject,
    JsonSchema,
    Lark,
    Regex,
    compiler_of,
    mask_width,
)
from gemlax.names import text_weights
from gemlax.presets import preset, tiny
from gemlax.sampling import make_sampling

pytestmark = pytest.mark.deep

CONFIG = tiny(preset("gemma-4-e2b"), num_hidden_layers=5)
TOKENIZER = chat_tokenizer("gemma4")
STOPS = (TOKENIZER.eos_id, TOKENIZER.id_of("<turn|>"))
PROMPT = [2, *range(300, 310)]
ANYTHING = Lark("start: TEXT\nTEXT: /(.|\\n)*/")
TOOLS = [
    {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 5},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
            "required": ["unit", "city"],
        },
    },
    {"name": "now"},
]
BOUNDED = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model():
    decoder = build(CONFIG, conditioned_weights("constrained", text_weights(CONFIG.text)), "index")
    return Model(CONFIG, decoder, TOKENIZER)


def request(grammar=None, new=24, *, prompt=PROMPT, seed=0, drafts=0, logprobs=False, **how):
    constraint = None
    if grammar is not None:
        constraint = compiler_of(TOKENIZER).constraint(grammar, STOPS)
    return Request(
        tuple(prompt), len(prompt) + new, make_sampling(512, [seed], **how), STOPS,
        num_drafts=drafts, logprobs=logprobs, constraint=constraint,
    )  # fmt: skip


def run(model, *requests, slots=None, steps=8):
    """Return the tokens and the last event of each request."""
    engine = Engine(model.programs, slots or len(requests), 64)
    numbers = [engine.submit(one) for one in requests]
    tokens, last = {}, {}
    while engine.num_running or engine.num_waiting:
        for event in engine.step(steps):
            tokens.setdefault(event.request_id, []).extend(event.tokens)
            last[event.request_id] = event
    assert engine.num_free_slots == model.programs.num_slots(slots or len(requests))
    return [tokens[n] for n in numbers], [last[n] for n in numbers]


@pytest.mark.parametrize("num_tokens", [64, 70, 95, 512])
def test_the_mask_forbids_the_ids_whose_bit_is_not_set(num_tokens):
    random = np.random.default_rng(num_tokens)
    logits = random.normal(size=(3, num_tokens)).astype(np.float32)
    mask = random.integers(0, 2**32, (3, mask_width(num_tokens)), np.uint32)
    bits = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little")[:, :num_tokens]
    expected = np.where(bits == 1, logits, -np.inf)
    np.testing.assert_array_equal(sampling.allow(jnp.asarray(logits), jnp.asarray(mask)), expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_that_allows_everything_changes_no_token(model, temperature):
    # Bytes and control tokens are no text: those alone are kept out on both sides.
    bias = dict.fromkeys([i for i in range(280) if i not in STOPS], -np.inf)
    how = {"temperature": temperature, "seed": 5, "logit_bias": bias}
    (free,), _ = run(model, request(**how))
    (held,), _ = run(model, request(ANYTHING, **how))
    assert free == held and len(free) == 24


def test_rows_beside_a_grammar_say_what_they_say_alone(model):
    plain = [request(seed=i, temperature=1.0, prompt=PROMPT[: 3 + i]) for i in range(3)]
    grammar = request(JsonSchema(BOUNDED), 60, seed=3, temperature=1.0)
    alone = [run(model, one)[0][0] for one in (*plain, grammar)]
    together, _ = run(model, *plain, grammar)
    assert together == alone
    assert run(model, grammar, *plain, slots=2)[0] == [alone[-1], *alone[:-1]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_and_forced_ids_change_no_token_of_a_grammar(model, temperature):
    for seed, grammar in enumerate([JsonSchema(BOUNDED), Choice(["abcdefgh", "abcdzz"])]):
        how = {"seed": seed, "temperature": temperature}
        (plain,), (end,) = run(model, request(grammar, 60, **how))
        (drafted,), (drafted_end,) = run(model, request(grammar, 60, drafts=3, **how))
        assert drafted == plain
        assert drafted_end.finish_reason == end.finish_reason == "stop"
        assert drafted_end.usage.num_steps < end.usage.num_steps
        wide, _ = run(model, request(grammar, 60, drafts=3, **how), request(seed=9))
        assert wide[0] == plain


def test_logprobs_are_those_before_the_mask(model):
    grammar = Choice(["qz"])
    (tokens,), (event,) = run(model, request(grammar, logprobs=True))
    assert event.logprobs is not None
    logits = np.asarray(model.logits([PROMPT])[0, -1, :512], np.float64)
    own = logits[tokens[0]] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    first = run_first(model, grammar)
    np.testing.assert_allclose(first.logprobs[0][0], own, atol=1e-4)
    assert set(first.logprobs[1][0].tolist()) - {tokens[0]}


def run_first(model, grammar):
    engine = Engine(model.programs, 1, 64)
    engine.submit(request(grammar, logprobs=True))
    while not (events := [event for event in engine.step() if event.tokens]):
        pass
    return events[0]


def test_a_grammar_that_fails_ends_its_request_and_no_other(model):
    forbidden = dict.fromkeys(range(24, 512), -np.inf)  # all text
    broken = request(Regex("[a-z]+"), logit_bias=forbidden)
    plain = request(seed=1, temperature=1.0)
    tokens, events = run(model, broken, plain)
    assert events[0].finish_reason == "error" and "grammar" in events[0].error
    assert tokens[0] == []
    assert tokens[1] == run(model, plain)[0][0] and events[1].error is None


def test_a_grammar_that_fails_while_its_mask_is_made_ends_its_request(model):
    failing, plain = request(Regex("[a-z]+")), request(seed=1)
    failing.constraint._matcher.consume_token(TOKENIZER.id_of("0"))  # it is in its error state
    tokens, events = run(model, failing, plain)
    assert isinstance(events[0], Event) and events[0].finish_reason == "error"
    assert tokens[0] == [] and tokens[1] == run(model, plain)[0][0]


def test_a_request_can_be_run_again(model):
    one = request(JsonSchema(BOUNDED), 60)
    assert run(model, one)[0] == run(model, one)[0]


def test_grammars_compile_nothing_once_programs_are_warm(model):
    def both():
        return run(
            model, request(JsonSchema(BOUNDED), drafts=3), request(seed=1), request(seed=2, new=30)
        )

    both()
    run(model, request(seed=1), request(seed=2), request(seed=3))
    count = model.programs.counters.programs
    both()
    run(model, request(seed=1), request(seed=2), request(Choice(["ab"])))
    assert model.programs.counters.programs == count


def check_random_schemas(model, examples):
    finished = []

    @settings(max_examples=examples, deadline=None, database=None)
    @given(objects(), st.integers(0, 2**16))
    def check(schema, seed):
        done = model.generate(
            "abc", grammar=JsonSchema(schema), temperature=1.0, seed=seed, max_new_tokens=96,
            context=128,
        )  # fmt: skip
        assert done.error is None
        if done.finish_reason == "stop":
            jsonschema.validate(json.loads(done.text), schema)
        finished.append(done.finish_reason == "stop")

    check()
    assert sum(finished) > len(finished) // 2


def test_finished_answers_validate_against_random_schemas(model):
    check_random_schemas(model, 25)


@pytest.mark.slow
def test_finished_answers_validate_against_many_random_schemas(model):
    check_random_schemas(model, 200)


def test_each_prompt_of_a_call_has_its_grammar(model):
    found = model.generate(
        ["a", "b", "c"], grammar=[Choice(["yes", "no"]), None, JsonObject()], temperature=1.0,
        max_new_tokens=8,
    )  # fmt: skip
    assert found[0].text in ("yes", "no") and found[0].finish_reason == "stop"
    assert found[2].text.startswith("{")
    both = model.generate(["a", "b"], grammar=Choice(["yes", "no"]))
    assert {one.text for one in both} <= {"yes", "no"}
    with pytest.raises(RequestError, match="list of 2"):
        model.generate(["a", "b"], grammar=[None])


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"grammar": "a+"}, "JsonSchema"),
        ({"grammar": Regex("(")}, "regex"),
        ({"allowed_ids": [512]}, "512"),
        ({"allowed_ids": "a"}, "allowed_ids"),
        ({"thinking_budget": -1}, "thinking_budget"),
    ],
)
def test_what_no_answer_can_be_held_to_is_refused(model, how, said):
    with pytest.raises(RequestError, match=said):
        model.generate("a", **how)


def test_only_allowed_ids_are_generated(model):
    done = model.generate("a", allowed_ids=[300, 301], temperature=1.0, max_new_tokens=12)
    assert set(done.tokens) <= {300, 301} and len(done.tokens) == 12


def test_a_thought_ends_when_its_budget_is_used_up(model):
    opened, closed = map(TOKENIZER.id_of, ("<|channel>", "<channel|>"))
    ids = [[2, 300, opened]]
    (done,) = model.generate(ids, thinking_budget=5, logit_bias={closed: -50}, max_new_tokens=12)
    assert done.tokens.index(closed) <= 5


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("choice", ["required", {"name": "get_weather"}, {"name": "now"}])
def test_required_and_named_calls_come_whole(model, choice, seed):
    said = [{"role": "user", "content": "abc"}]
    message = model.chat(
        said, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, temperature=1.0,
        seed=seed, thinking_budget=4, max_new_tokens=120,
    )  # fmt: skip
    assert message.finish_reason == "tool_calls" and len(message.tool_calls) == 1
    (call,) = message.tool_calls
    assert call["name"] == (choice["name"] if isinstance(choice, dict) else call["name"])
    if call["name"] == "get_weather":
        jsonschema.validate(call["arguments"], TOOLS[0]["parameters"])
    assert "<|" not in message.content


def test_a_stream_of_a_chat_gives_its_calls_piece_by_piece(model):
    said = [{"role": "user", "content": "abc"}]
    how = {"tools": TOOLS, "tool_choice": {"name": "get_weather"}, "thinking_budget": 0}
    reply = model.chat(said, stream=True, max_new_tokens=80, **how)
    deltas = [delta for delta in reply if delta.kind in ("call", "arguments")]
    assert deltas[0] == ("call", "get_weather") and len(deltas) > 3
    arguments = json.loads("".join(delta.text for delta in deltas[1:]))
    assert reply.message.tool_calls == [{"name": "get_weather", "arguments": arguments}]


@pytest.mark.parametrize("seed", range(3))
def test_without_a_choice_of_tools_no_marker_comes(model, seed):
    said = [{"role": "user", "content": "abc"}]
    message = model.chat(
        said, tools=TOOLS, tool_choice="none", temperature=1.5, seed=seed, max_new_tokens=40
    )
    plain = set(TOKENIZER.special_ids) - {*STOPS, *map(TOKENIZER.id_of, ("<|channel>",)),
                                          TOKENIZER.id_of("<channel|>"), 1}  # fmt: skip
    assert isinstance(message, Message) and not plain & set(message.tokens)
    assert not message.tool_calls


def test_the_content_of_a_chat_has_the_form_that_was_asked(model):
    said = [{"role": "user", "content": "abc"}]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": BOUNDED}}
    message = model.chat(said, response_format=form, temperature=1.0)
    jsonschema.validate(json.loads(message.content), BOUNDED)
    assert model.chat(said, grammar=Choice(["yes"])).content == "yes"
    with pytest.raises(RequestError, match="not both"):
        model.chat(said, grammar=Choice(["yes"]), response_format=form)
    session = model.session(response_format=Choice(["ab"]))
    for _ in range(2):
        assert session.send("abc").finish(itertools.repeat(4)).content == "ab"
