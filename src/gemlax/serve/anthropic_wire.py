"""What Anthropic's Messages API is asked, made into a `ChatRequest`."""

import base64
import hashlib
import hmac
import re
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from gemlax.serve.body import EFFORTS, JsonObject, json_schema_grammar, refuse
from gemlax.serve.turns import Turns
from gemlax.serve.work import ChatRequest

__all__ = ["Conversation", "CountRequest", "MessagesRequest", "Signer", "chat_request"]

# Claude Code begins its system prompt with a line that changes with every request, so that no
# prefix of the prompt would ever be met again.
BILLING = re.compile(r"x-anthropic-billing-header:[^\n]*\n*")
LEAST_BUDGET = 1024


class Text(msgspec.Struct, tag="text"):
    """A block of text."""

    text: str


class ToolUse(msgspec.Struct, tag="tool_use"):
    """A call that the model made."""

    id: str
    name: str
    input: JsonObject


class ToolResult(msgspec.Struct, tag="tool_result"):
    """What a called tool answers."""

    tool_use_id: str
    content: str | list[Text] | None = None
    is_error: bool | None = None


class Thinking(msgspec.Struct, tag="thinking"):
    """What the model thought."""

    thinking: str
    signature: str | None = None


class RedactedThinking(msgspec.Struct, tag="redacted_thinking"):
    """What another model thought, unreadable."""


Block = Text | ToolUse | ToolResult | Thinking | RedactedThinking


class Turn(msgspec.Struct):
    """A message."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Tool(msgspec.Struct):
    """A tool that the client runs."""

    name: Annotated[str, Meta(min_length=1)]
    input_schema: JsonObject | None = None
    description: str | None = None
    type: str | None = None
    strict: bool | None = None


class ToolChoice(msgspec.Struct):
    """Which tools may or must be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(msgspec.Struct):
    """Whether the model reasons first."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(msgspec.Struct):
    """What the answer must look like."""

    type: Literal["json_schema"]
    schema: JsonObject


class OutputConfig(msgspec.Struct):
    """Effort and form of the answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Conversation(msgspec.Struct, kw_only=True):
    """What messages and counting have in common."""

    model: str | None = None
    messages: Annotated[list[Turn], Meta(min_length=1)]
    system: str | list[Text] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # of the beta API, before output_config
    mcp_servers: list[JsonObject] | None = None


class CountRequest(Conversation, kw_only=True):
    """The body of POST /v1/messages/count_tokens."""


class MessagesRequest(Conversation, kw_only=True):
    """The body of POST /v1/messages."""

    max_tokens: Annotated[int, Meta(ge=1)]
    stream: bool | None = None
    stop_sequences: (
        Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(max_length=16)] | None
    ) = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: int | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None


class Signer:
    """Signs what the model thought, so that only that is taken back as its own."""

    def __init__(self, key: bytes):
        self._key = key

    def sign(self, text: str) -> str:
        """Return the signature of a text."""
        digest = hmac.digest(self._key, text.encode(), hashlib.sha256)
        return base64.b64encode(digest).decode()

    def accepts(self, text: str, signature: str) -> bool:
        """Whether this server signed the text."""
        return hmac.compare_digest(self.sign(text).encode(), signature.encode())


def chat_request(asked: Conversation, signer: Signer, key_id: str) -> ChatRequest:
    """Return what is asked as the kitchen takes it; raise ServeError for what cannot be done."""
    if asked.mcp_servers:
        refuse("mcp_servers", "the server connects to no others")
    tools, choice = _tools(asked.tools or []), asked.tool_choice
    max_tokens = asked.max_tokens if isinstance(asked, MessagesRequest) else None
    thinking, budget = _thinking(asked, max_tokens)
    form = (asked.output_config and asked.output_config.format) or asked.output_format
    return ChatRequest(
        model=asked.model,
        messages=_messages(asked, signer),
        tools=tools,
        tool_choice=_tool_choice(choice, [tool["function"]["name"] for tool in tools]),
        parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
        thinking=thinking,
        thinking_budget=budget,
        grammar=json_schema_grammar(form.schema, True) if form else None,
        settings=_settings(asked) if isinstance(asked, MessagesRequest) else {},
        key_id=key_id,
    )


def _settings(asked: MessagesRequest) -> JsonObject:
    settings: JsonObject = {"max_new_tokens": asked.max_tokens}
    given = {"temperature": asked.temperature, "top_k": asked.top_k, "top_p": asked.top_p}
    settings |= {name: value for name, value in given.items() if value is not None}
    return settings | ({"stop": tuple(asked.stop_sequences)} if asked.stop_sequences else {})


def _thinking(asked: Conversation, max_tokens: int | None) -> tuple[bool | None, int | None]:
    """Return whether the model reasons, and for how many tokens at most."""
    config = asked.thinking
    if config is None:
        return None, None
    if config.type == "adaptive":
        effort = asked.output_config.effort if asked.output_config else None
        return True, EFFORTS[effort] if effort else None
    if config.type == "disabled":
        return False, None
    budget = config.budget_tokens
    if budget is None or budget < LEAST_BUDGET:
        refuse("thinking.budget_tokens", f"it must be at least {LEAST_BUDGET}")
    if max_tokens is not None and budget >= max_tokens:
        refuse("thinking.budget_tokens", f"it must be less than max_tokens, {max_tokens}")
    return True, budget


def _tools(tools: Sequence[Tool]) -> list[JsonObject]:
    declared: dict[str, JsonObject] = {}
    for i, tool in enumerate(tools):
        if tool.type not in (None, "custom"):
            refuse(f"tools[{i}].type", f"{tool.type[:64]!r} runs elsewhere; declare a custom tool")
        if tool.input_schema is None:
            refuse(f"tools[{i}].input_schema", "this field is required")
        if tool.name in declared:
            refuse(f"tools[{i}].name", f"two tools are called {tool.name[:64]!r}")
        function: JsonObject = {"name": tool.name, "parameters": tool.input_schema}
        function |= {} if tool.description is None else {"description": tool.description}
        function |= {} if tool.strict is None else {"strict": tool.strict}
        declared[tool.name] = {"type": "function", "function": function}
    return list(declared.values())


def _tool_choice(
    choice: ToolChoice | None, names: Sequence[str]
) -> Literal["none", "auto", "required"] | dict[str, str]:
    if choice is None or choice.type == "auto":
        return "auto"
    if choice.type == "none":
        return "none"
    if not names:
        refuse("tool_choice", "there are no tools to call")
    if choice.type == "any":
        return "required"
    if choice.name is None or choice.name not in names:
        refuse("tool_choice.name", "it is not the name of one of the tools")
    return {"name": choice.name}


def _messages(asked: Conversation, signer: Signer) -> list[JsonObject]:
    turns = Turns()
    system = [Text(asked.system)] if isinstance(asked.system, str) else asked.system or []
    texts = [
        BILLING.sub("", block.text) if BILLING.match(block.text) else block.text for block in system
    ]
    if any(texts):
        turns.say("system", [text for text in texts if text])
    for i, turn in enumerate(asked.messages):
        where = f"messages[{i}].content"
        blocks = [Text(turn.content)] if isinstance(turn.content, str) else turn.content
        for j, block in enumerate(blocks):
            _check_role(block, turn.role, f"{where}[{j}].type")
            if isinstance(block, ToolResult):
                turns.result(block.tool_use_id, _result(block), f"{where}[{j}].tool_use_id")
        # Results go before what the user says: they answer the turn before.
        said = [block.text for block in blocks if isinstance(block, Text)]
        if turn.role != "user" or said or not blocks:
            turns.say(turn.role, said)
        for block in blocks:
            if isinstance(block, ToolUse):
                turns.call(block.id, block.name, block.input)
            elif isinstance(block, Thinking) and signer.accepts(
                block.thinking, block.signature or ""
            ):
                turns.think(block.thinking)
    return turns.messages()


def _check_role(block: Block, role: str, where: str) -> None:
    speaker = "assistant"
    if isinstance(block, Text):
        return
    if isinstance(block, ToolResult):
        speaker = "user"
    if role != speaker:
        refuse(where, f"such a block belongs into a message of role {speaker}")


def _result(block: ToolResult) -> str:
    content = block.content or ""
    text = content if isinstance(content, str) else "\n".join(part.text for part in content)
    return f"Error: {text}" if block.is_error else text
