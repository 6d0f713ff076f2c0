"""The built-in prompt formats: what the published chat templates of Gemma 3 and Gemma 4 write.

Messages come in the form of `messages.normalise`. What is returned is marked text: `own` are the
markers, and nothing that a message holds (marked.py).
Source: Google's templates, gemma-3-27b-it and Gemma 4 of 2026-07-09 (31B and E2B).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gemlax.chat.marked import join, own
from gemlax.chat.messages import text_of
from gemlax.chat.tools import declaration, write_call, write_response
from gemlax.errors import RequestError

__all__ = ["answers_to", "render_gemma3", "render_gemma4"]

Messages = Sequence[Mapping[str, Any]]
SYSTEM = ("system", "developer")
TURN_END = "<turn|>\n"
EMPTY_THOUGHT = own("<|channel>thought\n<channel|>")


def render_gemma3(messages: Messages, answered: bool = False) -> str:
    """Write a Gemma 3 prompt: system texts go in front of the first user text.

    `answered`: a whole conversation instead, without the beginning of an answer.

    Raises:
        RequestError: user and assistant do not take turns, or a system message comes later.
    """
    shift = next((i for i, m in enumerate(messages) if m["role"] not in SYSTEM), len(messages))
    prefix = join(text_of(message["content"]) + "\n\n" for message in messages[:shift])
    parts: list[str] = [own("<bos>")]
    for i, message in enumerate(messages[shift:]):
        wanted = ("user", "assistant")[i % 2]
        if message["role"] in SYSTEM:
            raise RequestError(f"messages[{i + shift}]: a system message must be the first one")
        if message["role"] != wanted:
            raise RequestError(
                f"messages[{i + shift}]: roles must alternate user, assistant, user, ...; "
                f"got {message['role']}, expected {wanted}"
            )
        role = "model" if wanted == "assistant" else "user"
        parts += [own(f"<start_of_turn>{role}\n"), prefix, _trimmed(message["content"])]
        parts.append(own("<end_of_turn>\n"))
        prefix = ""
    return join(parts if answered else [*parts, own("<start_of_turn>model\n")])


def render_gemma4(
    messages: Messages,
    tools: Sequence[Mapping[str, Any]] = (),
    thinking: bool = False,
    empty_thought: bool = True,
    answered: bool = False,
) -> str:
    """Write a Gemma 4 prompt.

    Args:
        messages: normalised. Later system messages get turns of their own.
        tools: in OpenAI's form.
        thinking: ask for a thought channel.
        empty_thought: without thinking, the answer begins with a thought channel that is empty
            (12B, 26B-A4B, 31B); not so in E2B and E4B.
        answered: write a whole conversation, without the beginning of an answer.
    """
    parts: list[str] = [own("<bos>")]
    begins = messages[0]["role"] in SYSTEM
    if thinking or tools or begins:
        parts.append(_system_turn(messages[0] if begins else None, tools, thinking))
    turns = messages[1:] if begins else messages
    last_user = max((i for i, m in enumerate(turns) if m["role"] == "user"), default=-1)
    before, last = None, ""  # the last role but tool; what the prompt ends with
    for i, message in enumerate(turns):
        role = message["role"]
        if role == "tool":
            continue
        if role == "assistant":
            if before != "assistant":
                parts.append(own("<|turn>model\n"))
            answers = answers_to(turns, i)
            text, last = _model_message(message, answers, i > last_user)
            follows = next((m["role"] for m in turns[i + 1 :] if m["role"] != "tool"), None)
            closing = _closing(message, last, bool(answers), follows)
            parts += [text, own(closing)]
            # Google's template opens no turn after what was said and closed beside a call, which
            # leaves the model none to speak in; llama.cpp opens one too.
            last = "turn" if closing == TURN_END else last
        else:
            parts += [own(f"<|turn>{role}\n"), _trimmed(message["content"]), own(TURN_END)]
            last = "turn"
        before = role
    return join(parts if answered else [*parts, _opening(last, thinking, empty_thought)])


def _system_turn(
    first: Mapping[str, Any] | None, tools: Sequence[Mapping[str, Any]], thinking: bool
) -> str:
    parts: list[str] = [own("<|turn>system\n"), own("<|think|>\n" if thinking else "")]
    if first is not None:
        content = first["content"]
        if isinstance(content, str):
            parts.append(content.strip())
        else:
            parts += [part["text"].strip() + " " for part in content]
    for tool in tools:
        parts += [own("<|tool>"), declaration(tool["function"]).strip(), own("<tool|>")]
    return join([*parts, own("<turn|>\n")])


def _model_message(
    message: Mapping[str, Any], answers: Messages, after_last_user: bool
) -> tuple[str, str]:
    """Return the text of an assistant message with its tools' answers, and what it ends as."""
    parts: list[str] = []
    last = "turn"
    if message.get("reasoning") and after_last_user:
        parts += [own("<|channel>thought\n"), message["reasoning"], own("\n<channel|>")]
    for call in message.get("tool_calls", ()):
        function = call["function"]
        parts += [own("<|tool_call>"), write_call(function["name"], function["arguments"])]
        parts.append(own("<tool_call|>"))
        last = "tool_call"
    for answer in answers:
        content = answer["content"]
        said = text_of(content) if _is_text(content) else content
        parts += [own("<|tool_response>"), write_response(answer["name"], said)]
        parts.append(own("<tool_response|>"))
        last = "tool_response"
    return join([*parts, _answer(message["content"])]), last


def _is_text(content: Any) -> bool:
    """Whether what a tool answered is a text, or text parts."""
    return isinstance(content, str) or (
        isinstance(content, list)
        and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content)
        and all(isinstance(part.get("text"), str) for part in content)
    )


def _closing(message: Mapping[str, Any], last: str, answered: bool, follows: str | None) -> str:
    """Return what ends an assistant message: consecutive ones go on in the same turn."""
    if last == "tool_call":
        return "<|tool_response>"
    if follows == "assistant":
        return ""
    has_content = bool(_answer(message["content"]).strip())
    return "" if answered and not has_content and follows is None else TURN_END


def _opening(last: str, thinking: bool, empty_thought: bool) -> str:
    """Return the generation prompt: after a tool's answer the model's turn goes on."""
    if last == "tool_call":
        return ""
    if last == "tool_response":
        return own("<|channel>thought\n" if thinking else "")
    empty = EMPTY_THOUGHT if empty_thought and not thinking else ""
    return own("<|turn>model\n") + empty


def answers_to(turns: Messages, index: int) -> Messages:
    """Return the tool messages that directly follow."""
    end = index + 1
    while end < len(turns) and turns[end]["role"] == "tool":
        end += 1
    return turns[index + 1 : end]


def _trimmed(content: Any) -> str:
    return join(text.strip() for text in _listed(content))


def _answer(content: Any) -> str:
    """Return what the model said, without thought channels that its text spells."""
    texts = []
    for text in _listed(content):
        pieces = (piece.split("<|channel>")[0] for piece in text.split("<channel|>"))
        texts.append(join(pieces).strip())
    return join(texts)


def _listed(content: Any) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content]
