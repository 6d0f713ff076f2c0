"""Prompts as token ids, checked."""

import itertools
from collections.abc import Iterable, Sequence
from operator import index
from typing import Any

import numpy as np

from gemlax.config import TextConfig
from gemlax.errors import RequestError
from gemlax.tokenizer import Tokenizer

__all__ = ["Prompt", "as_ids", "check_ids", "read_prompts", "spelled_marker"]

Prompt = str | Sequence[str] | Sequence[Sequence[int]]


def as_ids(ids: Iterable[Any] | None, what: str) -> list[int]:
    """Return token ids as integers, of Python, NumPy or JAX; RequestError for anything else."""
    if not (ids is None or np.iterable(ids)):
        raise RequestError(f"{what} must be a list of token ids, got {ids!r}")
    checked = []
    for id in () if ids is None else ids:
        try:
            if isinstance(id, (bool, np.bool_)):
                raise TypeError
            checked.append(index(id))
        except TypeError:
            raise RequestError(
                f"{what} must be integer token ids, got {id!r} ({type(id).__name__})"
            ) from None
    return checked


def read_prompts(
    prompt: Prompt, tokenizer: Tokenizer | None, config: TextConfig, *, parse_special: bool = False
) -> list[list[int]]:
    """Return prompts as ids that have a row in the table: a str gets one BOS."""
    items: list[Any] = [prompt] if isinstance(prompt, str) else list(prompt)
    if not items:
        raise RequestError("no prompt: got an empty list")
    if all(isinstance(item, str) for item in items):
        if tokenizer is None:
            raise RequestError("this model has no tokenizer: give lists of ids, not text")
        prompts = [tokenizer.encode(item, parse_special=parse_special) for item in items]
    elif any(isinstance(item, str) or not np.iterable(item) for item in items):
        raise RequestError("a prompt is a str, a list of str, or a list of lists of ids")
    else:
        prompts = [as_ids(item, "a prompt") for item in items]
    if not all(prompts):
        raise RequestError("a prompt of ids must hold at least one id (BOS)")
    check_ids(np.asarray(list(itertools.chain(*prompts))), config, tokenizer)
    return prompts


def check_ids(ids: np.ndarray, config: TextConfig, tokenizer: Tokenizer | None) -> None:
    """Raise RequestError for an id without a row in the tables; say what it stands for."""
    wrong = ids[(ids < 0) | (ids >= config.num_ids)]
    if wrong.size:
        known = tokenizer is not None and 0 <= wrong[0] < tokenizer.num_tokens
        named = f" ({tokenizer.piece(int(wrong[0]))!r})" if known and tokenizer else ""
        raise RequestError(config.refusal(int(wrong[0]), named))


def spelled_marker(prompt: Prompt, tokenizer: Tokenizer | None) -> str | None:
    """Return the first control token that the text of a prompt spells, if one does."""
    texts = [prompt] if isinstance(prompt, str) else prompt
    for text in texts if tokenizer else ():
        parts = tokenizer.split_special(text) if tokenizer and isinstance(text, str) else ()
        for part in parts:
            if isinstance(part, int) and tokenizer:
                return tokenizer.piece(part)
    return None
