"""Chat: messages to prompts and answers to messages, without jax.

`ChatFormat` is what the model holds: it encodes messages, by the checkpoint's template (rendered
in a worker process) or by a built-in Gemma 3 or Gemma 4 format, and makes the parser that takes
an answer apart into content, reasoning and tool calls.
"""

from gemlax.chat.messages import Message
from gemlax.chat.parser import Delta, OutputParser
from gemlax.chat.prompt import ChatFormat
from gemlax.chat.template import Template

__all__ = ["ChatFormat", "Delta", "Message", "OutputParser", "Template"]
