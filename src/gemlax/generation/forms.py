"""What the answers of a chat must look like, from what its caller asks."""

from collections.abc import Iterable, Mapping
from typing import Any

from gemlax.chat.messages import check_tools
from gemlax.grammar import (
    ChatGrammar,
    Grammar,
    Markers,
    ToolChoice,
    read_response_format,
    read_tool_choice,
)
from gemlax.tokenizer import Tokenizer

__all__ = ["chat_grammar"]


def chat_grammar(
    tokenizer: Tokenizer,
    *,
    tools: Iterable[Any] | None = None,
    thinking: bool | None = None,
    tool_choice: ToolChoice | None = None,
    parallel_tool_calls: bool = True,
    response_format: Mapping[str, Any] | Grammar | None = None,
) -> ChatGrammar:
    """Return the grammar of a chat, whose arguments are those of `Model.chat`.

    Without a choice calls are held to nothing, unless the content is: then they must be told from
    it. A grammar that asks nothing has a false `constrains`.
    """
    body = read_response_format(response_format)
    declared = check_tools(tools) if tool_choice is not None or body is not None else []
    chosen = read_tool_choice(tool_choice, declared)
    has_calls = bool(declared) and chosen != "none"
    return ChatGrammar(
        Markers.of(tokenizer), declared, chosen, parallel_tool_calls, body,
        thinking=bool(thinking) or has_calls,
    )  # fmt: skip
