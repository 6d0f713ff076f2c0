"""What stands before the routes: keys, hosts, origins, sizes, deadlines, and bad bodies."""

import contextlib
import json
import re
import socket
import threading

import httpx2
import pytest
import uvicorn
from serve.fake import FakeKitchen, call, content, end, run
from serve.running import SECONDS, wait_until

from gemlax.serve.app import put_together
from gemlax.serve.http import guarded_protocol
from gemlax.serve.options import ServeOptions
from gemlax.serve.security import LOOPBACK, Gate
from gemlax.serve.work import Delta, ServeError, TokenLogprob, Update, Usage

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


def ask(path, body=None, *, kitchen=None, gate=None, headers=None, method=None, **options):
    """Ask an application without a socket."""
    app = put_together(kitchen or FakeKitchen(), gate or Gate(), ServeOptions(**options))

    async def send():
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            kind = method or ("GET" if body is None else "POST")
            return await client.request(kind, path, content=data, headers=headers)

    return run(send())


@contextlib.contextmanager
def socket_server(kitchen=None, **options):
    """Serve a scripted kitchen on a free port; yields a function that connects."""
    given = ServeOptions(**options)
    app = put_together(kitchen or FakeKitchen(), Gate(), given)
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, http=guarded_protocol(given), ws="none", lifespan="off",
                       log_config=None)
    )  # fmt: skip
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started, "the server")
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield lambda: socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(SECONDS)


def read_all(connection):
    """What comes until the server closes."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/v1/messages"])
def test_each_api_has_its_own_shape_of_errors(path):
    answered = ask(path, HELLO, gate=Gate(["right"]))
    assert answered.status_code == 401
    error = answered.json()
    assert error["error"]["type"] == "authentication_error"
    assert (error.get("type") == "error") == (path == "/v1/messages")


def test_a_key_is_taken_from_either_header_and_stands_for_its_owner():
    gate, kitchen = Gate(["right", "other"]), FakeKitchen()
    for headers in (
        {"authorization": "Bearer right"}, {"x-api-key": "right"}, {"authorization": "bearer other"}
    ):  # fmt: skip
        assert ask(CHAT, HELLO, gate=gate, kitchen=kitchen, headers=headers).status_code == 200
    first, second, third = (request.key_id for request in kitchen.requests)
    assert first == second != third
    assert "right" not in first and first
    for headers in (
        {}, {"authorization": "Bearer wrong"}, {"authorization": "right"}, {"x-api-key": ""}
    ):  # fmt: skip
        assert ask(CHAT, HELLO, gate=gate, headers=headers).status_code == 401
    assert ask("/nothing", gate=gate).status_code == 401


def test_the_page_is_served_without_a_key_and_its_files_with_it():
    gate = Gate(["secret"])
    page = ask("/", gate=gate)
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    files = re.findall(r'(?:src|href)="(page/[^"]+)"', page.text)
    assert files
    assert {ask(f"/{file}", gate=gate).status_code for file in files} == {200}
    assert ask("/v1/models", gate=gate).status_code == 401


def test_a_server_of_this_machine_answers_only_to_its_own_names():
    """DNS rebinding: a foreign page that calls 127.0.0.1 by a name of its own."""
    gate = Gate(hosts=LOOPBACK)
    assert ask(CHAT, HELLO, gate=gate).status_code == 200
    for host in ("evil.example", "localhost.evil.example:80", ""):
        assert ask(CHAT, HELLO, gate=gate, headers={"host": host}).status_code == 403


def test_no_origin_is_reflected_unless_it_is_listed():
    """Breakage 30 (CORS reflected any origin with credentials)."""
    gate = Gate(origins=["https://example.org"])
    good, bad = {"origin": "https://example.org"}, {"origin": "https://localhost:444"}
    answered = ask(CHAT, HELLO, gate=gate, headers=good)
    assert answered.headers["access-control-allow-origin"] == good["origin"]
    assert "access-control-allow-credentials" not in answered.headers
    assert ask(CHAT, HELLO, gate=gate, headers=bad).status_code == 403
    wanted = {"access-control-request-method": "POST"}
    before = ask(CHAT, gate=gate, headers=good | wanted, method="OPTIONS")
    assert before.status_code == 204
    assert "POST" in before.headers["access-control-allow-methods"]
    refused = ask(CHAT, gate=gate, headers=bad | wanted, method="OPTIONS")
    assert refused.status_code == 403
    assert "access-control-allow-origin" not in refused.headers
    own = {"origin": "http://localhost"}
    assert ask(CHAT, HELLO, gate=Gate(), headers=own).status_code == 200


def test_a_request_id_is_echoed_if_it_can_be_shown():
    assert ask(CHAT, HELLO, headers={"x-request-id": "abc"}).headers["x-request-id"] == "abc"
    for bad in ("x" * 129, "a\tb"):
        answered = ask(CHAT, HELLO, headers={"x-request-id": bad})
        assert answered.headers["x-request-id"].startswith("req_")


BAD = [
    b"", b"{", b"[]", b"null", b"[" * 100_000,
    b'{"messages":' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    b'{"messages": [{"role": "user", "content": "\xff"}]}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e400}',
    b'{"messages": [{"role": "user", "content": "x"}], "n": "1"}',
    b'{"messages": [{"role": "user", "content": "x"}], "n": true}',
    b'{"messages": [{"role": "user", "content": 5}]}',
    b'{"messages": [{"role": "nobody", "content": "x"}]}',
    b'{"messages": {"role": "user"}}',
    b'{"messages": []}',
    b'{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "stop": [' + b'"a",' * 99 + b'"a"]}',
    b'{"messages": [{"role": "user", "content": "x"}], "stop": ""}',
]  # fmt: skip


@pytest.mark.parametrize("body", BAD, ids=range(len(BAD)))
def test_a_bad_body_gets_one_short_error(body):
    """Breakage 32 (`messages: []` generated until the client gave up), and vLLM's 23 MB."""
    kitchen = FakeKitchen()
    answered = ask(CHAT, body, kitchen=kitchen)
    assert answered.status_code == 400
    assert set(answered.json()) == {"error"}
    assert answered.json()["error"]["type"] == "invalid_request_error"
    assert len(answered.content) < 700
    assert not kitchen.requests


def test_the_path_of_what_is_wrong_is_told():
    body = {"messages": [{"role": "user", "content": "x"}, {"role": 1}]}
    error = ask(CHAT, body).json()["error"]
    assert error["param"] == "messages[1].role"
    assert "str" in error["message"]


def test_unknown_paths_and_methods_are_errors_of_the_api():
    for path, method, status in (("/v1/nosuch", "GET", 404), (CHAT, "GET", 405)):
        answered = ask(path, method=method)
        assert answered.status_code == status
        assert answered.json()["error"]["message"]


def test_a_failure_tells_nothing_of_the_request(caplog):
    kitchen = FakeKitchen(error=KeyError("a secret"))
    body = {"messages": [{"role": "user", "content": "a secret prompt"}]}
    answered = ask(CHAT, body, kitchen=kitchen)
    assert answered.status_code == 500
    assert "secret" not in answered.text
    assert "secret prompt" not in caplog.text


def test_a_busy_server_says_when_to_come_again():
    busy = FakeKitchen(error=ServeError(429, "busy", retry_after=3.2))
    answered = ask(CHAT, HELLO, kitchen=busy)
    assert answered.status_code == 429
    assert answered.headers["retry-after"] == "3"
    other = ask("/v1/messages", HELLO | {"max_tokens": 5, "model": "x"}, kitchen=busy)
    assert other.status_code in (429, 529)


def test_too_large_a_body_is_refused_before_it_is_read():
    assert ask(CHAT, b"x" * 1001, max_body=1000).status_code == 413
    with socket_server(max_body=1000) as connect:
        with connect() as connection:
            head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999\r\n\r\n"
            connection.sendall(head.encode())
            assert b" 413 " in connection.recv(4096)
        with connect() as connection:
            head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
            connection.sendall(head.encode() + b"400\r\n" + b"x" * 1024 + b"\r\n")
            assert b" 413 " in connection.recv(4096)
        assert ask(CHAT, HELLO).status_code == 200


def test_half_a_header_and_half_a_body_have_deadlines():
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\nabc"
    with (
        socket_server(header_timeout=0.2, body_timeout=0.2) as connect,
        connect() as idle,
        connect() as half,
        connect() as body,
    ):
        half.sendall(b"POST / HTTP/1.1\r\nhost: loc")
        body.sendall(head.encode())
        assert read_all(idle) == b""
        assert read_all(half) == b""
        assert b" 408 " in read_all(body)


def test_connections_are_capped_with_an_error_of_ours():
    with socket_server(max_connections=2) as connect:
        with connect(), connect() as second:
            second.sendall(b"GET /nothing HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert b" 404 " in second.recv(4096)
            with connect() as third:
                answer = read_all(third)
        assert b" 503 " in answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "connections"


def test_headers_without_end_are_refused():
    with socket_server() as connect, connect() as connection:
        head = "GET /health HTTP/1.1\r\nhost: localhost\r\n" + "".join(
            f"x-{number}: {'y' * 1000}\r\n" for number in range(80)
        )
        connection.sendall(head.encode() + b"\r\n")
        assert b" 431 " in connection.recv(4096)


def test_a_client_that_leaves_ends_its_answer():
    """Breakage 1 (disconnects not noticed), with scripted answers."""
    forever = content(*["word "] * 200_000)
    kitchen = FakeKitchen([*forever, end()])
    with socket_server(kitchen) as connect:
        with connect() as connection:
            body = json.dumps(HELLO | {"stream": True}).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            assert b"text/event-stream" in connection.recv(4096)
        wait_until(lambda: kitchen.answers and kitchen.answers[0].cancels, "a cancel")
        assert kitchen.answers[0].taken < 200_000


def test_tool_calls_have_the_shape_that_clients_need():
    script = [*content("So: "), *call("f", '{"a":', "1}"), *call("g", "{}"), end("tool_calls")]
    whole = ask(CHAT, HELLO, kitchen=FakeKitchen(script)).json()["choices"][0]
    assert whole["finish_reason"] == "tool_calls"
    first, second = whole["message"]["tool_calls"]
    assert first["function"] == {"name": "f", "arguments": '{"a":1}'}
    assert second["function"] == {"name": "g", "arguments": "{}"}
    assert first["id"] != second["id"] and len(first["id"]) == len("call_") + 24
    answered = ask(CHAT, HELLO | {"stream": True}, kitchen=FakeKitchen(script))
    assert answered.headers["x-accel-buffering"] == "no"
    lines = [line for line in answered.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines[:-1]]
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert [one["index"] for one in calls] == [0, 0, 0, 1, 1]
    assert [one.get("id") is not None for one in calls] == [True, False, False, True, False]
    assert calls[0]["type"] == "function" and calls[0]["function"]["arguments"] == ""


def test_ids_that_alone_may_come_reach_the_engine():
    kitchen = FakeKitchen()
    assert ask(CHAT, {**HELLO, "allowed_token_ids": [5, 6]}, kitchen=kitchen).status_code == 200
    assert kitchen.requests[0].settings["allowed_ids"] == [5, 6]


def test_an_error_in_a_stream_is_its_last_event():
    script = [*content("a"), end("error", error=ServeError(500, "it broke"))]
    answered = ask(CHAT, HELLO | {"stream": True}, kitchen=FakeKitchen(script))
    last = answered.text.strip().split("\n\n")[-1]
    assert json.loads(last[6:])["error"]["message"] == "it broke"
    assert ask(CHAT, HELLO, kitchen=FakeKitchen(script)).status_code == 500


def test_what_json_has_no_number_for_is_clipped():
    never = TokenLogprob(5, "\ufffd", b"\xc3", float("-inf"))
    script = [
        Update(0, [Delta("content", "x")], [5], [never._replace(top=(never,))], Usage()),
        end(),
    ]
    body = HELLO | {"logprobs": True, "top_logprobs": 1}
    entry = ask(CHAT, body, kitchen=FakeKitchen(script)).json()["choices"][0]["logprobs"]
    assert entry["content"][0]["logprob"] == -9999.0
    assert entry["content"][0]["bytes"] == [0xC3]


def test_reasoning_has_both_names():
    script = [Update(0, [Delta("reasoning", "hm")], [5]), *content("x"), end()]
    message = ask(CHAT, HELLO, kitchen=FakeKitchen(script)).json()["choices"][0]["message"]
    assert message["reasoning"] == message["reasoning_content"] == "hm"
    assert message["content"] == "x"
