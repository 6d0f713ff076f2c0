"""Messages and tools as users write them, made ready for a chat template.

Dicts follow OpenAI and transformers. The built-in templates get one checked form (`normalise`,
`check_tools`); a checkpoint's template gets what was given (`as_given`, `tools_as_given`). Nothing
here knows a tokenizer or a prompt format: which roles may follow each other is for a template to
say.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

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

FinishReason = Literal["stop", "length", "tool_calls", "error"]

CALL_NAME = re.compile(r"[\w.:/-]+")
ROLES = ("system", "developer", "user", "assistant", "model", "tool")
TEXT_PARTS = ("text", "input_text", "output_text")
MEDIA_PART = re.compile(r"(input_)?(image|audio|video|file)(_url)?")
# What Gemini's parts hold instead of text: the key is the kind.
GEMINI_PART = re.compile(r"(inline|file)_?data|function_?(call|response)|thought", re.I)
# What a JSON schema of parameters is called: by OpenAI, Anthropic, MCP and Gemini.
SCHEMAS = ("parameters", "input_schema", "inputSchema", "parametersJsonSchema")
# A template that reads this of a tool, or of a call, knows OpenAI's form.
READS_FUNCTION = re.compile(r"""\.\s*function\b|["']function["']""")
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
        finish_reason: "stop", "length", or "tool_calls" when it stopped to have tools called, or
            "error" when no token could come by its grammar.
    """

    content: str
    reasoning: str | None = None
    tool_calls: list[dict[str, object]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "stop"

    def to_dict(self) -> dict[str, object]:
        """Return the message as OpenAI and transformers write it."""
        message: dict[str, object] = {"role": "assistant", "content": self.content}
        if self.reasoning is not None:
            message["reasoning"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [{"type": "function", "function": c} for c in self.tool_calls]
        return message


def normalise(
    messages: Iterable[Mapping[str, object] | Message], *, answered: bool = False
) -> list[dict[str, object]]:
    """Return messages for a built-in template: roles system, developer, user, assistant and tool.

    Tool calls become {"type": "function", "function": {"name", "arguments"}}, arguments a dict:
    JSON text is read, and "" or None means no arguments. A tool's message gets the name of the
    call that it answers, and is also listed in the `results` of the message with the call; its
    content is a text or what JSON can write. `answered`: the last message is an answer, not what
    is to be answered or continued.
    """
    checked: list[dict[str, object]] = []
    caller: dict[str, Any] = {}  # the last message that is not a tool's
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        one = _normalise_one(_modern(_mapping(message, i), where), where)
        if one["role"] == "tool":
            if not caller.get("tool_calls"):
                raise RequestError(f"{where}: a tool message answers no tool call")
            results = caller.setdefault("results", [])
            one["name"] = _answered_name(one, caller["tool_calls"], len(results), where)
            results.append(one)
        else:
            caller = one
        checked.append(one)
    if not checked:
        raise RequestError("no messages: got an empty list")
    last = checked[-1]["role"]
    if answered and last != "assistant":
        raise RequestError(f"the last message must be of role assistant, got {last}")
    if all(one["role"] in ("system", "developer") for one in checked):
        raise RequestError(f"the last message must be of role user or tool, got {last}")
    return checked


def as_given(
    messages: Iterable[Mapping[str, Any] | Message], source: str = ""
) -> list[dict[str, object]]:
    """Return messages for a checkpoint's template: what transformers would hand it.

    Every role, field and part stays. As in transformers, fields that are None are left out and
    reasoning is there under each of its names. `function_call` becomes a tool call, unless the
    source of the template reads it; text parts get their type, and Gemini's are the content. As in
    vLLM, arguments that are JSON text of an object become that object, and "" or None becomes {};
    other text stays. A call in the short form of `Message.tool_calls` is put into the long one,
    and a tool's message with neither a name nor an id gets the name of the call that it answers by
    its place. Images, sound and video are refused.
    """
    listed: list[dict[str, object]] = []
    calls: list[Any] = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        given = check_json(dict(_mapping(message, i)), where)
        given = _modern(given, where, legacy="function_call" in source)
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
        listed.append(one)
    if not listed:
        raise RequestError("no messages: got an empty list")
    if "tool_responses" in source:
        _add_tool_responses(listed)
    return listed


def _add_tool_responses(messages: list[dict[str, Any]]) -> None:
    """Put results of tools that are neither text nor parts where Google's template reads them.

    It takes a dict in a tool's message for a list of parts, and reads `tool_responses` of the
    message with the calls instead.
    """
    for i, message in enumerate(messages):
        if not message.get("tool_calls") or "tool_responses" in message:
            continue
        results = list(itertools.takewhile(lambda m: m.get("role") == "tool", messages[i + 1 :]))
        if not any(_is_data(result.get("content")) for result in results):
            continue
        names = {call.get("id"): call["function"]["name"] for call in message["tool_calls"]}
        message["tool_responses"] = [
            {
                "name": result.get("name") or names.get(result.get("tool_call_id")),
                "response": result.get("content"),
            }
            for result in results
        ]


def _is_data(content: Any) -> bool:
    parts = content if isinstance(content, list) else []
    return isinstance(content, dict) or any(not isinstance(part, dict) for part in parts)


def _mapping(message: Any, index: int) -> Mapping[str, object]:
    if isinstance(message, Message):
        return message.to_dict()
    if not isinstance(message, Mapping):
        kind = type(message).__name__
        raise RequestError(f"messages[{index}] must be a dict or a Message, got {kind}")
    return message


def _modern(message: Mapping[str, Any], where: str, legacy: bool = False) -> dict[str, Any]:
    """Return a message without OpenAI's older `function_call` and without Gemini's `parts`."""
    modern = dict(message)
    if modern.get("content") is None and modern.get("parts") is not None:
        modern["content"] = modern.pop("parts")
    if isinstance(modern.get("content"), list) and modern.get("role") not in ("tool", "function"):
        modern["content"] = [_typed(part, where) for part in modern["content"]]
    if legacy:
        return modern
    if modern.get("role") == "function":
        modern["role"] = "tool"
    call = modern.pop("function_call", None)
    if call is not None:
        if modern.get("tool_calls"):
            raise RequestError(f"{where}: function_call and tool_calls say the same; leave one")
        modern["tool_calls"] = [{"type": "function", "function": call}]
    return modern


def _typed(part: Any, where: str) -> object:
    """Return a part with its type, if it is one of text that does not say so."""
    if not isinstance(part, Mapping) or part.get("type") is not None:
        return part
    keys = [key for key, value in part.items() if value not in (None, False)]
    if keys == ["text"] and isinstance(part["text"], str):
        return {"type": "text", "text": part["text"]}
    for key in keys:
        if MEDIA_PART.fullmatch(key) or GEMINI_PART.fullmatch(key):
            raise RequestError(f"{where}: a part with {key} is not supported, text is")
    return part


def _refuse_media(content: object, where: str) -> None:
    """Refuse what the model would not see, though a template writes that it is there."""
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and MEDIA_PART.fullmatch(kind):
            raise RequestError(f"{where}: a part of type {kind} is not supported, text is")


def _given_call(call: object) -> object:
    if not isinstance(call, dict):
        return call
    if "function" not in call and "name" in call:
        function = {key: value for key, value in call.items() if key not in ("id", "type")}
        call = {key: call[key] for key in ("id",) if key in call}
        call |= {"type": "function", "function": function}
    function = call["function"] if isinstance(call.get("function"), dict) else {}
    if "arguments" not in function:
        return call
    with contextlib.suppress(ValueError, RecursionError):  # text that is not JSON stays
        arguments = _read_arguments(function["arguments"])
        if isinstance(arguments, dict):
            call = call | {"function": function | {"arguments": arguments}}
    return call


def _read_arguments(arguments: object) -> object:
    """Return the arguments of a call, which clients also write as JSON text, or leave out."""
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def _normalise_one(given: Mapping[str, object], where: str) -> dict[str, object]:
    role = given.get("role")
    if role not in ROLES:
        raise RequestError(f"{where}: role must be one of {', '.join(ROLES)}, got {role!r}")
    role = "assistant" if role == "model" else str(role)
    calls = given.get("tool_calls") or []
    one: dict[str, object] = {"role": role, "content": _content(given.get("content"), role, where)}
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
    """Check content: text, a list of text parts, or for a tool text or what JSON can write."""
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    listed = isinstance(content, Sequence)
    wrong = [part for part in content if not _is_text_part(part)] if listed else [content]
    if not wrong:
        texts = [{"type": "text", "text": part["text"]} for part in content]
        return text_of(texts) if role == "tool" else texts
    if role == "tool":
        _refuse_media(content, where)
        return check_json(content, f"{where}.content")
    if not listed:
        raise RequestError(
            f"{where}: content must be a str or a list of text parts, got {content!r}"
        )
    kind = wrong[0].get("type") if isinstance(wrong[0], Mapping) else None
    raise RequestError(
        f'{where}: a part must be {{"type": "text", "text": ...}}; '
        f"{kind or type(wrong[0]).__name__} is not supported"
    )


def _is_text_part(part: Any) -> bool:
    return (
        isinstance(part, Mapping)
        and part.get("type") in TEXT_PARTS
        and isinstance(part.get("text"), str)
    )


def _call(call: Any, where: str) -> dict[str, Any]:
    """Return {"type", "id"?, "function"} of a call in either form."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise RequestError(f"{where} must be a dict with name and arguments, got {call!r}")
    name = function.get("name")
    if not isinstance(name, str) or not CALL_NAME.fullmatch(name):
        raise RequestError(f"{where}: {name!r} is not a function name")
    try:
        arguments = _read_arguments(function.get("arguments"))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: the arguments of {name} are not JSON: {error}") from error
    if not isinstance(arguments, Mapping):
        kind = type(arguments).__name__
        raise RequestError(f"{where}: the arguments of {name} must be a JSON object, got {kind}")
    arguments = check_json(arguments, f"{where}: the arguments of {name}")
    checked = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return checked | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})


def check_json(value: Any, where: str) -> Any:
    """Return a plain copy of a value that JSON can write (no NaN)."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{where} cannot be written as JSON: {error}") from error


def _answered_name(
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


def _as_list(tools: Iterable[Any] | None) -> list[object]:
    if isinstance(tools, (str, Mapping)):
        raise RequestError("tools must be a list of function declarations")
    return list(tools or ())


def check_tools(tools: Iterable[object] | None) -> list[dict[str, Any]]:
    """Return tools in OpenAI's form; a plain {"name", "description", "parameters"} is wrapped."""
    checked = []
    for i, tool in enumerate(_as_list(tools)):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping):
            raise RequestError(f"tools[{i}] must be a dict, got {type(tool).__name__}")
        name = function.get("name")
        if not isinstance(name, str) or not CALL_NAME.fullmatch(name):
            raise RequestError(f"tools[{i}]: {name!r} is not a function name")
        function = _with_parameters(check_json(dict(function), f"tools[{i}]"), f"tools[{i}]")
        checked.append({"type": "function", "function": function})
    return checked


def tools_as_given(tools: Iterable[Any] | None, source: str = "") -> list[Any]:
    """Return tools for a checkpoint's template: as they are, as transformers hands them on.

    Only a plain {"name", ...} becomes OpenAI's form, if the source of the template reads that.
    """
    wraps = READS_FUNCTION.search(source) is not None
    listed = []
    for i, tool in enumerate(_as_list(tools)):
        if not isinstance(tool, Mapping):
            raise RequestError(f"tools[{i}] must be a dict, got {type(tool).__name__}")
        plain = check_json(dict(tool), f"tools[{i}]")
        if wraps and "function" not in plain and isinstance(plain.get("name"), str):
            plain.pop("type", None)
            plain = {"type": "function", "function": _with_parameters(plain, f"tools[{i}]")}
        listed.append(plain)
    return listed


def _with_parameters(function: Mapping[str, Any], where: str) -> dict[str, object]:
    """Return a function whose schema is called `parameters`."""
    given = [name for name in SCHEMAS if function.get(name)]
    if len(given) > 1:
        raise RequestError(f"{where}: {' and '.join(given)} are one thing; leave one")
    renamed = {key: value for key, value in function.items() if key not in SCHEMAS[1:]}
    if given:
        renamed["parameters"] = function[given[0]]
        if not isinstance(renamed["parameters"], Mapping):
            raise RequestError(f"{where}: {given[0]} must be a JSON schema (an object)")
    return renamed


def text_of(content: Any) -> str:
    """Return the text of a content, parts put together."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
