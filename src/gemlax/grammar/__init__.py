"""What an answer must match: specs, compiled by llguidance against a model's vocabulary. No jax.

A spec (`JsonSchema`, `JsonObject`, `Regex`, `Choice`, `Lark`, or the `ChatGrammar` of a chat with
tools) becomes a `Constraint` of one request, which says before each token which ones may come.
"""

from gemlax.grammar.compile import Compiler, compiler_of
from gemlax.grammar.constraint import Constraint, ThinkingBudget, mask_width
from gemlax.grammar.specs import (
    Choice,
    Grammar,
    JsonObject,
    JsonSchema,
    Lark,
    Regex,
    read_response_format,
)
from gemlax.grammar.toolcalls import ChatGrammar, Markers, ToolChoice, read_tool_choice

__all__ = [
    "ChatGrammar",
    "Choice",
    "Compiler",
    "Constraint",
    "Grammar",
    "JsonObject",
    "JsonSchema",
    "Lark",
    "Markers",
    "Regex",
    "ThinkingBudget",
    "ToolChoice",
    "compiler_of",
    "mask_width",
    "read_response_format",
    "read_tool_choice",
]
