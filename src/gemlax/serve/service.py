"""What a server says of itself, and text to tokens and back: everything that generates nothing."""

import math
from collections.abc import Awaitable, Callable
from importlib.metadata import version

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gemlax.serve.body import (
    JsonObject,
    convert,
    endpoint,
    json_response,
    openai_error,
    read,
    refuse,
)
from gemlax.serve.kitchen import ModelKitchen
from gemlax.serve.openai_chat import ChatBody, chat_request
from gemlax.serve.openapi import openapi
from gemlax.serve.work import ServeError

__all__ = ["routes"]


class TokenizeBody(msgspec.Struct):
    """vLLM's fields and llama.cpp's: a text or a conversation."""

    prompt: str | None = None
    content: str | None = None
    messages: list[JsonObject] | None = None
    tools: list[JsonObject] | None = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    return_token_strs: bool | None = None
    with_pieces: bool | None = None


class DetokenizeBody(msgspec.Struct):
    """Token ids."""

    tokens: list[int]


class AdapterBody(msgspec.Struct):
    """The adapter to be loaded, or to be left out from now on."""

    lora_name: str
    lora_path: str | None = None
    load_inplace: bool | None = None


def routes(kitchen: ModelKitchen) -> list[Route]:
    """Return the routes."""
    service = _Service(kitchen)
    get: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/health": service.health,
        "/v1/health": service.health,
        "/ping": service.health,
        "/version": service.version,
        "/load": service.load,
        "/metrics": service.metrics,
        "/v1/models": service.models,
        "/v1/models/{name:path}": service.one_model,
        "/slots": service.slots,
        "/props": service.props,
        "/tokenizer_info": service.tokenizer_info,
        "/openapi.json": service.openapi,
    }
    post: dict[str, Callable[[Request, bytes], Awaitable[Response]]] = {
        "/tokenize": service.tokenize,
        "/detokenize": service.detokenize,
        "/apply-template": service.apply_template,
        "/v1/embeddings": service.embeddings,
        "/v1/load_lora_adapter": service.change_adapter,
        "/v1/unload_lora_adapter": service.change_adapter,
    }
    return [
        *(Route(path, handle, methods=["GET"]) for path, handle in get.items()),
        *(Route(path, endpoint(handle, openai_error), methods=["POST"])  # type: ignore[arg-type]
          for path, handle in post.items()),
    ]  # fmt: skip


class _Service:
    def __init__(self, kitchen: ModelKitchen):
        self._kitchen, self._worker = kitchen, kitchen.worker
        self._model, self._options = kitchen.model, kitchen.options

    async def health(self, request: Request) -> Response:
        worker = self._worker
        done, rounds = worker.progress
        state = worker.admission.state
        if state == "ready" and not worker.is_healthy:
            state = "failed"
        if state == "ready":
            return json_response({"status": "ok"})
        said: JsonObject = {"status": state}
        if state == "loading":
            said["progress"] = round(done / max(rounds, 1), 3)
        error = ServeError(503, f"not ready: {state}", code=state, retry_after=2.0, extra=said)
        return openai_error(request, error)

    async def version(self, request: Request) -> Response:
        return json_response({"version": version("gemlax")})

    async def load(self, request: Request) -> Response:
        return json_response({"server_load": self._worker.admission.num_places})

    async def metrics(self, request: Request) -> Response:
        text = self._kitchen.metrics.text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    def _entry(self, name: str) -> JsonObject:
        base = self._options.name
        return {
            "id": name, "object": "model", "created": self._kitchen.created,
            "owned_by": "gemlax", "root": base, "parent": None if name == base else base,
            "max_model_len": self._options.context,
            "meta": {
                "n_vocab": self._model.config.text.vocab_size,
                "n_ctx_train": self._model.config.text.max_position_embeddings,
                "n_embd": self._model.config.text.hidden_size,
            },
        }  # fmt: skip

    async def models(self, request: Request) -> Response:
        entries = [self._entry(name) for name in self._kitchen.choices]
        return json_response({"object": "list", "data": entries})

    async def one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._kitchen.choices:
            text = f"there is no model {name[:100]!r}"
            raise ServeError(404, text, param="model", code="model_not_found")
        return json_response(self._entry(name))

    async def slots(self, request: Request) -> Response:
        running = self._worker.running
        free = self._options.slots - len(running)
        if request.query_params.get("fail_on_no_slot") == "1" and free <= 0:
            raise ServeError(503, "no slot is free", code="no_slot", retry_after=1.0)
        slots: list[JsonObject] = []
        for id in range(self._options.slots):
            slot: JsonObject = {
                "id": id, "n_ctx": self._options.context, "speculative": False,
                "is_processing": id < len(running),
            }  # fmt: skip
            if id < len(running):
                usage = running[id].usage()
                slot["n_prompt_tokens"] = usage.prompt
                slot["n_prompt_tokens_cached"] = usage.cached
                slot["n_decoded"] = usage.completion
            slots.append(slot)
        return json_response(slots)

    async def props(self, request: Request) -> Response:
        template = self._model.chat_template
        adapters = [name for name in self._kitchen.choices if name != self._options.name]
        return json_response({
            "default_generation_settings": {
                "n_ctx": self._options.context,
                "params": {
                    name: value for name, value in self._model.generation_config.items()
                    if not isinstance(value, float) or math.isfinite(value)
                },
            },
            "total_slots": self._options.slots,
            "model_alias": self._options.name,
            "adapters": adapters,
            "chat_template": template if isinstance(template, str) else None,
            "chat_family": self._model.chat_format.family,
            "modalities": {"vision": False, "audio": False},
            "build_info": f"gemlax {version('gemlax')}",
        })  # fmt: skip

    async def tokenizer_info(self, request: Request) -> Response:
        tokenizer, template = self._kitchen.tokenizer, self._model.chat_template
        return json_response({
            "tokenizer_class": "gemlax.Tokenizer",
            "bos_token": tokenizer.piece(tokenizer.bos_id),
            "eos_token": tokenizer.piece(tokenizer.eos_id),
            "pad_token": tokenizer.piece(tokenizer.pad_id),
            "unk_token": tokenizer.piece(tokenizer.unk_id),
            "vocab_size": tokenizer.num_tokens,
            "model_max_length": self._options.context,
            "chat_template": template if isinstance(template, str) else None,
        })  # fmt: skip

    async def openapi(self, request: Request) -> Response:
        return json_response(openapi())

    async def tokenize(self, request: Request, body: bytes) -> Response:
        asked, kitchen = read(body, TokenizeBody), self._kitchen
        text = asked.content if asked.prompt is None else asked.prompt
        if (text is None) == (asked.messages is None):
            refuse("prompt", "give prompt (or content), or else messages")
        if asked.messages is not None:
            chat = convert({"messages": asked.messages, "tools": asked.tools}, ChatBody)
            ids = await kitchen.render(chat_request(chat, ""))
        else:
            # llama.cpp adds nothing unless it is asked to, vLLM does.
            default = asked.prompt is not None
            special = asked.add_special_tokens
            special = asked.add_special if special is None else special
            ids = await kitchen.tokenize(str(text), default if special is None else special)
        said: JsonObject = {
            "count": len(ids), "max_model_len": self._options.context, "tokens": ids,
        }  # fmt: skip
        pieces = [kitchen.tokenizer.piece(id) for id in ids]
        if asked.with_pieces:
            said["tokens"] = [
                {"id": id, "piece": piece} for id, piece in zip(ids, pieces, strict=True)
            ]
        return json_response(said | {"token_strs": pieces if asked.return_token_strs else None})

    async def detokenize(self, request: Request, body: bytes) -> Response:
        ids, tokenizer = read(body, DetokenizeBody).tokens, self._kitchen.tokenizer
        if any(not 0 <= id < tokenizer.num_tokens for id in ids):
            refuse("tokens", f"ids are in [0, {tokenizer.num_tokens})")
        text = tokenizer.decode(ids)
        return json_response({"prompt": text, "content": text})

    async def apply_template(self, request: Request, body: bytes) -> Response:
        ids = await self._kitchen.render(chat_request(read(body, ChatBody), ""))
        pieces = (self._kitchen.tokenizer.token_bytes(id, skip_special=False) for id in ids)
        return json_response({"prompt": b"".join(pieces).decode("utf-8", "replace")})

    async def embeddings(self, request: Request, body: bytes) -> Response:
        text = "this model generates text and makes no embeddings"
        raise ServeError(404, text, code="no_embeddings")

    async def change_adapter(self, request: Request, body: bytes) -> Response:
        read(body, AdapterBody)
        text = (
            "adapters are loaded when the server starts (--adapter-dir); this one cannot change "
            "them while it runs"
        )
        raise ServeError(501, text, code="adapters_fixed")
