"""What an answer of a chat may be: thoughts, text or a body of its own form, and tool calls.

Calls are written in Gemma 4's notation, call:NAME{key:value,...} between two control tokens, with
strings between quote tokens and keys sorted as the chat template sorts them: what the model saw.
Text cannot hold a control token, so no marker comes where it does not belong.
Source: gemma4.jinja, which writes the calls of a conversation.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Literal

from gemlax.errors import RequestError, show_value
from gemlax.grammar.constraint import ThinkingBudget
from gemlax.grammar.schemas import Rules
from gemlax.grammar.specs import Grammar, Json
from gemlax.tokenizer import Tokenizer

__all__ = ["ChatGrammar", "Markers", "ToolChoice", "read_tool_choice"]

ToolChoice = Literal["none", "auto", "required"] | Mapping[str, Json]

MAX_TOOLS = 512
PIECES = ("<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>")


@dataclasses.dataclass(frozen=True)
class Markers:
    """Ids of the control tokens of Gemma 4; None: the vocabulary has none."""

    open_call: int | None
    close_call: int | None
    quote: int | None
    open_channel: int | None
    close_channel: int | None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Markers":
        """Return those of a vocabulary."""
        ids = (tokenizer.id_of(piece) for piece in PIECES)
        return cls(*(id if id in tokenizer.special_ids else None for id in ids))

    def is_open(self, prompt: Sequence[int]) -> bool:
        """Return whether a prompt ends inside a thought channel."""
        ends = (self.open_channel, self.close_channel)
        last = next((id for id in reversed(prompt) if id in ends), None)
        return last is not None and last == self.open_channel

    def budget(self, most: int, prompt: Sequence[int]) -> ThinkingBudget:
        """Return a budget of thought; RequestError without a thought channel."""
        if self.open_channel is None or self.close_channel is None:
            raise RequestError(
                "this model has no thinking, and so no thinking_budget (Gemma 4 has)"
            )
        return ThinkingBudget(most, self.open_channel, self.close_channel, self.is_open(prompt))


@dataclasses.dataclass(frozen=True)
class ChatGrammar:
    """The answer of a chat.

    Attributes:
        markers: of the vocabulary.
        tools: declarations in OpenAI's form, {"function": {"name", "parameters"}}.
        tool_choice: "none", "auto" (text, then calls), "required" (a call or several) or the name
            of the one function that is called once.
        parallel: whether more than one call may come.
        body: what the text must match; None: any.
        thinking: a thought may come first.
        is_thinking: the prompt ends inside a thought.
        any_order: keys may come in any order, for objects of up to 6 keys.
    """

    markers: Markers
    tools: Sequence[Mapping[str, Json]] = ()
    tool_choice: str = "auto"
    parallel: bool = True
    body: Grammar | None = None
    thinking: bool = True
    is_thinking: bool = False
    any_order: bool = False

    @property
    def constrains(self) -> bool:
        """Whether anything is asked: calls that keep to schemas, none of them, or a body."""
        return bool(self.tools) or self.body is not None

    def joined(self, body: Grammar | None, prompt: Sequence[int]) -> "ChatGrammar":
        """Return the grammar after a prompt of ids, with a body of the settings."""
        if body is not None and self.body is not None:
            raise RequestError("give response_format or grammar, not both")
        is_thinking = self.markers.is_open(prompt)
        return dataclasses.replace(self, body=body or self.body, is_thinking=is_thinking)

    def source(self) -> str:
        """Return the grammar."""
        called = self._called()
        text = self._text(bool(called))
        thoughts = self._first_thoughts(repeated="thought" in text)
        lines = ["start: " + " ".join(part for part in (thoughts, text) if part)]
        if self.body is not None:
            lines += _as_body(self.body.source())
        lines += self._thought_rules()
        lines += ["TEXT: /(.|\\n)+/"]
        if called:
            lines += self._call_rules(called)
        return "\n".join(lines)

    def _called(self) -> list[Mapping[str, Json]]:
        """Return the functions that may be called."""
        if len(self.tools) > MAX_TOOLS:
            raise RequestError(f"at most {MAX_TOOLS} tools are taken, got {len(self.tools)}")
        functions = [tool["function"] for tool in self.tools]
        if self.tool_choice in ("auto", "required", "none"):
            if self.tool_choice == "required" and not functions:
                raise RequestError("tool_choice is required, and there are no tools")
            return [] if self.tool_choice == "none" else functions
        return [function for function in functions if function["name"] == self.tool_choice]

    def _has_channel(self) -> bool:
        markers = self.markers
        return markers.open_channel is not None and markers.close_channel is not None

    def _first_thoughts(self, *, repeated: bool) -> str:
        """Return the thoughts that come first; `repeated`: what follows begins with them."""
        if not self._has_channel():
            return ""
        rest = f"TEXT? <[{self.markers.close_channel}]>" if self.is_thinking else ""
        return f"{rest} {'thought?' if self.thinking and not repeated else ''}".strip()

    def _text(self, has_calls: bool) -> str:
        """Return text and calls, one or the other or both."""
        several = self.parallel and self.tool_choice in ("auto", "required")
        some = "call+" if several else "call"
        if has_calls and self.tool_choice != "auto":
            return some
        if self.body is not None:
            return f"({some} | body)" if has_calls else "body"
        # Gemma may think again, or write an empty thought, after some text.
        text = "(thought | TEXT)*" if self._has_channel() and self.thinking else "TEXT?"
        if not has_calls:
            return text
        return f"{text} {'call*' if self.parallel else 'call?'}"

    def _thought_rules(self) -> list[str]:
        if not self._has_channel() or not self.thinking:
            return []
        opened, closed = self.markers.open_channel, self.markers.close_channel
        return [f'thought: <[{opened}]> "thought\\n" TEXT? <[{closed}]>']

    def _call_rules(self, functions: Sequence[Mapping[str, Json]]) -> list[str]:
        markers = self.markers
        if markers.open_call is None or markers.close_call is None or markers.quote is None:
            raise RequestError("this model's vocabulary has no tool calls (Gemma 4 has)")
        lines, names = [], []
        rules = Rules(markers.quote, any_order=self.any_order)
        for index, function in enumerate(functions):
            schema = function.get("parameters") or {"properties": {}}
            arguments = rules.arguments(schema, function["name"], function.get("strict") is True)
            begin = json.dumps(f"call:{function['name']}", ensure_ascii=False)
            names.append(f"call_{index}")
            opened, closed = f"<[{markers.open_call}]>", f"<[{markers.close_call}]>"
            lines.append(f"call_{index}: {opened} {begin} {arguments} {closed}")
        return [f"call: {' | '.join(names)}", *lines, *rules.lines()]


def _as_body(source: str) -> list[str]:
    """Return the rules of a grammar under the name `body`."""
    first, *rest = source.split("\n")
    if not first.startswith("start: ") or rest:
        raise RequestError(
            "a grammar of one's own cannot be joined with tools or thinking: use JsonSchema, "
            "JsonObject, Regex or Choice"
        )
    return [f"body: {first.removeprefix('start: ')}"]


def read_tool_choice(choice: ToolChoice | None, tools: Sequence[Mapping[str, Json]]) -> str:
    """Return "none", "auto", "required" or a function's name; None is "auto".

    Raises:
        RequestError: it is none of these, names no tool, or there are no tools to be called.
    """
    if isinstance(choice, Mapping):
        inner = choice.get("function", choice)
        name = inner.get("name") if isinstance(inner, Mapping) else None
        names = [tool["function"]["name"] for tool in tools]
        if name in ("auto", "none", "required") or not isinstance(name, str) or name not in names:
            raise RequestError(
                f"tool_choice names {show_value(name)}, not one of the tools: {names}"
            )
        return name
    if choice not in (None, "none", "auto", "required"):
        raise RequestError(
            'tool_choice must be "none", "auto", "required" or {"name": ...}, got '
            f"{show_value(choice)}"
        )
    if choice == "required" and not tools:
        raise RequestError("tool_choice is required, and there are no tools")
    return str(choice or "auto")
