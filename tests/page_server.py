"""The page before a server without a model: the last message chooses a scripted answer."""

import asyncio
import json
import threading

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from gemlax.serve import page

KEY = "sk-right"

MARKDOWN = """\
A **ring buffer** keeps the last *n* values in a fixed array; `i % n` says where the next one goes.

## In Python

```python
class Ring:
    def __init__(self, size: int):
        self.items, self.next = [None] * size, 0

    def push(self, item):
        self.items[self.next % len(self.items)] = item
        self.next += 1
```

1. Writing costs the same however long it runs:
   - no element moves
   - nothing is allocated
2. Reading begins at `next` once the ring is full.

| Operation | Array | Ring |
|:--|--:|--:|
| push | O(1) | O(1) |
| drop the oldest | O(n) | O(1) |

> The price: old values are gone for good.

See [the docs](https://docs.jax.dev/), never [this](javascript:alert(1)) or ![a](https://github.com/x.png).
"""

# A token, and the likeliest five in its place.
TOKENS = [
    ("The", "The -0.05|A -3.4|Its -4.6|Most -6.1|In -7.0"),
    (" capital", " capital -0.3| city -1.5| seat -4.0| heart -5.2| name -6.3"),
    (" of", " of -0.02| is -4.5|, -6.0| in -6.4| was -7.5"),
    (" France", " France -0.08| the -2.9| this -5.5| Gaul -7.1| Europe -7.7"),
    (" is", " is -0.1| was -2.9|, -3.6| has -4.9| lies -6.5"),
    (" lovely", " Paris -0.3| the -2.2| lovely -2.5| called -3.6| a -4.4"),
    (" Paris", " Paris -0.8| and -1.4| in -2.5|, -3.0| Lyon -5.0"),
    (".", ". -0.2|, -1.9|! -3.8|\n -4.3| on -5.0"),
]


class PageServer:
    """The page and a scripted API on a free port; `bodies` and `gone` tell what it saw."""

    def __init__(self, *, key: str | None = None, loading: bool = False, pace_s: float = 0):
        self.key, self.loading, self.pace_s = key, loading, pace_s
        self.bodies: list[dict] = []
        self.paths: list[str] = []
        self.gone: list[int] = []
        self.failures = 0  # the next answers are a 429
        self.made = 0
        handlers = {"/v1/models": self.models, "/props": self.props, "/metrics": self.metrics}
        routes = [Route(path, handler) for path, handler in handlers.items()]
        routes.append(Route("/v1/chat/completions", self.chat, methods=["POST"]))
        config = uvicorn.Config(
            Starlette(routes=[*page.routes(), *routes]),
            port=0,
            log_level="error",
            lifespan="off",
            ws="none",
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            self.thread.join(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/"
        return self

    def __exit__(self, *exc):
        self.server.force_exit = self.server.should_exit = True
        self.thread.join(10)

    def refuse(self, request: Request) -> Response | None:
        self.paths.append(request.url.path)
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return error(401, "No API key was given, or a wrong one.", code="invalid_api_key")
        if self.loading:
            return error(503, "The model is being loaded: 40 %.")
        return None

    async def models(self, request: Request) -> Response:
        data = [
            {"id": "gemma-3-270m-it", "object": "model", "parent": None, "max_model_len": 8192},
            {"id": "pirate", "object": "model", "parent": "gemma-3-270m-it"},
        ]
        return self.refuse(request) or JSONResponse({"object": "list", "data": data})

    async def props(self, request: Request) -> Response:
        params = {"temperature": 1.0, "top_p": 0.95, "top_k": 64, "min_p": 0.0, "max_tokens": -1}
        generation = {"n_ctx": 4096, "params": params}
        return self.refuse(request) or JSONResponse({"default_generation_settings": generation})

    async def metrics(self, request: Request) -> Response:
        label = '{engine="0",model_name="gemma-3-270m-it"}'
        values = {
            "num_requests_running": len(self.bodies) - len(self.gone) and 1,
            "num_requests_waiting": 0,
            "kv_cache_usage_perc": 0.3125,
            "generation_tokens_total": self.made,
            "prefix_cache_queries_total": 4000,
            "prefix_cache_hits_total": 3000,
        }
        lines = [f"vllm:{name}{label} {value}" for name, value in values.items()]
        return self.refuse(request) or PlainTextResponse("# HELP x y\n" + "\n".join(lines) + "\n")

    async def chat(self, request: Request) -> Response:
        if refused := self.refuse(request):
            return refused
        body = await request.json()
        self.bodies.append(body)
        text = str(body["messages"][-1]["content"])
        if self.failures:
            self.failures -= 1
            return error(429, "All rows are taken.", headers={"retry-after": "2"})
        if "too long" in text:
            return error(400, "The prompt has 5000 tokens.", code="context_length_exceeded")
        if body.get("temperature", 0) > 1.5:
            return error(400, "temperature must be at most 1.5.", param="temperature")
        return StreamingResponse(
            self.stream(body, text), media_type="text/event-stream; charset=utf-8"
        )

    async def stream(self, body: dict, text: str):
        sent = 0
        index = len(self.bodies)
        try:
            yield chunk({"role": "assistant", "content": ""})
            end = None
            async for delta, logprobs in script(body, text, index):
                await asyncio.sleep(self.pace_s)
                sent += 1
                self.made += 1
                yield chunk(delta, logprobs=logprobs, usage=usage(sent, body))
                end = "tool_calls" if "tool_calls" in delta else "stop"
            if "broken" in text:
                yield data({"error": {"message": "The step failed.", "code": 500}})
            elif "cut" not in text:
                yield chunk({}, finish="length" if "limit" in text else end)
                yield data({"choices": [], "usage": usage(sent, body)})
                yield "data: [DONE]\n\n"
        finally:
            self.gone.append(sent)


async def script(body: dict, text: str, index: int):
    """Yield (delta, log-probability items) of the answer."""
    pieces: list[str] = []
    if body["messages"][-1]["role"] == "tool":
        pieces = [f"The tool said {text}."]
    elif "weather" in text:
        yield {"reasoning_content": "They ask for the weather, so a tool is due."}, None
        for piece in ('{"city": ', '"Paris", ', '"unit": "C"}'):
            yield call(0, "get_weather" if "city" in piece else None, piece), None
        if "both" in text:
            yield call(1, "get_time", "{}"), None
    elif "think" in text:
        for word in ["First, ", "the **question**. ", "Then, ", "the answer."]:
            yield {"reasoning_content": word, "reasoning": word}, None
            await asyncio.sleep(0.02)
        pieces = ["Forty", "-two."]
    elif "ring" in text:
        pieces = [MARKDOWN[i : i + 7] for i in range(0, len(MARKDOWN), 7)]
    elif "slow" in text:
        pieces = [f"word{i} " for i in range(1500)]
    elif body.get("logprobs"):
        for token, likeliest in TOKENS:
            pairs = [entry.rsplit(" ", 1) for entry in likeliest.split("|")]
            top = {text: float(value) for text, value in pairs}
            yield {"content": token}, [item(token, top)]
    else:
        pieces = [f"Answer {index}", f" to: {text}"]
    for piece in pieces:
        yield {"content": piece}, None
        await asyncio.sleep(0.02 if "slow" in text else 0)


def call(index: int, name: str | None, arguments: str) -> dict:
    function = {"arguments": arguments} | ({"name": name} if name else {})
    begun = {"id": f"call_{index}", "type": "function"} if name else {}
    return {"tool_calls": [{"index": index, "function": function, **begun}]}


def item(token: str, top: dict[str, float]) -> dict:
    def one(text: str, value: float) -> dict:
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    return one(token, top[token]) | {"top_logprobs": [one(*other) for other in top.items()]}


def usage(sent: int, body: dict) -> dict:
    prompt = 1200 + 40 * len(body["messages"])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sent,
        "total_tokens": prompt + sent,
        "prompt_tokens_details": {"cached_tokens": 1024},
    }


def chunk(delta: dict, *, logprobs=None, finish=None, **more) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    choice["logprobs"] = {"content": logprobs} if logprobs else None
    return data({"object": "chat.completion.chunk", "choices": [choice], **more})


def data(value: dict) -> str:
    return f"data: {json.dumps(value)}\n\n"


def error(status: int, message: str, *, headers=None, **fields) -> Response:
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": body | fields}, status_code=status, headers=headers)
