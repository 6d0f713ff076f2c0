"""The forms that a line of training data may have, brought to two: texts, or a conversation.

Columns that no form reads are named, so that the reader of a file can say which; those that would
change what is learnt are refused. Nothing here knows a tokenizer.
Sources: TRL's dataset formats, OpenAI's fine-tuning guide, LLaMA-Factory's data/README and
axolotl's dataset formats; for Gemini's, Vertex AI's guide to supervised tuning.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from gemlax.errors import RequestError
from gemlax.tune.lines import quote

__all__ = ["Conversation", "Texts", "example_of", "pair_of"]

EXPECTED = (
    'expected the keys "messages" (or "conversations"), or "prompt" and "completion", or '
    '"instruction" and "output", or "text"'
)
EXPECTED_PAIR = (
    'expected the keys "chosen" and "rejected", and "prompt" (or "messages", or "instruction") '
    "where they do not hold it themselves"
)
LISTS = ("messages", "conversations", "conversation")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# Who speaks, by the names that data give.
ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "function": "tool", "observation": "tool", "tool_response": "tool",
    "tool_call": "function_call", "developer": "system",
}  # fmt: skip
_SPEAKERS = ("system", "user", "assistant", "tool")
# Keys of a message that say whether it is learnt: OpenAI's, axolotl's, ms-swift's, torchtune's.
FLAGS = ("train", "training", "loss")
MASKS = ("masked", "mask")
DETAILS = ("train_detail", "training_detail")
MARKS = {"weight", *FLAGS, *MASKS, *DETAILS}
KNOWN = {
    "role", "content", "from", "value", "tool_calls", "function_call", "tool_call_id", "name",
    "reasoning", "reasoning_content", "thinking", *MARKS,
}  # fmt: skip
# For models that are not talked to in turns. Source: Stanford Alpaca, train.py, PROMPT_DICT.
_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{given}### Response:\n"
)
_PAIRED = ", paired with an input that provides further context"


class Texts(NamedTuple):
    """A text that is learnt, after one that is not; `prompt` None: there is none."""

    prompt: str | None
    completion: str


class Conversation(NamedTuple):
    """Messages as `Model.chat` takes them, the last of them an answer.

    Attributes:
        learnt: which messages are learnt; the model's alone ever are.
        tools: function declarations.
        asked: how many messages lead up to what is learnt.
    """

    messages: list[dict[str, object]]
    learnt: list[bool]
    tools: list[object] | None = None
    asked: int = 0


Form = Texts | Conversation


class _Fields:
    """A line's columns, those of them that were read, and what else was left aside."""

    def __init__(self, line: Mapping[str, object]):
        # Tables that were written as JSON have null where there is nothing.
        self.columns = {key: value for key, value in line.items() if value is not None}
        self.read: set[str] = set()
        self.more: set[str] = set()

    def has(self, *keys: str) -> bool:
        return all(key in self.columns for key in keys)

    def take(self, key: str) -> Any:
        self.read.add(key)
        return self.columns.get(key)

    def text(self, key: str) -> str:
        value = self.take(key)
        if not isinstance(value, str):
            raise RequestError(f'"{key}" must be a text, got {quote(value)}')
        return value

    def aside(self) -> set[str]:
        """Return what was not read, and refuse what would have made a difference."""
        rest = self.columns.keys() - self.read
        for key in rest & set(MEDIA):
            if self.columns[key] not in ("", [], {}):
                raise RequestError(f'"{key}" beside the text: training on it is not supported')
        if self.columns.get("weight", 1) != 1 and "weight" in rest:
            raise RequestError(f'"weight" of a line must be 1, got {quote(self.columns["weight"])}')
        options = self.columns.get("chat_template_kwargs")
        if (
            "chat_template_kwargs" in rest
            and isinstance(options, Mapping)
            and any(options.values())
        ):
            raise RequestError(f'"chat_template_kwargs" is not supported, got {quote(options)}')
        return rest - {key for key in rest if self.columns[key] in ("", [], {})} | self.more


def example_of(line: Mapping[str, Any], *, chats: bool = True) -> tuple[Form, set[str]]:
    """Return what is learnt of a line, and the columns that are not read.

    Args:
        line: of JSON.
        chats: the model is talked to in turns; else an instruction becomes a text.
    """
    fields = _Fields(_from_gemini(line))
    key = next((key for key in LISTS if fields.has(key)), None)
    if key is not None:
        form: Form = _conversation(fields, _listed(key, fields.take(key)))
    elif fields.has("prompt", "completion"):
        form = _completion(fields)
    elif fields.has("instruction", "output"):
        form = _instruction(fields, fields.text("output"), chats)
    elif fields.has("text"):
        form = Texts(None, fields.text("text"))
    else:
        raise RequestError(f"{EXPECTED}; got {_quoted(fields.columns)}{_hint(fields.columns)}")
    return form, fields.aside()


def pair_of(line: Mapping[str, Any], *, chats: bool = True) -> tuple[Form, Form, set[str]]:
    """Return the better and the worse answer to one prompt, and the columns that are not read."""
    fields = _Fields(_from_openai(line))
    if not fields.has("chosen", "rejected"):
        raise RequestError(f"{EXPECTED_PAIR}; got {_quoted(fields.columns)}")
    both = [fields.take("chosen"), fields.take("rejected")]
    both = [[one] if isinstance(one, Mapping) else one for one in both]
    if both[0] == both[1]:
        raise RequestError('"chosen" and "rejected" are the same: nothing is better')
    if all(isinstance(one, str) for one in both):
        forms = _text_pair(fields, both, chats)
    elif all(isinstance(one, list) for one in both):
        forms = _message_pair(fields, both)
    else:
        raise RequestError(
            '"chosen" and "rejected" must be two texts or two lists of messages, got '
            f"{quote(both[0])} and {quote(both[1])}"
        )
    return *forms, fields.aside()


def _completion(fields: _Fields) -> Form:
    prompt, completion = fields.take("prompt"), fields.take("completion")
    if isinstance(fields.columns.get("label"), bool):
        raise RequestError(
            '"label" beside "completion" says whether it is good, which is not learnt from; '
            "keep the good ones without it, or give pairs of chosen and rejected to --dpo"
        )
    if isinstance(prompt, list):
        said = [{"role": "assistant", "content": completion}]
        said = said if isinstance(completion, str) else _listed("completion", completion)
        return _conversation(fields, prompt, said)
    if isinstance(prompt, str) and isinstance(completion, list):
        raise RequestError(
            '"prompt" and "completion" must both be texts, or both lists of messages'
        )
    return Texts(fields.text("prompt"), fields.text("completion"))


def _instruction(fields: _Fields, output: str, chats: bool) -> Form:
    """Return Alpaca's form as turns, as LLaMA-Factory does, or as Alpaca's own text."""
    if not chats:
        instruction, given = fields.text("instruction"), fields.take("input") or ""
        if fields.take("system") or fields.take("history"):
            raise RequestError('"system" and "history" need a model that is talked to in turns')
        shown = f"### Input:\n{given}\n\n" if given else ""
        text = _ALPACA.format(paired=_PAIRED if given else "", instruction=instruction, given=shown)
        return Texts(text, output)
    turns = _asked(fields)
    return _conversation(fields, [*turns, {"role": "assistant", "content": output}])


def _asked(fields: _Fields) -> list[dict[str, object]]:
    """Return the turns before an answer to an instruction; its history is learnt, too."""
    turns = []
    for turn in fields.take("history") or []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise RequestError(f'"history" holds pairs of texts, got {quote(turn)}')
        turns += [
            {"role": r, "content": t} for r, t in zip(("user", "assistant"), turn, strict=True)
        ]
    given = fields.text("input") if fields.has("input") else ""
    question = "\n".join(part for part in (fields.text("instruction"), given) if part)
    return [*turns, {"role": "user", "content": question}]


def _conversation(
    fields: _Fields, messages: Sequence[object], answer: Sequence[object] | None = None
) -> Conversation:
    """Put a conversation together; with `answer`, that alone is learnt."""
    history = [_message(fields, m, f"messages[{i}]") for i, m in enumerate(messages)]
    said = [_message(fields, m, f"answer[{i}]") for i, m in enumerate(answer or ())]
    history = _with_system(fields, history)
    asked = 0 if answer is None else len(history)
    turns = history + said
    if not turns:
        raise RequestError("no messages: got an empty list")
    roles = [message["role"] for message, _ in turns]
    if "assistant" not in roles[asked:]:
        raise RequestError(f"the last message must be of role assistant, got {roles[-1]}")
    end = len(roles) - roles[::-1].index("assistant")
    if end < len(turns):
        fields.more.add("the messages after the last answer")
    messages, learnt = map(list, zip(*turns[:end], strict=True))
    return Conversation(messages, learnt, _tools(fields), asked)


def _with_system(
    fields: _Fields, turns: list[tuple[dict[str, object], bool]]
) -> list[tuple[dict[str, object], bool]]:
    """Put the column "system" first, where it is text that the conversation does not have."""
    system = fields.take("system")
    if not system:
        return turns
    if not isinstance(system, str):
        raise RequestError(f'"system" must be a text, got {quote(system)}')
    if turns and turns[0][0]["role"] == "system":
        if turns[0][0]["content"] != system:
            raise RequestError('"system" differs from the system message of the conversation')
        return turns
    return [({"role": "system", "content": system}, False), *turns]


def _listed(key: str, value: object) -> list[Any]:
    if not isinstance(value, list):
        raise RequestError(f'"{key}" must be a list of messages, got {quote(value)}')
    return value


def _message(fields: _Fields, given: Any, where: str) -> tuple[dict[str, object], bool]:
    """Return a message in `Model.chat`'s form, and whether it is learnt."""
    if not isinstance(given, Mapping):
        raise RequestError(f"{where} must be an object, got {quote(given)}")
    role, content = _speaker(given), given.get("content")
    content = given.get("value") if content is None else content
    rest = {k: v for k, v in given.items() if k not in MARKS and v is not None}
    fields.more |= {f"messages.{key}" for key in rest.keys() - KNOWN}
    if role not in (*_SPEAKERS, "function_call"):
        raise RequestError(
            f"{where}: role must be one of {', '.join(_SPEAKERS)} (or human, gpt, function_call, "
            f"observation), got {quote(role)}"
        )
    message = {k: v for k, v in rest.items() if k not in ("from", "value", "role", "content")}
    if role == "function_call":
        role, message["tool_calls"], content = "assistant", _calls(content, where), ""
    if call := message.pop("function_call", None):
        message["tool_calls"] = [{"type": "function", "function": call}]
    if thought := message.pop("thinking", None):
        message.setdefault("reasoning", thought)
    return {"role": role, "content": content, **message}, _is_learnt(given, role, where)


def _calls(text: object, where: str) -> list[dict[str, object]]:
    """Read tool calls that are written as JSON."""
    calls = _json(text, f"{where}: a tool call") if isinstance(text, str) else text
    calls = calls if isinstance(calls, list) else [calls]
    return [{"type": "function", "function": call} for call in calls]


def _is_learnt(message: Mapping[str, object], role: object, where: str) -> bool:
    """Tell whether the marks of a message let it be learnt."""
    marks: dict[str, bool] = {}
    for key in MARKS & message.keys():
        value = message[key]
        if value is None or value in ([], {}):
            continue
        if key in DETAILS or not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise RequestError(
                f"{where}: {key} must say that the turn is learnt or not, got {quote(value)}; "
                "parts of turns and fractions are not supported"
            )
        marks[key] = bool(value) != (key in MASKS)
    if role == "assistant":
        if len(set(marks.values())) > 1:
            raise RequestError(f"{where}: {', '.join(sorted(marks))} disagree")
        return all(marks.values())
    wanted = [key for key in FLAGS if marks.get(key)]
    if wanted:
        raise RequestError(
            f"{where}: {wanted[0]} wants the turn of {quote(role)} learnt; the model's alone are"
        )
    return False


def _tools(fields: _Fields) -> list[object] | None:
    """Return function declarations: a list, or JSON of one."""
    key = "tools" if fields.has("tools") else "functions"
    tools = fields.take(key)
    if isinstance(tools, str) and tools.strip():
        tools = _json(tools, f'"{key}"')
    tools = [tools] if isinstance(tools, Mapping) else tools
    if not tools:
        return None
    if not isinstance(tools, list):
        raise RequestError(f'"{key}" must be a list of function declarations, got {quote(tools)}')
    each = [_json(one, f'"{key}"') if isinstance(one, str) else one for one in tools]
    return [_without_nulls(one) for one in each]


def _without_nulls(value: object) -> object:
    """Return a schema without the nulls that a table of several schemas puts into each."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _json(text: str, what: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{what} is not JSON: {error}") from error


def _from_gemini(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return Gemini's contents of parts as messages, with the columns that others give them."""
    if not isinstance(line.get("contents"), list) or any(key in line for key in LISTS):
        return line
    rest = {_snake(key): value for key, value in line.items() if key != "contents"}
    messages: list[Any] = []
    if (system := rest.pop("system_instruction", None)) is not None:
        given = system if isinstance(system, Mapping) else {"parts": system}
        messages += _from_content({**given, "role": "system"}, "systemInstruction")
    for i, content in enumerate(line["contents"]):
        messages += _from_content(content, f"contents[{i}]")
    if isinstance(tools := rest.get("tools"), list):
        declared = [_declarations(tool) for tool in tools]
        rest["tools"] = [one for each in declared for one in each]
    return {**rest, "messages": messages}


def _from_content(content: Any, where: str) -> list[dict[str, Any]]:
    """Return what one content says as messages: functions' answers are messages of their fields."""
    parts = content.get("parts") if isinstance(content, Mapping) else None
    parts = [{"text": parts}] if isinstance(parts, str) else parts
    parts = [parts] if isinstance(parts, Mapping) else parts
    if not isinstance(parts, list):
        raise RequestError(f'{where} must be an object with "parts", got {quote(content)}')
    texts: list[str] = []
    thoughts: list[str] = []
    calls, answers = [], []
    for part in parts:
        given = part if isinstance(part, Mapping) else {"text": part}
        kinds = {_snake(key): value for key, value in given.items() if value is not None}
        thought = kinds.pop("thought", False)
        kinds.pop("thought_signature", None)  # an opaque token of Google's service
        (kind, value), *more = kinds.items() or [("", None)]
        if kind == "text" and isinstance(value, str) and not more:
            (thoughts if thought else texts).append(value)
        elif kind == "function_call" and isinstance(value, Mapping) and not more:
            called = {"name": value.get("name"), "arguments": value.get("args") or {}}
            calls.append({"type": "function", "function": called})
        elif kind == "function_response" and isinstance(value, Mapping) and not more:
            answer = {"role": "tool", "name": value.get("name"), "content": value.get("response")}
            answers.append(answer)
        else:
            raise RequestError(
                f"{where}: a part must have text, functionCall or functionResponse, got "
                f"{quote(part)}"
            )
    message = {"role": content.get("role", "user"), "content": "".join(texts)}
    if thoughts:
        message["reasoning"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    said = [message] if texts or thoughts or calls or not answers else []
    return [*answers, *said]


def _declarations(tool: Any) -> list[object]:
    members = {_snake(k): v for k, v in tool.items()} if isinstance(tool, Mapping) else {}
    declared = members.get("function_declarations")
    return [tool] if declared is None else _listed("functionDeclarations", declared)


def _snake(name: str) -> str:
    """Return a name in Python's style, which Gemini's libraries write; its service has Java's."""
    return re.sub(r"(?<=[a-z])[A-Z]", lambda letter: f"_{letter[0].lower()}", name)


def _from_openai(line: Mapping[str, object]) -> Mapping[str, object]:
    """Return OpenAI's form of preferences with the columns that others give it."""
    given = line.get("input")
    if not {"preferred_output", "non_preferred_output"} <= line.keys() or not isinstance(
        given, Mapping
    ):
        return line
    rest = {k: v for k, v in line.items() if not k.endswith("preferred_output") and k != "input"}
    tools = {"tools": given["tools"]} if given.get("tools") else {}
    both = {"chosen": line["preferred_output"], "rejected": line["non_preferred_output"]}
    return {**rest, "prompt": given.get("messages"), **tools, **both}


def _text_pair(fields: _Fields, both: list[str], chats: bool) -> tuple[Form, Form]:
    """Return two answers that are texts, after a prompt of any form."""
    if isinstance(fields.columns.get("prompt"), str):
        prompt = fields.text("prompt")
        return Texts(prompt, both[0]), Texts(prompt, both[1])
    if (messages := _prompt_messages(fields)) is not None:
        said = [[{"role": "assistant", "content": text}] for text in both]
        return _conversation(fields, messages, said[0]), _conversation(fields, messages, said[1])
    if fields.has("instruction"):
        first, second = (_instruction(fields, text, chats) for text in both)
        return _last_only(first), _last_only(second)
    begin = _common(*both)
    # TRL takes the space before the answers into them.
    begin -= begin > 0 and both[0][begin - 1] == " "
    return Texts(both[0][:begin], both[0][begin:]), Texts(both[1][:begin], both[1][begin:])


def _last_only(form: Form) -> Form:
    return form if isinstance(form, Texts) else form._replace(asked=len(form.messages) - 1)


def _message_pair(fields: _Fields, both: list[list[object]]) -> tuple[Form, Form]:
    """Return two answers that are messages, after a prompt, or each after the prompt itself."""
    prompt = fields.columns.get("prompt")
    messages = _prompt_messages(fields)
    alone = [bool(one) and _speaker(one[0]) == "assistant" for one in both]
    if messages is None and isinstance(prompt, str) and all(alone):
        messages = [{"role": "user", "content": fields.text("prompt")}]
    if messages is None and fields.has("instruction") and all(alone):
        messages = _asked(fields)
    if messages is None:
        begin = _common(*both)
        if not begin:
            raise RequestError(
                '"chosen" and "rejected" begin with different messages: they must answer one prompt'
            )
        messages, both = both[0][:begin], [one[begin:] for one in both]
    else:
        size = len(messages)
        both = [one[size:] if one[:size] == messages and len(one) > size else one for one in both]
    return _conversation(fields, messages, both[0]), _conversation(fields, messages, both[1])


def _prompt_messages(fields: _Fields) -> list[Any] | None:
    """Return the messages before the answers; a column of whole conversations is not that."""
    for key in ("prompt", *LISTS):
        column = fields.columns.get(key)
        if (
            isinstance(column, list)
            and column
            and (key == "prompt" or _speaker(column[-1]) != "assistant")
        ):
            return list(fields.take(key))
    return None


def _speaker(message: Any) -> object:
    """Return the role of a message, by our names where we know it by another."""
    if not isinstance(message, Mapping):
        return None
    said = message.get("role")
    said = message.get("from") if said is None else said
    return ROLES.get(said, said) if isinstance(said, str) else said


def _common(chosen: Sequence[object], rejected: Sequence[object]) -> int:
    """Return how much two answers begin with alike; where one is all of that, one less of it.

    Source: TRL, data_utils.py, extract_prompt.
    """
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shorter = min(len(chosen), len(rejected))
    return next((i for i, (a, b) in pairs if a != b), max(shorter - 1, 0))


def _quoted(keys: Iterable[str]) -> str:
    return ", ".join(f'"{key[:80]}"' for key in sorted(keys)[:10]) or "none"


def _hint(columns: Mapping[str, object]) -> str:
    """Return what a line of no form may have been meant as."""
    if "chosen" in columns and "rejected" in columns:
        return "; preferences are learnt with --dpo"
    for key, value in columns.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return f'; "{key[:80]}" holds a list: write each of its objects on a line of its own'
    return ""
