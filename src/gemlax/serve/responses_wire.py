"""What OpenAI's Responses API is asked, made into a `ChatRequest`."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from gemlax.grammar import Grammar
from gemlax.serve.body import EFFORTS, JsonObject, json_schema_grammar, refuse
from gemlax.serve.turns import Turns
from gemlax.serve.work import ChatRequest

__all__ = ["ResponsesRequest", "TextFormat", "chat_request"]

NO_PARAMETERS: JsonObject = {"type": "object", "properties": {}}
TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
LOGPROBS = "message.output_text.logprobs"
# What nothing is stored for, or nothing can do. Each changes what is answered.
REFUSED = {
    "previous_response_id": "the server keeps no responses; send the whole conversation as input",
    "conversation": "the server keeps no conversations; send the whole conversation as input",
    "prompt": "the server keeps no prompts; send it as instructions and input",
    "background": "the server keeps no responses to be asked for later",
    "context_management": "the server does not compact conversations",
}


class ContentPart(msgspec.Struct):
    """A piece of a message."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Item(msgspec.Struct):
    """A message, a call, the output of a call, or what the model thought: `type` tells which."""

    type: str | None = None
    role: Literal["user", "system", "developer", "assistant"] | None = None
    content: str | list[ContentPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ContentPart] | None = None
    summary: list[ContentPart] | None = None


class Tool(msgspec.Struct, omit_defaults=True):
    """A tool that the client runs."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class ToolChoice(msgspec.Struct, omit_defaults=True):
    """The tool that must be called, or those that may be."""

    type: str
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[Tool] | None = None


class Reasoning(msgspec.Struct):
    """Whether the model reasons first, and how that is shown."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class TextFormat(msgspec.Struct, omit_defaults=True):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema: JsonObject | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct):
    """The form of the answer."""

    format: TextFormat | None = None


class ResponsesRequest(msgspec.Struct, kw_only=True):
    """The body of POST /v1/responses."""

    model: str | None = None
    input: str | list[Item]
    instructions: str | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    include: list[str] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    metadata: dict[str, str] | None = None
    previous_response_id: str | None = None
    conversation: str | JsonObject | None = None
    prompt: JsonObject | None = None
    background: bool | None = None
    context_management: list[JsonObject] | None = None
    # Not OpenAI's, but vLLM's.
    top_k: int | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    cache_salt: str | None = None
    priority: int | None = None

    @property
    def format(self) -> TextFormat:
        """What the answer must look like."""
        return (self.text and self.text.format) or TextFormat("text")


def chat_request(asked: ResponsesRequest, key_id: str) -> ChatRequest:
    """Return what is asked as the kitchen takes it; raise ServeError for what cannot be done."""
    refused = {
        "previous_response_id": asked.previous_response_id,
        "conversation": asked.conversation,
        "prompt": asked.prompt,
        "background": asked.background,
        "context_management": asked.context_management,
    }
    for name, value in refused.items():
        if value:
            refuse(name, REFUSED[name])
    tools, choice = _tools(asked)
    effort = asked.reasoning.effort if asked.reasoning else None
    return ChatRequest(
        model=asked.model,
        messages=_messages(asked),
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=asked.parallel_tool_calls is not False,
        thinking=None if effort is None else effort != "none",
        thinking_budget=EFFORTS[effort] if effort and effort != "none" else None,
        grammar=_grammar(asked.format),
        logprobs=_logprobs(asked),
        settings=_settings(asked),
        cache_salt=asked.cache_salt or "",
        priority=asked.priority or 0,
        key_id=key_id,
    )


def _settings(asked: ResponsesRequest) -> JsonObject:
    given = {
        "max_new_tokens": asked.max_output_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": asked.top_k,
        "seed": asked.seed,
    }
    return {name: value for name, value in given.items() if value is not None}


def _logprobs(asked: ResponsesRequest) -> int | None:
    if asked.top_logprobs is None and LOGPROBS not in (asked.include or ()):
        return None
    return asked.top_logprobs or 0


def _grammar(form: TextFormat) -> Grammar | None:
    if form.type == "text":
        return None
    if form.type == "json_object":
        return json_schema_grammar({"type": "object"}, True)
    if form.schema is None:
        refuse("text.format.schema", "this field is required")
    return json_schema_grammar(form.schema, form.strict is not False)


def _tools(
    asked: ResponsesRequest,
) -> tuple[list[JsonObject], Literal["none", "auto", "required"] | dict[str, str]]:
    declared: dict[str, JsonObject] = {}
    for i, tool in enumerate(asked.tools or []):
        name = tool.name
        if tool.type != "function":
            refuse(f"tools[{i}].type", f"{tool.type[:64]!r} is not supported; declare a function")
        if not name:
            refuse(f"tools[{i}].name", "this field is required")
        if name in declared:
            refuse(f"tools[{i}].name", f"two tools are called {name[:64]!r}")
        function: JsonObject = {"name": name, "parameters": tool.parameters or NO_PARAMETERS}
        function |= {} if tool.description is None else {"description": tool.description}
        function |= {} if tool.strict is None else {"strict": tool.strict}
        declared[name] = {"type": "function", "function": function}
    choice = asked.tool_choice
    if choice is None or choice in ("none", "auto"):
        return list(declared.values()), "none" if choice == "none" else "auto"
    if not declared:
        refuse("tool_choice", "there are no tools to call")
    if not isinstance(choice, ToolChoice):
        return list(declared.values()), "required"
    if choice.type == "function":
        if choice.name not in declared:
            refuse("tool_choice.name", "it is not the name of one of the tools")
        return list(declared.values()), {"name": choice.name}
    if choice.type != "allowed_tools":
        refuse("tool_choice.type", f"{choice.type[:64]!r} is not supported")
    allowed = [tool.name for tool in choice.tools or ()]
    if not allowed or not declared.keys() >= set(allowed):
        refuse("tool_choice.tools", "they are not names of the tools")
    return [tool for name, tool in declared.items() if name in allowed], choice.mode or "auto"


def _messages(asked: ResponsesRequest) -> list[JsonObject]:
    turns = Turns()
    if asked.instructions:
        turns.say("system", [asked.instructions])
    if isinstance(asked.input, str):
        turns.say("user", [asked.input])
        return turns.messages()
    if not asked.input:
        refuse("input", "it is empty")
    for i, item in enumerate(asked.input):
        _add(turns, item, f"input[{i}]")
    return turns.messages()


def _add(turns: Turns, item: Item, where: str) -> None:
    if item.type in (None, "message"):
        role = _required(item.role, f"{where}.role")
        texts = list(_texts(item.content, f"{where}.content"))
        turns.say(role, ["".join(texts)] if role == "assistant" else texts)
    elif item.type == "function_call":
        name = _required(item.name, f"{where}.name")
        arguments = _arguments(item.arguments, f"{where}.arguments")
        turns.call(_required(item.call_id, f"{where}.call_id"), name, arguments)
    elif item.type == "function_call_output":
        output = "\n".join(_texts(item.output, f"{where}.output"))
        call_id = _required(item.call_id, f"{where}.call_id")
        turns.result(call_id, output, f"{where}.call_id")
    elif item.type == "reasoning":
        thought = item.content if item.content else item.summary
        turns.think("".join(_texts(thought, f"{where}.content")))
    else:
        refuse(f"{where}.type", f"{item.type[:64]!r} is not supported")


def _required(value: str | None, where: str) -> str:
    if not value:
        refuse(where, "this field is required")
    return value


def _texts(content: str | Sequence[ContentPart] | None, where: str) -> Iterator[str]:
    if isinstance(content, str):
        yield content
        return
    for i, part in enumerate(content or ()):
        if part.type == "refusal" and part.refusal is not None:
            yield part.refusal
        elif part.type in TEXT_PARTS:
            if part.text is None:
                refuse(f"{where}[{i}].text", "this field is required")
            yield part.text
        else:
            refuse(f"{where}[{i}].type", f"{part.type[:64]!r} is not supported; text is")


def _arguments(text: str | None, where: str) -> JsonObject:
    if not text or not text.strip():
        return {}
    try:
        return msgspec.json.decode(text, type=JsonObject)
    except (msgspec.MsgspecError, RecursionError, ValueError):
        refuse(where, "it is not the JSON text of an object")
