"""Messages and tools as users write them, made ready for a built-in format or for a template.

Dicts follow OpenAI and transformers. The built-in formats get one checked form (`normalise`); a
checkpoint's template gets what was given (`as_given`). Nothing here knows a tokenizer or a prompt
format: which roles may follow each other is for the format to say.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gemlax.chat.marked import join
from gemlax.errors import RequestError

__all__ = [
    "CALL_NAME",
    "FinishReason",
    "REASONING",
    "Message",
    "as_given",
    "check_tools",
    "normalise",
    "text_of",
    "tools_as_given",
]

FinishReason = Literal["stop", "length", "tool_calls"]

CALL_NAME = re.compile(r"[\w.:/-]+")
ROLES = ("system", "developer", "user", "assistant", "model", "tool")
TEXT_PARTS = ("text", "input_text", "output_text")
MEDIA_PART = re.compile(r"(input_)?(image|audio|video|file)(_url)?")
# What Gemini's parts hold instead of text: the key is the kind.
GEMINI_PART = re.compile(r"(inline|file)_?data|function_?(call|response)|thought", re.I)
# What a JSON schema of parameters is called: by OpenAI, Anthropic, MCP and Gemini.
SCHEMAS = ("parameters", "input_schema", "inputSchema", "parametersJsonSchema")
# The names of what was thought. Source: transformers, utils/chat_template_utils.py.
REASONING = ("reasoning_content", "thinking", "reasoning")


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
    """Return messages for a built-in format: roles system, developer, user, assistant and tool.

    Tool calls become {"type": "function", "function": {"name", "arguments"}}, arguments a dict:
    JSON text is read, and "" or None means no arguments. A tool's message gets the name of the
    call it answers; its content is a text or what JSON can write. `answered`: the last message is
    an answer, not what is to be answered or gone on with.

    Raises:
        RequestError: a message is malformed or out of order; says which one.
    """
    found: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] | None = None
    answers = 0
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        one = _normalise_one(_modern(_mapping(message, i), where), where)
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
    last = found[-1]["role"]
    if answered and last != "assistant":
        raise RequestError(f"the last message must be of role assistant, got {last}")
    if all(one["role"] in ("system", "developer") for one in found):
        raise RequestError(f"the last message must be of role user or tool, got {last}")
    return found


def as_given(
    messages: Iterable[Mapping[str, Any] | Message], *, legacy: bool = False
) -> list[dict[str, Any]]:
    """Return messages for a checkpoint's template: what transformers would hand it.

    Every role, field and part stays. As in transformers, fields that are None are left out and
    reasoning is there under each of its names. `function_call` becomes a tool call, unless the
    template reads it (`legacy`); text parts get their type, and Gemini's are the content. As in
    vLLM, arguments that are JSON text of an
    object become that object, and "" or None becomes {}; other text stays. A call in the short
    form of `Message.tool_calls` is put into the long one, and a tool's message with neither a name
    nor an id gets the name of the call that it answers by its place.

    Raises:
        RequestError: what JSON cannot write, or an image, sound or video.
    """
    found: list[dict[str, Any]] = []
    calls: list[Any] = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        given = check_json(dict(_mapping(message, i)), where)
        given = _modern(given, where, legacy)
        one = {key: value for key, value in given.items() if value is not None}
        _refuse_media(one.get("content"), where)
        reasoning = next((one[key] for key in REASONING if key in one), None)
        if reasoning is not None:
            one = {"thinking": reasoning, **one, "reasoning_content": reasoning}
        if isinstance(one.get("tool_calls"), list):
            one["tool_calls"] = [_given_call(call) for call in one["tool_calls"]]
        if one.get("role") != "tool":
            calls = [call for call in one.get("tool_calls") or () if isinstance(call, dict)]
        elif calls:
            function = calls.pop(0).get("function")
            if isinstance(function, dict) and not {"name", "tool_call_id"} & set(one):
                one["name"] = function.get("name")
        found.append(one)
    if not found:
        raise RequestError("no messages: got an empty list")
    return found


def _mapping(message: Any, index: int) -> Mapping[str, Any]:
    if isinstance(message, Message):
        return message.to_dict()
    if not isinstance(message, Mapping):
        kind = type(message).__name__
        raise RequestError(f"messages[{index}] must be a dict or a Message, got {kind}")
    return message


def _modern(message: Mapping[str, Any], where: str, legacy: bool = False) -> dict[str, Any]:
    """Return a message without OpenAI's older `function_call` and without Gemini's `parts`."""
    told = dict(message)
    if told.get("content") is None and told.get("parts") is not None:
        told["content"] = told.pop("parts")
    if isinstance(told.get("content"), list) and told.get("role") not in ("tool", "function"):
        told["content"] = [_typed(part, where) for part in told["content"]]
    if legacy:
        return told
    if told.get("role") == "function":
        told["role"] = "tool"
    call = told.pop("function_call", None)
    if call is not None and told.get("tool_calls"):
        raise RequestError(f"{where}: function_call and tool_calls say the same; leave one")
    return told if call is None else told | {"tool_calls": [{"type": "function", "function": call}]}


def _typed(part: Any, where: str) -> Any:
    """Return a part with its type, where it is one of text that does not say so."""
    if not isinstance(part, Mapping) or part.get("type") is not None:
        return part
    keys = [key for key, value in part.items() if value not in (None, False)]
    if keys == ["text"] and isinstance(part["text"], str):
        return {"type": "text", "text": part["text"]}
    for key in keys:
        if MEDIA_PART.fullmatch(key) or GEMINI_PART.fullmatch(key):
            raise RequestError(f"{where}: a part with {key} is not supported, text is")
    return part


def _refuse_media(content: Any, where: str) -> None:
    """Refuse what the model would not see, though a template writes that it is there."""
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and MEDIA_PART.fullmatch(kind):
            raise RequestError(f"{where}: a part of type {kind} is not supported, text is")


def _given_call(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if "function" not in call and "name" in call:
        kept = {key: call[key] for key in ("id",) if key in call}
        call = kept | {
            "type": "function",
            "function": {key: value for key, value in call.items() if key not in ("id", "type")},
        }
    function = call["function"] if isinstance(call.get("function"), dict) else {}
    if "arguments" in function:
        call = call | {"function": function | {"arguments": _object(function["arguments"])}}
    return call


def _object(arguments: Any) -> Any:
    """Return the arguments that a client wrote as text; what is no object stays."""
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    if isinstance(arguments, str):
        try:
            read = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
        return read if isinstance(read, dict) else arguments
    return arguments


def _normalise_one(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = given.get("role")
    if role not in ROLES:
        raise RequestError(f"{where}: role must be one of {', '.join(ROLES)}, got {role!r}")
    role = "assistant" if role == "model" else str(role)
    calls = given.get("tool_calls") or []
    one: dict[str, Any] = {"role": role, "content": _content(given.get("content"), role, where)}
    reasoning = next((given[key] for key in REASONING if given.get(key)), None)
    if reasoning is not None and role == "assistant":
        if not isinstance(reasoning, str):
            raise RequestError(f"{where}: reasoning must be a str, got {reasoning!r}")
        one["reasoning"] = reasoning
    if calls:
        if role != "assistant" or not isinstance(calls, Sequence) or isinstance(calls, str):
            raise RequestError(f"{where}: tool_calls must be a list in an assistant message")
        one["tool_calls"] = [_call(c, f"{where}.tool_calls[{j}]") for j, c in enumerate(calls)]
    if role == "tool":
        one |= {k: given[k] for k in ("tool_call_id", "name") if given.get(k) is not None}
    return one


def _content(content: Any, role: str, where: str) -> Any:
    """Check content: text, a list of text parts, or for a tool what JSON can write."""
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    texts = _texts(content)
    if texts is not None:
        return texts
    if role == "tool":
        _refuse_media(content, where)
        return check_json(content, f"{where}.content")
    if not isinstance(content, Sequence):
        raise RequestError(
            f"{where}: content must be a str or a list of text parts, got {content!r}"
        )
    wrong = next(part for part in content if _texts([part]) is None)
    kind = wrong.get("type") if isinstance(wrong, Mapping) else None
    raise RequestError(
        f'{where}: a part must be {{"type": "text", "text": ...}}; '
        f"{kind or type(wrong).__name__} is not supported"
    )


def _texts(content: Any) -> list[dict[str, str]] | None:
    """Return the text parts that a content consists of, None if there are others."""
    if not isinstance(content, Sequence):
        return None
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") not in TEXT_PARTS:
            return None
        if not isinstance(part.get("text"), str):
            return None
        texts.append({"type": "text", "text": part["text"]})
    return texts


def _call(call: Any, where: str) -> dict[str, Any]:
    """Return {"type", "id"?, "function"} of a call in either form."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise RequestError(f"{where} must be a dict with name and arguments, got {call!r}")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not CALL_NAME.fullmatch(name):
        raise RequestError(f"{where}: {name!r} is not a function name")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    elif isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{where}: the arguments of {name} are not JSON: {error}") from error
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
        function = _with_parameters(check_json(dict(function), f"tools[{i}]"), f"tools[{i}]")
        found.append({"type": "function", "function": function})
    return found


def _with_parameters(function: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a function whose schema is called `parameters`."""
    given = [name for name in SCHEMAS if function.get(name)]
    if len(given) > 1:
        raise RequestError(f"{where}: {' and '.join(given)} are one thing; leave one")
    told = {key: value for key, value in function.items() if key not in SCHEMAS[1:]}
    if given:
        told["parameters"] = function[given[0]]
        if not isinstance(told["parameters"], Mapping):
            raise RequestError(f"{where}: {given[0]} must be a JSON schema (an object)")
    return told


def tools_as_given(tools: Iterable[Any] | None, *, wrap: bool = True) -> list[Any]:
    """Return tools for a checkpoint's template: as they are, as transformers hands them on.

    Args:
        tools: OpenAI's, or others.
        wrap: a plain {"name", ...} becomes OpenAI's, which the template reads.

    Raises:
        RequestError: a tool is not a dict, or JSON cannot write it.
    """
    if isinstance(tools, (str, Mapping)):
        raise RequestError("tools must be a list of function declarations")
    found = []
    for i, tool in enumerate(tools or ()):
        if not isinstance(tool, Mapping):
            raise RequestError(f"tools[{i}] must be a dict, got {type(tool).__name__}")
        plain = check_json(dict(tool), f"tools[{i}]")
        if wrap and "function" not in plain and isinstance(plain.get("name"), str):
            plain.pop("type", None)
            plain = {"type": "function", "function": _with_parameters(plain, f"tools[{i}]")}
        found.append(plain)
    return found


def text_of(content: Any) -> str:
    """Return the text of a content, parts put together."""
    return content if isinstance(content, str) else join(part["text"] for part in content)
