"""OpenAI's Responses API, with scripted answers and the official client."""

import json
from typing import Any

import httpx2
import openai
import pydantic
import pytest
from serve.fake import (
    FakeKitchen,
    app_of,
    call,
    content,
    end,
    events_of,
    post,
    reasoning,
    run,
)

from gemlax.grammar import JsonSchema
from gemlax.serve.work import Delta, ServeError, TokenLogprob, Update, Usage

RESPONSES = "/v1/responses"
BASE: dict[str, Any] = {"model": "gemma", "input": "Hello"}
HELLO = [{"role": "user", "content": "Hello"}]
PARAMETERS = {"type": "object", "properties": {"at": {"type": "string"}}}
TOOL = {"type": "function", "name": "look", "description": "Looks.", "parameters": PARAMETERS}
OTHER = {"type": "function", "name": "hear", "parameters": None, "strict": None}


def client(kitchen: FakeKitchen) -> openai.AsyncOpenAI:
    transport = httpx2.ASGITransport(app_of(kitchen))
    http = openai.DefaultAsyncHttpxClient(transport=transport)
    return openai.AsyncOpenAI(
        base_url="http://localhost/v1", api_key="k", http_client=http, max_retries=0
    )


def asked(**changes: Any) -> Any:
    """What the kitchen is asked for a request with these fields."""
    kitchen = FakeKitchen()
    response = post(kitchen, RESPONSES, BASE | changes)
    assert response.status_code == 200, response.text
    return kitchen.asked


def refused(**changes: Any) -> dict[str, Any]:
    """The error that a request with these fields gets."""
    kitchen = FakeKitchen()
    response = post(kitchen, RESPONSES, BASE | changes)
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert not kitchen.requests
    return error


def test_a_request_becomes_a_chat_request():
    request = asked(
        instructions="Be brief.",
        max_output_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        seed=-1,
        cache_salt="s",
        priority=3,
        store=True,
        truncation="auto",
        metadata={"a": "b"},
        include=["reasoning.encrypted_content"],
        tools=None,
        reasoning=None,
        unknown_field=[1],
    )
    settings = {"max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 4}
    assert request.settings == settings | {"seed": -1}
    assert request.messages == [{"role": "system", "content": "Be brief."}, *HELLO]
    assert (request.cache_salt, request.priority, request.logprobs) == ("s", 3, None)
    assert (request.thinking, request.grammar, request.tool_choice) == (None, None, "auto")
    assert asked().settings == {}  # a seed is drawn where there is none


def test_items_become_messages():
    text = {"type": "output_text", "text": "I look."}
    messages = asked(
        instructions="Be brief.",
        tools=[TOOL],
        input=[
            {"role": "developer", "content": [{"type": "input_text", "text": "No jokes."}]},
            {"type": "message", "role": "user", "content": "Hello"},
            {
                "type": "reasoning",
                "id": "rs_1",
                "summary": [{"type": "summary_text", "text": "short"}],
                "content": [{"type": "reasoning_text", "text": "Hm."}],
            },
            {"type": "message", "role": "assistant", "id": "msg_1", "content": [text, text]},
            {
                "type": "function_call",
                "call_id": "c1",
                "name": "look",
                "arguments": '{"at": "sky"}',
            },
            {"type": "function_call", "call_id": "c2", "name": "hear", "arguments": ""},
            {"type": "function_call_output", "call_id": "c1", "output": "Blue."},
            {
                "type": "function_call_output",
                "call_id": "c2",
                "output": [
                    {"type": "input_text", "text": "a"},
                    {"type": "input_text", "text": "b"},
                ],
            },
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            {"role": "user", "content": "Why?"},
        ],
    ).messages
    calls = [
        {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for id, name, arguments in (("c1", "look", {"at": "sky"}), ("c2", "hear", {}))
    ]
    answer = {"role": "assistant", "content": "I look.I look.", "reasoning": "Hm."}
    assert messages == [
        {"role": "system", "content": "Be brief.\n\nNo jokes."},
        *HELLO,
        answer | {"tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "name": "look", "content": "Blue."},
        {"role": "tool", "tool_call_id": "c2", "name": "hear", "content": "a\nb"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Why?"},
    ]


@pytest.mark.parametrize(
    ("choice", "expected", "names"),
    [
        (None, "auto", ["look", "hear"]),
        ("auto", "auto", ["look", "hear"]),
        ("none", "none", ["look", "hear"]),
        ("required", "required", ["look", "hear"]),
        ({"type": "function", "name": "hear"}, {"name": "hear"}, ["look", "hear"]),
        ({"type": "allowed_tools", "mode": "required", "tools": [OTHER]}, "required", ["hear"]),
    ],
)
def test_a_choice_of_tools_is_passed_on(choice, expected, names):
    request = asked(tools=[TOOL, OTHER], tool_choice=choice, parallel_tool_calls=False)
    assert (request.tool_choice, request.parallel_tool_calls) == (expected, False)
    assert [tool["function"]["name"] for tool in request.tools] == names
    empty = {"name": "hear", "parameters": {"type": "object", "properties": {}}}
    assert request.tools[-1] == {"type": "function", "function": empty}


@pytest.mark.parametrize(
    ("effort", "expected"),
    [(None, (None, None)), ("none", (False, None)), ("low", (True, 1024)), ("max", (True, None))],
)
def test_effort_is_thinking_with_a_budget(effort, expected):
    request = asked(reasoning={"effort": effort})
    assert (request.thinking, request.thinking_budget) == expected


def test_a_form_of_text_becomes_a_grammar():
    def grammar_of(**form: Any) -> Any:
        return asked(text={"format": form, "verbosity": "low"}).grammar

    named = {"type": "json_schema", "name": "a", "schema": PARAMETERS}
    assert grammar_of(type="text") is None
    assert grammar_of(type="json_object") == JsonSchema({"type": "object"}, strict=True)
    assert grammar_of(**named) == JsonSchema(PARAMETERS, strict=True)
    assert grammar_of(**named, strict=False) == JsonSchema(PARAMETERS, strict=False)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"content": "a"}]}, "input[0].role"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
            "input[0].content[0].text",
        ),
        (
            {"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]},
            "input[0].call_id",
        ),
        (
            {"input": [{"type": "function_call", "call_id": "a", "name": "b", "arguments": "["}]},
            "input[0].arguments",
        ),
        ({"input": [{"type": "function_call", "call_id": "a"}]}, "input[0].name"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "a"}}, "prompt"),
        ({"background": True}, "background"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "b"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "tools": [OTHER]}},
            "tool_choice.tools",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"seed": 2**64}, "seed"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "lark"}}}, "text.format.type"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_a_field_that_is_wrong_or_cannot_be_honoured_is_named(changes, where):
    error = refused(**changes)
    assert error["param"] == where
    assert error["message"].startswith(f"{where}: ")
    assert len(error["message"]) < 200


def test_the_client_reads_an_answer():
    kitchen = FakeKitchen([*content("Hel", "lo"), end(usage=Usage(9, 4, 2, 1))])

    async def ask() -> Any:
        return await client(kitchen).responses.create(**BASE, store=True, instructions="Be brief.")

    answer = run(ask())
    assert (answer.output_text, answer.status, answer.store) == ("Hello", "completed", False)
    assert answer.instructions == "Be brief."
    assert answer.id.startswith("resp_")
    usage = answer.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (9, 2, 11)
    assert usage.input_tokens_details.cached_tokens == 4
    assert usage.output_tokens_details.reasoning_tokens == 1


SCRIPT = [
    *reasoning("H", "m."),
    *content("Look", "ing."),
    *call("look", '{"at":', '"sk', 'y"}'),
    *call("hear"),
    end("tool_calls"),
]


def test_breakage_23_the_client_streams_thoughts_text_and_calls():
    kitchen = FakeKitchen(SCRIPT)

    async def ask() -> tuple[list[Any], Any]:
        async with client(kitchen).responses.stream(**BASE, tools=[TOOL, OTHER]) as stream:
            events = [event async for event in stream]
            answer = await stream.get_final_response()
        follow = [*HELLO, *answer.output, *HELLO]
        follow += [
            {"type": "function_call_output", "call_id": answer.output[2].call_id, "output": "a"}
        ]
        await client(kitchen).responses.create(input=follow, model="gemma")
        return events, answer

    events, answer = run(ask())
    thought, text, look, hear = answer.output
    assert thought.content[0].text == "Hm."
    assert text.content[0].text == "Looking."
    assert (look.name, look.arguments, look.parsed_arguments) == ("look", '{"at":"sky"}', None)
    assert (hear.name, hear.arguments) == ("hear", "{}")
    assert look.call_id.startswith("call_")
    assert len({look.call_id, hear.call_id}) == 2
    assert answer.status == "completed"
    deltas = [e for e in events if e.type == "response.output_text.delta"]
    assert [event.snapshot for event in deltas] == ["Look", "Looking."]
    said = kitchen.requests[1].messages[1]
    assert (said["reasoning"], said["content"], len(said["tool_calls"])) == ("Hm.", "Looking.", 2)


ORDER = {
    "message": ["content_part.added", "output_text.delta", "output_text.done", "content_part.done"],
    "reasoning": [
        "content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done",
    ],
    "summary": [
        "reasoning_summary_part.added", "reasoning_summary_text.delta",
        "reasoning_summary_text.done", "reasoning_summary_part.done",
    ],
    "function_call": ["function_call_arguments.delta", "function_call_arguments.done"],
}  # fmt: skip


@pytest.mark.parametrize("summary", [None, "auto"])
def test_events_come_in_order_with_numbers_and_indices(summary):
    asked = BASE | {"stream": True, "reasoning": {"summary": summary}}
    events = events_of(post(FakeKitchen(SCRIPT), RESPONSES, asked))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert (kinds[:2], kinds[-1]) == (["created", "in_progress"], "completed")
    ids = {event["response"]["id"] for event in events if "response" in event}
    assert len(ids) == 1
    output = events[-1]["response"]["output"]
    for index, item in enumerate(output):
        about = [event for event in events if event.get("output_index") == index]
        names = list(dict.fromkeys(event["type"].removeprefix("response.") for event in about))
        kind = "summary" if item["type"] == "reasoning" and summary else item["type"]
        assert names == ["output_item.added", *ORDER[kind], "output_item.done"]
        assert {event["item_id"] for event in about[1:-1]} == {item["id"]}
        assert about[0]["item"] | {"status": "completed"} != item
        assert about[-1]["item"] == item
    assert "[DONE]" not in kinds


def test_a_summary_holds_what_was_thought_where_one_is_asked_for():
    answer = post(FakeKitchen(SCRIPT), RESPONSES, BASE | {"reasoning": {"summary": "auto"}}).json()
    thought = answer["output"][0]
    assert (thought["summary"], thought["content"]) == (
        [{"type": "summary_text", "text": "Hm."}],
        [],
    )


def test_an_answer_that_was_cut_off_is_incomplete():
    kitchen = FakeKitchen([*content("a"), *call("look", '{"at'), end("length")])
    answer = post(kitchen, RESPONSES, BASE).json()
    last = events_of(post(kitchen, RESPONSES, BASE | {"stream": True}))[-1]
    assert last["type"] == "response.incomplete"
    for response in (answer, last["response"]):
        assert response["status"] == "incomplete"
        assert response["incomplete_details"] == {"reason": "max_output_tokens"}
        assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]


def test_log_probabilities_belong_to_the_text_that_their_tokens_make():
    def token(text: str, logprob: float) -> TokenLogprob:
        top = (TokenLogprob(1, "x", b"x", float("-inf")),)
        return TokenLogprob(7, text, text.encode(), logprob, top)

    script = [
        Update(0, [Delta("reasoning", "Hm.")], logprobs=[token("Hm.", -0.1)]),
        Update(0, logprobs=[token("<", -0.2)]),
        Update(0, [Delta("content", "<é")], logprobs=[token("é", -0.5)]),
        Update(0, logprobs=[token("E", -0.7)]),  # the beginning of a stop string, say
        end(),
    ]
    asked = BASE | {"top_logprobs": 1, "include": ["message.output_text.logprobs"]}
    kitchen = FakeKitchen(script)
    whole = post(kitchen, RESPONSES, asked).json()["output"][1]["content"][0]["logprobs"]
    events = events_of(post(kitchen, RESPONSES, asked | {"stream": True}))
    deltas = [e["logprobs"] for e in events if e["type"] == "response.output_text.delta"]
    top = [{"token": "x", "logprob": -9999.0, "bytes": [120]}]
    expected = [
        {"token": "<", "logprob": -0.2, "bytes": [60], "top_logprobs": top},
        {"token": "é", "logprob": -0.5, "bytes": [195, 169], "top_logprobs": top},
        {"token": "E", "logprob": -0.7, "bytes": [69], "top_logprobs": top},
    ]
    assert whole == expected
    assert deltas == [expected[:2], expected[2:]]
    assert kitchen.requests[0].logprobs == 1


class Point(pydantic.BaseModel):
    x: int
    y: int


def test_the_client_parses_an_answer_of_a_schema():
    kitchen = FakeKitchen([*content('{"x": 1,', ' "y": 2}'), end()])

    async def ask() -> tuple[Any, Any]:
        whole = await client(kitchen).responses.parse(**BASE, text_format=Point)
        async with client(kitchen).responses.stream(**BASE, text_format=Point) as stream:
            return whole, await stream.get_final_response()

    for answer in run(ask()):
        assert answer.output_parsed == Point(x=1, y=2)
    grammar = kitchen.requests[0].grammar
    schema, strict = grammar.schema, grammar.strict
    assert set(schema["properties"]) == {"x", "y"}
    assert strict


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (
            ServeError(400, "a", code="context_length_exceeded", extra={"n_ctx": 7}),
            400,
            "BadRequestError",
        ),
        (ServeError(401, "a"), 401, "AuthenticationError"),
        (ServeError(404, "a", param="model"), 404, "NotFoundError"),
        (ServeError(429, "a", retry_after=2), 429, "RateLimitError"),
        (ServeError(503, "a"), 503, "InternalServerError"),
        (RuntimeError("secret"), 500, "InternalServerError"),
    ],
)
def test_errors_have_the_shape_of_this_api(error, status, kind):
    async def ask() -> None:
        await client(FakeKitchen(error=error)).responses.create(**BASE)

    with pytest.raises(openai.APIStatusError) as raised:
        run(ask())
    assert (type(raised.value).__name__, raised.value.status_code) == (kind, status)
    body = raised.value.body
    assert {"message", "type", "param", "code"} <= set(body)
    assert "secret" not in json.dumps(body)
    if isinstance(error, ServeError):
        assert (body["param"], body["code"]) == (error.param, error.code)
        assert body.get("n_ctx") == error.extra.get("n_ctx")


@pytest.mark.parametrize(
    ("last", "code"),
    [
        ([end("error", error=ServeError(429, "full"))], "rate_limit_exceeded"),
        ([end("abort")], "server_error"),
        ([RuntimeError("secret")], "server_error"),
        ([], "server_error"),
    ],
)
def test_an_answer_that_fails_says_so_in_each_form(last, code):
    kitchen = FakeKitchen([*content("a"), *last])
    assert post(kitchen, RESPONSES, BASE).status_code >= 429
    events = events_of(post(kitchen, RESPONSES, BASE | {"stream": True}))
    response = events[-1]["response"]
    assert (events[-1]["type"], response["status"]) == ("response.failed", "failed")
    assert response["error"]["code"] == code
    assert response["output"][0]["content"][0]["text"] == "a"
    assert "secret" not in json.dumps(events)
    assert all(answers.cancels for answers in kitchen.answers)
