"""Messages as users write them, checked and brought into the one form that templates read.

Dicts follow OpenAI and transformers. Nothing here knows a tokenizer or a prompt format: which
roles may follow each other is for the format to say, except what holds for all of them.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gemlax.errors import RequestError

__all__ = [
    "CALL_NAME",
    "FinishReason",
    "Message",
    "check_tools",
    "normalise",
    "plain_response",
    "text_of",
]

FinishReason = Literal["stop", "length", "tool_calls"]

CALL_NAME = re.compile(r"[\w.:/-]+")
ROLES = ("system", "developer", "user", "assistant", "model", "tool")


@dataclass(frozen=True)
class Message:
    """An answer. It may be appended to `messages` as it is.

    Attributes:
        content: the text, without reasoning, tool calls and control tokens.
        reasoning: the thought channel (Gemma 4), None if there was none.
        tool_calls: {"name": ..., "arguments": {...}} each; a call that could not be read stays
            in `content` as the model wrote it.
        tokens: all that was generated, the stop token included.
        finish_reason: "stop", "length", or "tool_calls" when it stopped to have tools called.
    """

    content: str
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "stop"

    def to_dict(self) -> dict[str, Any]:
        """Return the message as OpenAI and transformers write it."""
        found: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning is not None:
            found["reasoning"] = self.reasoning
        if self.tool_calls:
            found["tool_calls"] = [{"type": "function", "function": c} for c in self.tool_calls]
        return found


def normalise(
    messages: Iterable[Mapping[str, Any] | Message], *, answered: bool = False
) -> list[dict[str, Any]]:
    """Return messages in the form of transformers: roles system, user, assistant and tool.

    Tool calls become {"type": "function", "function": {"name", "arguments"}}, arguments a dict;
    a tool's message gets the name of the call it answers. `answered`: the last message is an
    answer, not what is to be answered.

    Raises:
        RequestError: a message is malformed or out of order; says which one.
    """
    found: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] | None = None
    answers = 0
    for i, message in enumerate(messages):
        given = message.to_dict() if isinstance(message, Message) else message
        one = _normalise_one(given, f"messages[{i}]")
        if one["role"] == "system" and i > 0:
            raise RequestError(f"messages[{i}]: a system message must be the first one")
        if one["role"] == "tool":
            if not calls:
                raise RequestError(f"messages[{i}]: a tool message answers no tool call")
            one["name"] = _answered(one, calls, answers, f"messages[{i}]")
            answers += 1
        else:
            calls, answers = one.get("tool_calls"), 0
        found.append(one)
    if not found:
        raise RequestError("no messages: got an empty list")
    wanted = ("assistant",) if answered else ("user", "tool")
    if found[-1]["role"] not in wanted:
        raise RequestError(
            f"the last message must be of role {' or '.join(wanted)}, got {found[-1]['role']}"
        )
    return found


def _normalise_one(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise RequestError(f"{where} must be a dict or a Message, got {type(given).__name__}")
    role = given.get("role")
    if role not in ROLES:
        raise RequestError(f"{where}: role must be one of {', '.join(ROLES)}, got {role!r}")
    role = str({"developer": "system", "model": "assistant"}.get(role, role))
    calls = given.get("tool_calls") or []
    one: dict[str, Any] = {
        "role": role,
        "content": _content(given.get("content"), role, bool(calls), where),
    }
    reasoning = next((given[k] for k in ("reasoning", "reasoning_content") if given.get(k)), None)
    if reasoning is not None and role == "assistant":
        if not isinstance(reasoning, str):
            raise RequestError(f"{where}: reasoning must be a str, got {reasoning!r}")
        one |= {"reasoning": reasoning, "reasoning_content": reasoning}
    if calls:
        if role != "assistant" or not isinstance(calls, Sequence) or isinstance(calls, str):
            raise RequestError(f"{where}: tool_calls must be a list in an assistant message")
        one["tool_calls"] = [_call(c, f"{where}.tool_calls[{j}]") for j, c in enumerate(calls)]
    if role == "tool":
        one |= {k: given[k] for k in ("tool_call_id", "name") if given.get(k) is not None}
    return one


def _content(content: Any, role: str, has_calls: bool, where: str) -> Any:
    """Check content: text, a list of text parts, or for a tool what JSON can write."""
    if content is None and has_calls:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping) and role == "tool":
        return check_json(content, f"{where}.content")
    if not isinstance(content, Sequence) or not content:
        raise RequestError(
            f"{where}: content must be a str or a list of text parts, got {content!r}"
        )
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RequestError(
                f'{where}: a part must be {{"type": "text", "text": ...}}; '
                f"{kind or type(part).__name__} is not supported"
            )
    return [{"type": "text", "text": part["text"]} for part in content]


def _call(call: Any, where: str) -> dict[str, Any]:
    """Return {"type", "id"?, "function"} of a call in either form."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise RequestError(f"{where} must be a dict with name and arguments, got {call!r}")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not CALL_NAME.fullmatch(name):
        raise RequestError(f"{where}: {name!r} is not a function name")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{where}: the arguments of {name} are not JSON: {error}") from error
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        kind = type(arguments).__name__
        raise RequestError(f"{where}: the arguments of {name} must be a JSON object, got {kind}")
    found = {"name": name, "arguments": check_json(arguments, f"{where}: the arguments of {name}")}
    return {"type": "function", "function": found} | (
        {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    )


def check_json(value: Any, where: str) -> Any:
    """Return a plain copy of a value that JSON can write (no NaN)."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{where} cannot be written as JSON: {error}") from error


def _answered(
    message: Mapping[str, Any], calls: Sequence[Mapping[str, Any]], index: int, where: str
) -> str:
    """Return the name of the call that a tool's message answers: by id, by name, or in order."""
    call_id, name = message.get("tool_call_id"), message.get("name")
    names = [call["function"]["name"] for call in calls]
    for call in calls:
        if call_id is not None and call.get("id") == call_id:
            return call["function"]["name"]
    if name in names:
        return str(name)
    if name is None and (call_id is None or not any("id" in call for call in calls)):
        if index < len(names):
            return names[index]
        raise RequestError(f"{where}: {len(names)} tool calls have more answers than that")
    raise RequestError(f"{where}: no tool call {name or call_id!r} to answer; called were {names}")


def check_tools(tools: Iterable[Any] | None) -> list[dict[str, Any]]:
    """Return tools in OpenAI's form; a plain {"name", "description", "parameters"} is wrapped.

    Raises:
        RequestError: a tool is malformed.
    """
    found = []
    if isinstance(tools, (str, Mapping)):
        raise RequestError("tools must be a list of function declarations")
    for i, tool in enumerate(tools or ()):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping):
            raise RequestError(f"tools[{i}] must be a dict, got {type(tool).__name__}")
        name = function.get("name")
        if not isinstance(name, str) or not CALL_NAME.fullmatch(name):
            raise RequestError(f"tools[{i}]: {name!r} is not a function name")
        if not isinstance(function.get("parameters") or {}, Mapping):
            raise RequestError(f"tools[{i}]: parameters must be a JSON schema (an object)")
        plain = check_json(function, f"tools[{i}]")
        found.append({"type": "function", "function": plain})
    return found


def text_of(content: Any) -> str:
    """Return the text of a content, parts put together."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def plain_response(content: Any) -> Any:
    """Return what a tool answered: an object, or text."""
    return content if isinstance(content, Mapping) else text_of(content)
