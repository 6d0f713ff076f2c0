"""Anthropic's Messages API, with scripted answers and the official client."""

import json
from typing import Any

import anthropic
import httpx2
import pydantic
import pytest
from serve.fake import (
    SIGNING_KEY,
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
from gemlax.serve.anthropic_wire import Signer
from gemlax.serve.work import ServeError, Usage

MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"name": "look", "description": "Looks.", "input_schema": {"type": "object"}}
BASE: dict[str, Any] = {"model": "gemma", "max_tokens": 2048, "messages": HELLO}
SIGNED = Signer(SIGNING_KEY).sign("Hm.")


def client(kitchen: FakeKitchen) -> anthropic.AsyncAnthropic:
    transport = httpx2.ASGITransport(app_of(kitchen))
    http = anthropic.DefaultAsyncHttpxClient(transport=transport)
    return anthropic.AsyncAnthropic(
        base_url="http://localhost", api_key="k", http_client=http, max_retries=0
    )


def asked(**changes: Any) -> Any:
    """What the kitchen is asked for a request with these fields."""
    kitchen = FakeKitchen()
    response = post(kitchen, MESSAGES, BASE | changes)
    assert response.status_code == 200, response.text
    return kitchen.asked


def refused(path: str = MESSAGES, **changes: Any) -> str:
    """The message of the error that a request with these fields gets."""
    kitchen = FakeKitchen()
    response = post(kitchen, path, BASE | changes)
    body = response.json()
    assert (response.status_code, body["type"]) == (400, "error")
    assert body["error"]["type"] == "invalid_request_error"
    assert body["request_id"] == response.headers["request-id"]
    assert not kitchen.requests
    return body["error"]["message"]


def test_a_request_becomes_a_chat_request():
    request = asked(
        temperature=0.5,
        top_k=4,
        top_p=0.9,
        stop_sequences=["END"],
        metadata={"user_id": "u"},
        unknown_field={"a": 1},
        system=None,
        tools=None,
    )
    expected = {"max_new_tokens": 2048, "temperature": 0.5, "top_k": 4, "top_p": 0.9}
    assert request.settings == expected | {"stop": ("END",)}
    assert request.messages == HELLO
    assert (request.model, request.n, request.tool_choice) == ("gemma", 1, "auto")
    assert request.thinking is None
    assert request.grammar is None


def test_a_system_prompt_is_text_or_blocks_and_takes_in_leading_system_messages():
    text = asked(system="Be brief.").messages[0]
    blocks = asked(
        system=[{"type": "text", "text": "Be", "cache_control": {"type": "ephemeral"}}],
        messages=[{"role": "system", "content": "brief."}, *HELLO],
    ).messages
    later = asked(messages=[*HELLO, {"role": "system", "content": "Now."}]).messages
    assert text == {"role": "system", "content": "Be brief."}
    assert blocks == [{"role": "system", "content": "Be\n\nbrief."}, *HELLO]
    assert later == [*HELLO, {"role": "system", "content": "Now."}]


@pytest.mark.parametrize("rest", ["", "\nBe brief."])
def test_breakage_13_the_billing_line_of_claude_code_is_dropped(rest):
    line = "x-anthropic-billing-header: cc_version=2; cch=3f81a;"
    blocks = [{"type": "text", "text": line + rest}, {"type": "text", "text": "You code."}]
    said = asked(system=blocks).messages[0]["content"]
    assert said == "\n\n".join([part for part in (rest.strip(), "You code.") if part])
    assert asked(system=line).messages == HELLO


def test_calls_and_results_become_messages_of_tools_before_what_the_user_says():
    use = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"at": "sky"}}
    other = {"type": "tool_use", "id": "toolu_2", "name": "hear", "input": {}}
    parts = [{"type": "text", "text": "Blue."}, {"type": "text", "text": "Sure."}]
    results = [
        {"type": "text", "text": "And?"},
        {"type": "tool_result", "tool_use_id": "toolu_2", "content": "Nothing", "is_error": True},
        {"type": "tool_result", "tool_use_id": "toolu_1", "content": parts},
    ]
    messages = asked(
        tools=[TOOL],
        messages=[
            *HELLO,
            {"role": "assistant", "content": [{"type": "text", "text": "I look."}, use, other]},
            {"role": "user", "content": results},
        ],
    ).messages
    calls = [(one["id"], one["function"]) for one in messages[1]["tool_calls"]]
    assert messages[1]["content"] == "I look."
    assert calls == [
        ("toolu_1", {"name": "look", "arguments": {"at": "sky"}}),
        ("toolu_2", {"name": "hear", "arguments": {}}),
    ]
    tool = {"role": "tool"}
    assert messages[2:] == [
        tool | {"tool_call_id": "toolu_2", "name": "hear", "content": "Error: Nothing"},
        tool | {"tool_call_id": "toolu_1", "name": "look", "content": "Blue.\nSure."},
        {"role": "user", "content": "And?"},
    ]


def test_turns_of_one_side_become_one():
    messages = asked(messages=[*HELLO, *HELLO, {"role": "assistant", "content": "A"}] * 2).messages
    assert [one["content"] for one in messages] == ["Hello\n\nHello", "A"] * 2
    halves = [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]
    begun = asked(messages=[*HELLO, {"role": "assistant", "content": halves}]).messages[-1]
    assert begun == {"role": "assistant", "content": "AB"}  # is continued where it stands


def test_only_thoughts_that_this_server_signed_come_back():
    def thought(text: str, signature: str | None) -> list[dict[str, Any]]:
        block = {"type": "thinking", "thinking": text, "signature": signature}
        hidden = {"type": "redacted_thinking", "data": "abc"}
        answer = {"role": "assistant", "content": [hidden, block, {"type": "text", "text": "A"}]}
        return asked(messages=[*HELLO, answer, *HELLO]).messages[1]

    answer = {"role": "assistant", "content": "A"}
    assert thought("Hm.", SIGNED) == answer | {"reasoning": "Hm."}
    foreign = Signer(b"another key").sign("Hm.")
    for text, signature in (("Ha.", SIGNED), ("Hm.", foreign), ("Hm.", "é"), ("Hm.", None)):
        assert thought(text, signature) == answer


@pytest.mark.parametrize(
    ("choice", "expected", "parallel"),
    [
        (None, "auto", True),
        ({"type": "auto"}, "auto", True),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", False),
        ({"type": "any"}, "required", True),
        ({"type": "none"}, "none", True),
        ({"type": "tool", "name": "look"}, {"name": "look"}, True),
    ],
)
def test_a_choice_of_tools_is_passed_on(choice, expected, parallel):
    request = asked(tools=[TOOL | {"type": "custom", "strict": True}], tool_choice=choice)
    function = {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}
    assert request.tools == [{"type": "function", "function": function | {"strict": True}}]
    assert (request.tool_choice, request.parallel_tool_calls) == (expected, parallel)


@pytest.mark.parametrize(
    ("config", "effort", "expected"),
    [
        ({"type": "enabled", "budget_tokens": 1024}, None, (True, 1024)),
        ({"type": "adaptive"}, None, (True, None)),
        ({"type": "adaptive"}, "low", (True, 1024)),
        ({"type": "disabled"}, "high", (False, None)),
        (None, "high", (None, None)),
    ],
)
def test_thinking_has_a_budget(config, effort, expected):
    request = asked(thinking=config, output_config={"effort": effort})
    assert (request.thinking, request.thinking_budget) == expected


def test_a_form_of_output_becomes_a_grammar():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "schema": schema}
    assert asked(output_config={"format": form}).grammar == JsonSchema(schema, strict=True)
    assert asked(output_format=form).grammar == JsonSchema(schema, strict=True)


def message(*blocks: dict[str, Any], role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": list(blocks)}]


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": "7"}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"stop_sequences": ["a", ""]}, "stop_sequences[1]"),
        ({"stop_sequences": "a"}, "stop_sequences"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": message({"type": "image", "source": {}})}, "messages[0].content[0].type"),
        ({"messages": message({"type": "text"})}, "messages[0].content[0].text"),
        ({"messages": message({"type": "text", "text": 1})}, "messages[0].content[0].text"),
        (
            {"messages": message({"type": "tool_use", "id": "a", "name": "b", "input": {}})},
            "messages[0].content[0].type",
        ),
        (
            {"messages": message({"type": "tool_result", "tool_use_id": "a"})},
            "messages[0].content[0].tool_use_id",
        ),
        (
            {"messages": message({"type": "server_tool_use", "id": "a"}, role="assistant")},
            "messages[0].content[0].type",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "look"}]}, "tools[0].input_schema"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool", "name": "b"}, "tools": [TOOL]}, "tool_choice.name"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"output_config": {"format": {"type": "regex"}}}, "output_config.format.type"),
    ],
)
def test_a_field_that_is_wrong_or_cannot_be_honoured_is_named(changes, where):
    assert refused(**changes).startswith(f"{where}: ")


def test_a_body_of_mistakes_gets_one_short_error():
    many = [{"role": "user", "content": [{"type": "x" * 5000}]}] * 5000
    assert len(refused(messages=many)) < 200


def test_the_client_reads_an_answer():
    script = [*content("Hel", "lo"), end(stop="END", usage=Usage(9, 4, 2, 0))]

    async def ask() -> Any:
        return await client(FakeKitchen(script)).messages.create(**BASE)

    answer = run(ask())
    assert answer.id.startswith("msg_")
    assert len(answer.id) == 28
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "END")
    assert [block.text for block in answer.content] == ["Hello"]
    usage = answer.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (5, 4, 2)
    assert answer._request_id.startswith("req_")


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (end("stop"), "end_turn"),
        (end("stop", stop=7), "end_turn"),
        (end("length"), "max_tokens"),
        (end("tool_calls"), "tool_use"),
    ],
)
def test_an_answer_says_why_it_ended(last, expected):
    kitchen = FakeKitchen([*content("a"), last])
    assert post(kitchen, MESSAGES, BASE).json()["stop_reason"] == expected
    delta = events_of(post(kitchen, MESSAGES, BASE | {"stream": True}))[-2]
    assert delta["delta"] == {"stop_reason": expected, "stop_sequence": None}


def test_the_client_streams_thoughts_text_and_calls():
    script = [
        *reasoning("H", "m."),
        *content("Look", "ing."),
        *call("look", '{"at":', '"sk', 'y"}'),
        *call("hear"),
        end("tool_calls", usage=Usage(9, 4, 20, 3)),
    ]
    kitchen = FakeKitchen(script)

    async def ask() -> tuple[list[str], Any]:
        async with client(kitchen).messages.stream(**BASE, tools=[TOOL]) as stream:
            kinds = [event.type async for event in stream]
            answer = await stream.get_final_message()
        follow = [*HELLO, answer.to_param() | {"role": "assistant"}, *HELLO]
        await client(kitchen).messages.create(**BASE | {"messages": follow})
        return kinds, answer

    kinds, answer = run(ask())
    thought, text, look, hear = answer.content
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 4
    assert (thought.thinking, thought.signature) == ("Hm.", SIGNED)
    assert text.text == "Looking."
    assert (look.name, look.input, hear.name, hear.input) == ("look", {"at": "sky"}, "hear", {})
    assert look.id.startswith("toolu_")
    assert len({look.id, hear.id}) == 2
    assert answer.stop_reason == "tool_use"
    assert answer.usage.input_tokens == 5
    assert answer.usage.output_tokens_details.thinking_tokens == 3
    # What the client sends back is what the model said.
    said = kitchen.requests[1].messages[1]
    assert (said["reasoning"], said["content"], len(said["tool_calls"])) == ("Hm.", "Looking.", 2)


def test_every_block_begins_and_ends_under_indices_without_gaps():
    script = [*content("a", ""), *reasoning(""), *call("look", "{}"), *content("b"), end()]
    events = events_of(post(FakeKitchen(script), MESSAGES, BASE | {"stream": True}))
    blocks = [(e["type"][14:], e["index"]) for e in events if e["type"].startswith("content_block")]
    steps = ["start", "delta", "stop"]
    assert blocks == [(step, index) for index in range(3) for step in steps]
    assert events[0]["message"]["usage"]["input_tokens"] == 5
    starts = [e["content_block"] for e in events if e["type"] == "content_block_start"]
    assert starts[1]["input"] == {}


def test_hidden_thoughts_are_not_sent():
    thinking = {"type": "adaptive", "display": "omitted"}
    kitchen = FakeKitchen([*reasoning("Hm."), *content("a"), end()])
    whole = post(kitchen, MESSAGES, BASE | {"thinking": thinking})
    stream = post(kitchen, MESSAGES, BASE | {"thinking": thinking, "stream": True})
    assert "Hm." not in whole.text + stream.text
    assert [block["type"] for block in whole.json()["content"]] == ["thinking", "text"]


def test_a_call_that_was_cut_off_has_no_input():
    kitchen = FakeKitchen([*call("look", '{"at": "s'), end("length")])
    answer = post(kitchen, MESSAGES, BASE).json()
    assert (answer["stop_reason"], answer["content"][0]["input"]) == ("max_tokens", {})


class Point(pydantic.BaseModel):
    x: int
    y: int


def test_the_client_parses_an_answer_of_a_schema():
    kitchen = FakeKitchen([*content('{"x": 1,', ' "y": 2}'), end()])

    async def ask() -> tuple[Any, Any]:
        whole = await client(kitchen).messages.parse(**BASE, output_format=Point)
        async with client(kitchen).messages.stream(**BASE, output_format=Point) as stream:
            return whole, await stream.get_final_message()

    for answer in run(ask()):
        assert answer.parsed_output == Point(x=1, y=2)
    assert set(kitchen.requests[0].grammar.schema["properties"]) == {"x", "y"}


def test_tokens_are_counted_without_an_answer():
    kitchen = FakeKitchen(prompts=[[1] * 42])

    async def ask() -> Any:
        return await client(kitchen).messages.count_tokens(
            model="gemma", messages=HELLO, system="Be brief.", tools=[TOOL]
        )

    assert run(ask()).input_tokens == 42
    assert kitchen.asked.messages[0]["role"] == "system"
    assert not kitchen.answers
    assert refused(COUNT, messages=[]).startswith("messages: ")


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (ServeError(400, "a"), 400, "invalid_request_error"),
        (ServeError(401, "a"), 401, "authentication_error"),
        (ServeError(403, "a"), 403, "permission_error"),
        (ServeError(404, "a"), 404, "not_found_error"),
        (ServeError(413, "a"), 413, "request_too_large"),
        (ServeError(422, "a"), 422, "invalid_request_error"),
        (ServeError(429, "a", retry_after=2.4), 529, "overloaded_error"),
        (ServeError(429, "a", code="rate_limit_exceeded"), 429, "rate_limit_error"),
        (ServeError(503, "a", retry_after=0.2), 529, "overloaded_error"),
        (ServeError(500, "a"), 500, "api_error"),
        (RuntimeError("secret"), 500, "api_error"),
    ],
)
def test_errors_have_the_shape_of_this_api(error, status, kind):
    response = post(FakeKitchen(error=error), MESSAGES, BASE, {"x-request-id": "mine"})
    body = response.json()
    assert (response.status_code, body["type"], body["error"]["type"]) == (status, "error", kind)
    assert (body["request_id"], response.headers["request-id"]) == ("mine", "mine")
    assert "secret" not in response.text
    waits = error.retry_after if isinstance(error, ServeError) else None
    assert response.headers.get("retry-after") == (waits and str(max(1, round(waits))))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "last",
    [
        end("error", error=ServeError(503, "full")),
        end("abort"),
        RuntimeError("secret"),
        ServeError(500, "broken"),
    ],
)
def test_an_answer_that_fails_raises_in_the_client(stream, last):
    kitchen = FakeKitchen([*content("a"), last])

    async def ask() -> None:
        answer = await client(kitchen).messages.create(**BASE, stream=stream)
        async for event in answer:
            assert event.type != "message_stop"

    with pytest.raises(anthropic.APIStatusError) as raised:
        run(ask())
    expected = "api_error" if isinstance(last, Exception) else "overloaded_error"
    assert raised.value.body["error"]["type"] == expected
    assert "secret" not in json.dumps(raised.value.body)
    assert kitchen.answers[0].cancels


def test_a_stream_without_an_end_is_an_error():
    kitchen = FakeKitchen(content("a"))
    assert events_of(post(kitchen, MESSAGES, BASE | {"stream": True}))[-1]["type"] == "error"
    assert post(kitchen, MESSAGES, BASE).status_code == 500


def test_an_id_that_cannot_be_shown_is_not_taken_over():
    for given in ("", "x" * 129, "caf\xe9"):
        response = post(FakeKitchen(), MESSAGES, BASE, {"x-request-id": given.encode("latin-1")})
        assert response.headers["request-id"].startswith("req_")
