"""The description of the API, made of the Structs that bodies are read into."""

import functools
from importlib.metadata import version

import msgspec

from gemlax.serve.body import JsonObject
from gemlax.serve.openai_chat import ChatBody
from gemlax.serve.openai_completions import CompletionBody

__all__ = ["openapi"]

_BODIES: dict[str, tuple[type, str]] = {
    "/v1/chat/completions": (ChatBody, "Answer a conversation"),
    "/v1/completions": (CompletionBody, "Continue a text"),
}
_READS = {
    "/health": "Say whether the server is ready",
    "/v1/models": "List the model and its adapters",
    "/metrics": "Return counters in Prometheus' format",
    "/version": "Return the version",
    "/slots": "List the slots",
    "/props": "Return what the server was started with",
    "/tokenizer_info": "Describe the tokenizer",
}
_ERRORS = {
    "400": "what is asked is wrong, or cannot be done", "401": "an API key is needed",
    "404": "there is no such model", "413": "the body is too large",
    "429": "the server is busy", "503": "the server is not ready",
}  # fmt: skip


@functools.cache
def openapi() -> JsonObject:
    """Return the description."""
    types = [body for body, _ in _BODIES.values()]
    schemas, parts = msgspec.json.schema_components(
        types,
        ref_template="#/components/schemas/{name}",
        schema_hook=lambda kind: {"description": "any value"},  # msgspec refuses an empty one
    )
    error = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    parts["Error"] = {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"type": "object", "required": ["message", "type"]}},
    }
    paths: JsonObject = {
        path: {
            "get": {"summary": text, "responses": {"200": {"description": "the answer"}, "503":
                    {"description": _ERRORS["503"], **error}}}
        } for path, text in _READS.items()
    }  # fmt: skip
    for (path, (_, text)), schema in zip(_BODIES.items(), schemas, strict=True):
        paths[path] = {
            "post": {
                "summary": text,
                "requestBody": {
                    "required": True, "content": {"application/json": {"schema": schema}},
                },
                "responses": {
                    "200": {"description": "the answer, or a stream of it"},
                    **{code: {"description": said, **error} for code, said in _ERRORS.items()},
                },
            }
        }  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {"title": "gemlax", "version": version("gemlax")},
        "paths": paths,
        "components": {
            "schemas": parts,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }
