"""The built-in prompt formats: what the published chat templates of Gemma 3 and Gemma 4 write.

Messages come in the form of `messages.normalise`, their text already free of control tokens
(prompt.py); every marker in what is returned was written here.
Source: Google's templates, gemma-3-27b-it and Gemma 4 of 2026-07-09 (31B and E2B).
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from gemlax.chat.messages import plain_response, text_of
from gemlax.chat.tools import declaration, write_call, write_response
from gemlax.errors import RequestError

__all__ = ["answers_to", "render_gemma3", "render_gemma4", "strip_thinking"]

Messages = Sequence[Mapping[str, Any]]
T = TypeVar("T", bound=Mapping[str, Any])


def render_gemma3(messages: Messages, answered: bool = False) -> str:
    """Write a Gemma 3 prompt: the system text goes in front of the first user text.

    `answered`: a whole conversation instead, without the beginning of an answer.

    Raises:
        RequestError: user and assistant do not take turns.
    """
    prefix, shift = "", 0
    if messages[0]["role"] == "system":
        prefix, shift = text_of(messages[0]["content"]) + "\n\n", 1
    parts = ["<bos>"]
    for i, message in enumerate(messages[shift:]):
        wanted = ("user", "assistant")[i % 2]
        if message["role"] != wanted:
            raise RequestError(
                f"messages[{i + shift}]: roles must alternate user, assistant, user, ...; "
                f"got {message['role']}, expected {wanted}"
            )
        role = "model" if wanted == "assistant" else "user"
        text = prefix + _trimmed(message["content"])
        parts.append(f"<start_of_turn>{role}\n{text}<end_of_turn>\n")
        prefix = ""
    return "".join(parts if answered else [*parts, "<start_of_turn>model\n"])


def render_gemma4(
    messages: Messages,
    tools: Sequence[Mapping[str, Any]] = (),
    thinking: bool = False,
    empty_thought: bool = True,
    answered: bool = False,
) -> str:
    """Write a Gemma 4 prompt.

    Args:
        messages: normalised.
        tools: in OpenAI's form.
        thinking: ask for a thought channel.
        empty_thought: without thinking, the answer begins with a thought channel that is empty
            (12B, 26B-A4B, 31B); not so in E2B and E4B.
        answered: write a whole conversation, without the beginning of an answer.
    """
    parts = ["<bos>"]
    if thinking or tools or messages[0]["role"] == "system":
        parts.append(_system_turn(messages[0], tools, thinking))
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    last_user = max((i for i, m in enumerate(turns) if m["role"] == "user"), default=-1)
    before, last = None, ""  # the last role but tool; what the prompt ends with
    for i, message in enumerate(turns):
        role = message["role"]
        if role == "tool":
            continue
        if role == "user":
            parts.append(f"<|turn>user\n{_trimmed(message['content'])}<turn|>\n")
            last = "turn"
        else:
            if before != "assistant":
                parts.append("<|turn>model\n")
            answers = answers_to(turns, i)
            text, last = _model_message(message, answers, i > last_user)
            follows = next((m["role"] for m in turns[i + 1 :] if m["role"] != "tool"), None)
            parts += [text, _closing(message, last, bool(answers), follows)]
        before = role
    return "".join(parts if answered else [*parts, _opening(last, thinking, empty_thought)])


def _system_turn(
    first: Mapping[str, Any], tools: Sequence[Mapping[str, Any]], thinking: bool
) -> str:
    parts = ["<|turn>system\n", "<|think|>\n" if thinking else ""]
    if first["role"] == "system":
        content = first["content"]
        if isinstance(content, str):
            parts.append(content.strip())
        else:
            parts += [part["text"].strip() + " " for part in content]
    parts += [f"<|tool>{declaration(tool['function']).strip()}<tool|>" for tool in tools]
    return "".join([*parts, "<turn|>\n"])


def _model_message(
    message: Mapping[str, Any], answers: Messages, after_last_user: bool
) -> tuple[str, str]:
    """Return the text of an assistant message with its tools' answers, and what it ends as."""
    parts, last = [], "turn"
    if message.get("reasoning") and after_last_user:
        parts.append(f"<|channel>thought\n{message['reasoning']}\n<channel|>")
    for call in message.get("tool_calls", ()):
        function = call["function"]
        parts.append(f"<|tool_call>{write_call(function['name'], function['arguments'])}")
        parts.append("<tool_call|>")
        last = "tool_call"
    for answer in answers:
        response = write_response(answer["name"], plain_response(answer["content"]))
        parts.append(f"<|tool_response>{response}")
        parts.append("<tool_response|>")
        last = "tool_response"
    parts.append(_trimmed(message["content"]))
    return "".join(parts), last


def _closing(message: Mapping[str, Any], last: str, answered: bool, follows: str | None) -> str:
    """Return what ends an assistant message: consecutive ones go on in the same turn."""
    if last == "tool_call":
        return "<|tool_response>"
    if follows == "assistant":
        return ""
    has_content = bool(_trimmed(message["content"]))
    return "" if answered and not has_content and follows is None else "<turn|>\n"


def _opening(last: str, thinking: bool, empty_thought: bool) -> str:
    """Return the generation prompt: after a tool's answer the model's turn goes on."""
    if last == "tool_call":
        return ""
    if last == "tool_response":
        return "<|channel>thought\n" if thinking else ""
    empty = "<|channel>thought\n<channel|>" if empty_thought and not thinking else ""
    return f"<|turn>model\n{empty}"


def answers_to(turns: Sequence[T], index: int) -> Sequence[T]:
    """Return the tool messages that directly follow."""
    end = index + 1
    while end < len(turns) and turns[end]["role"] == "tool":
        end += 1
    return turns[index + 1 : end]


def _trimmed(content: Any) -> str:
    parts = [content] if isinstance(content, str) else [part["text"] for part in content]
    return "".join(part.strip() for part in parts)


def strip_thinking(text: str) -> str:
    """Remove thought channels from a model's text, as the Gemma 4 template does."""
    return "".join(part.split("<|channel>")[0] for part in text.split("<channel|>"))
