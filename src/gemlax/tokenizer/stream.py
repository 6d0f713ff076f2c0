"""Text from token ids as they come: whole characters only, and an end at stop strings."""

import codecs
from collections.abc import Iterable, Sequence
from operator import index
from typing import SupportsIndex

from gemlax.errors import RequestError
from gemlax.tokenizer.core import Tokenizer

__all__ = ["TextStream"]


class TextStream:
    """Incremental `Tokenizer.decode`: all pieces of text, joined, are what it would return.

    Held back is what may yet change: an unfinished UTF-8 sequence, and text that may be the start
    of a stop string. The stop string that is complete first ends the text, before its first
    character; of two that end with the same character the longer one counts. So the result does
    not depend on how the text falls into tokens.

    Attributes:
        stopped: A stop string has appeared; further ids are ignored.
        num_tokens: The ids taken so far, the one that completed a stop string included.
        stop: The stop string that has appeared.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        skip_special: bool = True,
        include_stop: bool = False,
    ) -> None:
        """`include_stop`: the text ends after the stop string, not before it."""
        if isinstance(stop, str):
            raise TypeError(f"stop is a sequence of strings, got the string {stop!r}")
        if "" in stop:
            raise RequestError("a stop string is empty")
        self.stopped = False
        self.num_tokens = 0
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = tuple(stop)
        self._include_stop = include_stop
        self.stop: str | None = None
        self._tail = ""  # what may be the start of a stop string

    def push(self, ids: Iterable[SupportsIndex]) -> str:
        """Take ids; return the text that is now certain. Raises RequestError for an unknown id."""
        text = []
        for id in ids:
            if self.stopped:
                break
            data = self._tokenizer.token_bytes(index(id), skip_special=self._skip_special)
            self.num_tokens += 1
            text.append(self._take(self._decoder.decode(data)))
        return "".join(text)

    def flush(self) -> str:
        """Return what was held back: there are no more ids."""
        text = self._take(self._decoder.decode(b"", final=True)) + self._tail
        self._tail = ""
        return text

    def _take(self, text: str) -> str:
        text, self._tail = self._tail + text, ""
        starts = [(text.find(stop), len(stop)) for stop in self._stops]
        if ends := [(start + size, start) for start, size in starts if start >= 0]:
            self.stopped = True
            end, start = min(ends)
            self.stop = text[start:end]
            return text[: end if self._include_stop else start]
        certain = min((_begin(text, stop) for stop in self._stops), default=len(text))
        self._tail = text[certain:]
        return text[:certain]


def _begin(text: str, stop: str) -> int:
    """Return where the end of a text begins that a stop string may begin with."""
    start = max(0, len(text) - len(stop) + 1)
    while (start := text.find(stop[0], start)) >= 0:
        if stop.startswith(text[start:]):
            return start
        start += 1
    return len(text)
