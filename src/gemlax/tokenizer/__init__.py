"""Text to token ids and back, for every form in which a Gemma vocabulary is published.

`Tokenizer` is the one thing a caller holds; `TextStream` is its incremental decoder. The forms are
`tokenizer.json` (see fast.py), `tokenizer.model` (see spm.py) and the lists of a GGUF header
(`Tokenizer.from_vocabulary`). Nothing here knows chat templates, stop tokens or jax.
"""

from gemlax.tokenizer.core import Tokenizer
from gemlax.tokenizer.load import (
    find_chat_template,
    find_tokenizer,
    load_tokenizer,
    write_chat_template,
)
from gemlax.tokenizer.stream import TextStream

__all__ = [
    "TextStream",
    "Tokenizer",
    "find_chat_template",
    "find_tokenizer",
    "load_tokenizer",
    "write_chat_template",
]
