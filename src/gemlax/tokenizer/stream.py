"""Text from token ids as they come: whole characters only, and an end at stop strings.

Each new token costs the same however long the text is: its bytes go through an incremental UTF-8
decoder, the characters through one small automaton per stop string.
"""

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
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, skip_special: bool = True
    ) -> None:
        if isinstance(stop, str):
            raise TypeError(f"stop is a sequence of strings, got the string {stop!r}")
        if "" in stop:
            raise RequestError("a stop string is empty")
        self.stopped = False
        self.num_tokens = 0
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._matchers = [_Matcher(text) for text in dict.fromkeys(stop)]
        self._held = ""

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
        text = self._take(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        for matcher in self._matchers:
            matcher.length = 0
        return text

    def _take(self, text: str) -> str:
        for end, char in enumerate(text, 1):
            found = 0
            for matcher in self._matchers:
                if matcher.advance(char):
                    found = max(found, len(matcher.text))
            if found:
                self.stopped = True
                known, self._held = self._held + text[:end], ""
                return known[:-found]
        known = self._held + text
        held = max((matcher.length for matcher in self._matchers), default=0)
        self._held = known[len(known) - held :]
        return known[: len(known) - held]


class _Matcher:
    """How much of one stop string the text ends with (Knuth, Morris and Pratt, 1977)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.length = 0
        # _borders[i]: the longest proper prefix of text[:i + 1] that is also its suffix.
        self._borders = [0]
        for char in text[1:]:
            self._borders.append(self._next(self._borders[-1], char))

    def advance(self, char: str) -> bool:
        """Take the next character of the text; return whether the stop string is complete."""
        self.length = self._next(self.length, char)
        return self.length == len(self.text)

    def _next(self, length: int, char: str) -> int:
        while length and self.text[length] != char:
            length = self._borders[length - 1]
        return length + (self.text[length] == char)
