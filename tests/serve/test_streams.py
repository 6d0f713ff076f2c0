"""What holds for every protocol: re-assembly, transcripts, bad bodies, clients that leave."""

import asyncio
import copy
import json
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve.fake import Caller, FakeAnswers, FakeKitchen, app_of, content, end, events_of, run
from serve.transcripts import FOLDER, GIVEN, replay

from gemlax.serve.anthropic import PING
from gemlax.serve.sse import EventStream
from gemlax.serve.work import Delta, Update, Usage

HELLO = [{"role": "user", "content": "Hello"}]
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/messages": {"model": "gemma", "max_tokens": 64, "messages": HELLO},
    "/v1/responses": {"model": "gemma", "input": HELLO},
}
paths = pytest.mark.parametrize("path", REQUESTS)


async def ask(app: Any, path: str, *bodies: Any) -> list[Any]:
    """The responses to some bodies, one after another."""
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return [await client.post(path, content=body) for body in bodies]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_a_transcript_is_answered_as_it_was(path):
    transcript = json.loads(path.read_text("utf-8"))
    given = {key: transcript.pop(key) for key in GIVEN}
    assert replay(given) == transcript


@st.composite
def split(draw: Any, text: str) -> list[str]:
    """A text in pieces, some of them empty."""
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=3)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


words = st.text('aé😀 {}[]"\\\n', max_size=6)
arguments = st.dictionaries(words, st.integers() | words | st.none(), max_size=2).map(json.dumps)


@st.composite
def segments(draw: Any) -> list[Delta]:
    """The deltas of a stretch of text or reasoning, or of a call."""
    kind = draw(st.sampled_from(["content", "reasoning", "call"]))
    if kind != "call":
        return [Delta(kind, piece) for piece in draw(words.flatmap(split))]
    pieces = draw(st.just([]) | arguments.flatmap(split))
    return [Delta("call", "look"), *(Delta("arguments", piece) for piece in pieces)]


@st.composite
def updates(draw: Any) -> list[Update]:
    """A whole answer, its deltas spread over updates at random."""
    deltas = [delta for segment in draw(st.lists(segments(), max_size=5)) for delta in segment]
    listed: list[Update] = []
    while deltas:
        count = draw(st.integers(1, len(deltas)))
        listed += [Update(0, deltas[:count]), Update(0, usage=Usage(prompt=5))]
        deltas = deltas[count:]
    stop = draw(st.none() | st.just("END"))
    last = end(draw(st.sampled_from(["stop", "length", "tool_calls"])), stop=stop)
    return [*listed, last]


def message_of(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that the events of Anthropic's API make."""
    message, texts = copy.deepcopy(events[0]["message"]), {}
    fields = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature"}
    for event in events[1:]:
        blocks = message["content"]
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(dict(event["content_block"]))
            texts[event["index"]] = ""
        elif event["type"] == "content_block_delta":
            assert event["index"] == len(blocks) - 1
            delta = event["delta"]
            if delta["type"] == "input_json_delta":
                texts[event["index"]] += delta["partial_json"]
            else:
                name = fields[delta["type"]]
                blocks[-1][name] += delta[name]
        elif event["type"] == "content_block_stop":
            if blocks[-1]["type"] == "tool_use":
                blocks[-1]["input"] = json.loads(texts[event["index"]] or "{}")
        elif event["type"] == "message_delta":
            message |= event["delta"] | {"usage": event["usage"]}
    assert events[-1]["type"] == "message_stop"
    return message


def response_of(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The response that the events of OpenAI's API make; its items from their deltas."""
    items: dict[int, dict[str, Any]] = {}
    for event in events:
        name, index = event["type"].removeprefix("response."), event.get("output_index")
        if name == "output_item.added":
            assert index == len(items)
            items[index] = copy.deepcopy(event["item"])
        elif name == "content_part.added":
            items[index]["content"].append(dict(event["part"]))
        elif name == "function_call_arguments.delta":
            items[index]["arguments"] += event["delta"]
        elif name.endswith("text.delta"):
            items[index]["content"][event["content_index"]]["text"] += event["delta"]
        elif name == "output_item.done":
            items[index]["status"] = event["item"]["status"]
    return events[-1]["response"] | {"output": list(items.values())}


ASSEMBLE = {"/v1/messages": message_of, "/v1/responses": response_of}


def without_ids(value: Any) -> Any:
    """A value of JSON without ids and times."""
    if isinstance(value, list):
        return [without_ids(item) for item in value]
    if isinstance(value, dict):
        dropped = ("id", "call_id", "created_at", "completed_at")
        return {key: without_ids(item) for key, item in value.items() if key not in dropped}
    return value


@paths
@settings(max_examples=40)
@given(script=updates())
def test_a_stream_makes_the_body_that_is_not_streamed(path, script):
    request = REQUESTS[path]
    bodies = [json.dumps(request | {"stream": stream}) for stream in (True, False)]
    stream, whole = run(ask(app_of(FakeKitchen(script)), path, *bodies))
    assert without_ids(ASSEMBLE[path](events_of(stream))) == without_ids(whole.json())


@paths
def test_arguments_without_a_call_are_an_error_not_an_answer(path):
    script = [*content("a"), Update(0, [Delta("arguments", "{}")]), end()]
    (response,) = run(ask(app_of(FakeKitchen(script)), path, json.dumps(REQUESTS[path])))
    assert response.status_code == 500


BROKEN = {
    "nothing": b"",
    "a list": b"[]",
    "cut": b'{"model": "gem',
    "bytes that are no UTF-8": b'{"model": "\xff"}',
    "a surrogate": b'{"model": "\\ud800"}',
    "a surrogate before a letter": b'{"model": "\\ud800a"}',
    "NaN": b'{"temperature": NaN}',
    "1e400": b'{"temperature": 1e400}',
    "many lists": b"[" * 100_000,
    "a deep value": b'{"metadata": {"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}}",
    "a deep schema": b'{"tools": [{"name": "a", "input_schema": {"a": ' + b"[" * 100_000,
    "text behind": b"{} {}",
    "a mark of byte order": b"\xef\xbb\xbf{}",
}


@paths
@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
def test_a_broken_body_is_one_short_400(path, body):
    kitchen = FakeKitchen()
    (response,) = run(ask(app_of(kitchen), path, body))
    assert response.status_code == 400
    assert 0 < len(response.json()["error"]["message"]) < 400
    assert not kitchen.requests


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a value."""
    inner = enumerate(value) if isinstance(value, list) else ()
    inner = value.items() if isinstance(value, dict) else inner
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def replaced(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    changed = copy.copy(value)
    changed[place[0]] = replaced(value[place[0]], place[1:], new)
    return changed


VALID = [
    transcript
    for file in sorted(FOLDER.glob("*.json"))
    if not (transcript := json.loads(file.read_text("utf-8")))["path"].endswith("count_tokens")
]
odd = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=100)
@given(transcript=st.sampled_from(VALID), data=st.data())
def test_a_request_with_an_odd_value_anywhere_is_never_our_fault(transcript, data):
    request = transcript["request"]
    place = data.draw(st.sampled_from(places(request)[1:]))
    changed = replaced(request, place, data.draw(odd))
    (response,) = run(ask(app_of(FakeKitchen()), transcript["path"], json.dumps(changed)))
    assert response.status_code in (200, 400)
    if response.status_code == 400:
        assert len(response.json()["error"]["message"]) < 400


@paths
@pytest.mark.parametrize("stream", [False, True])
def test_breakage_1_a_client_that_leaves_the_queue_is_not_admitted(path, stream):
    async def leave() -> FakeKitchen:
        kitchen = FakeKitchen(gate=asyncio.Event())
        caller = Caller(kitchen, path, REQUESTS[path] | {"stream": stream})
        await caller.until(lambda: bool(kitchen.requests))
        await caller.leave()
        assert b"Hello" not in caller.sent
        return kitchen

    kitchen = run(leave())
    assert (kitchen.cancelled_waits, kitchen.answers) == (1, [])


@paths
@pytest.mark.parametrize("stream", [False, True])
def test_breakage_1_an_answer_is_cancelled_when_its_client_leaves(path, stream):
    async def leave() -> FakeAnswers:
        tasks = asyncio.all_tasks()
        kitchen = FakeKitchen([*content("Hello"), asyncio.Event(), *content("never"), end()])
        caller = Caller(kitchen, path, REQUESTS[path] | {"stream": stream})
        await caller.until(lambda: bool(kitchen.answers) and kitchen.answers[0].taken == 1)
        if stream:
            await caller.until(lambda: b"Hello" in caller.sent)
        await caller.leave()
        assert b"never" not in caller.sent
        assert asyncio.all_tasks() == tasks, "a task of the request lives on"
        return kitchen.answers[0]

    answers = run(leave())
    assert answers.cancels
    assert answers.taken == 1


@paths
def test_the_first_bytes_of_a_stream_come_before_the_first_token(path):
    async def begin() -> bytes:
        kitchen = FakeKitchen([asyncio.Event(), *content("never"), end()])
        caller = Caller(kitchen, path, REQUESTS[path] | {"stream": True})
        await caller.until(lambda: caller.sent.endswith(b"\n\n"))
        await caller.leave()
        return caller.sent

    assert run(begin()).startswith((b"event: message_start\n", b"event: response.created\n"))


async def forever() -> Any:
    await asyncio.Event().wait()


def test_a_silent_stream_pings_and_a_busy_one_does_not():
    async def listen() -> tuple[list[bytes], float]:
        sent: list[bytes] = []
        times: list[float] = []
        silence = asyncio.Event()

        async def events() -> Any:
            yield b"a"
            await asyncio.sleep(0.03)
            yield b"b"
            await silence.wait()
            yield b"c"

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))
            times.append(asyncio.get_running_loop().time())
            if sent.count(PING) == 2 and b"b" in sent:
                silence.set()

        answers = FakeAnswers([], [[1]], 1, "gemma")
        stream = EventStream(events(), answers, ping=PING, ping_seconds=0.05)
        await stream({}, forever, send)
        assert answers.cancels == 1
        b = sent.index(b"b")
        return sent, times[sent.index(PING, b)] - times[b]

    assert PING == b'event: ping\ndata: {"type":"ping"}\n\n'
    sent, quiet = run(listen())
    assert [part for part in sent if part != PING] == [b"", b"a", b"b", b"c", b""]
    assert quiet >= 0.05


def test_the_events_of_a_client_that_reads_nothing_end_when_it_leaves():
    async def leave() -> list[str]:
        ended: list[str] = []

        async def events() -> Any:
            try:
                yield b"a"
            finally:
                ended.append("events")

        gone = asyncio.Event()

        async def receive() -> Any:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if "body" in message:
                gone.set()
                await forever()

        await EventStream(events(), FakeAnswers([], [[1]], 1, "gemma"))({}, receive, send)
        return list(ended)

    assert run(leave()) == ["events"]
