"""Text that knows, for each of its characters, who wrote it.

A prompt is put together from a format's own text and from what people and tools said. Only the
first may name control tokens. `Marked` is a str that carries one mark per character through the
operations that templates use; whatever other operation a text goes through gives a plain str,
whose characters count as input. So a mark can get lost, and never appear.

It knows nothing of gemlax: the worker that renders templates uses it as well.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, SupportsIndex

__all__ = ["INPUT", "OWN", "Marked", "join", "mark_own", "marks_of", "runs"]

# Marks are characters, so that they are sliced and put together as the text is. Those above OWN
# name one input each (`mark_of_input`).
INPUT, OWN = "\0", "\1"

# One conversion of the % operator. Source: docs.python.org, "printf-style String Formatting".
CONVERSION = re.compile(r"%(?:\(([^()]*)\))?([-#0 +]*[*\d.]*[hlL]?)(.)", re.S)


class Marked(str):
    """A text and a mark for each character. `Marked(text)` takes over the marks that text has."""

    __slots__ = ("_marks",)  # the sandbox denies templates what begins with an underscore
    _marks: str

    def __new__(cls, text: str = "", marks: str | None = None) -> "Marked":
        """`marks`: one character each."""
        marked = super().__new__(cls, text)
        marked._marks = marks_of(text) if marks is None else marks
        return marked

    def __str__(self) -> str:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Marked, (str.__str__(self), self._marks)

    def __add__(self, other: str) -> str:
        if type(other) not in (str, Marked):  # Markup escapes what it is joined to
            return NotImplemented
        return Marked(str.__add__(self, other), self._marks + marks_of(other))

    def __radd__(self, other: str) -> str:
        if not isinstance(other, str):
            return NotImplemented
        return Marked(str.__add__(other, self), marks_of(other) + self._marks)

    def __mul__(self, count: SupportsIndex) -> str:
        return Marked(str.__mul__(self, count), self._marks * count)

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> str:
        return _percent(self, values)

    def __rmod__(self, form: str) -> str:
        return _percent(Marked(form), self)

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        return Marked(str.__getitem__(self, key), self._marks[key])

    def __iter__(self) -> Iterator[str]:
        for char, mark in zip(str.__str__(self), self._marks, strict=True):
            yield Marked(char, mark)

    def join(self, items: Iterable[str], /) -> str:
        """Join, each item with its marks."""
        listed = list(items)
        return Marked(str.join(self, listed), self._marks.join(map(marks_of, listed)))

    def replace(self, old: str, new: str, /, count: SupportsIndex = -1) -> str:
        """Replace; what comes in keeps its own marks."""
        text = str.replace(self, old, new, count)
        marks, end = [], 0
        for start in _matches(self, old, count.__index__()):
            marks += [self._marks[end:start], marks_of(new)]
            end = start + len(old)
        return Marked(text, "".join([*marks, self._marks[end:]]))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """Split as str does."""
        return self._pieces(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """Split as str does."""
        return self._pieces(str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        """Split as str does."""
        lines = self._neighbours(str.splitlines(self, True))
        if keepends:
            return lines
        return [line[: len(text)] for line, text in zip(lines, str.splitlines(self), strict=True)]

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        """Split at the first."""
        left, middle, right = self._neighbours(str.partition(self, sep))
        return left, middle, right

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        """Split at the last."""
        left, middle, right = self._neighbours(str.rpartition(self, sep))
        return left, middle, right

    def strip(self, chars: str | None = None, /) -> str:
        """Strip both ends."""
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> str:
        """Strip the beginning."""
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None, /) -> str:
        """Strip the end."""
        return self[: len(str.rstrip(self, chars))]

    def removeprefix(self, prefix: str, /) -> str:
        """Leave a beginning out."""
        return self[len(self) - len(str.removeprefix(self, prefix)) :]

    def removesuffix(self, suffix: str, /) -> str:
        """Leave an end out."""
        return self[: len(str.removesuffix(self, suffix))]

    def _case(change: Callable[[str], str]) -> Callable[["Marked"], str]:  # type: ignore[misc]
        def changed(self: "Marked") -> str:
            text = change(self)
            if len(text) == len(self):  # no case mapping removes a character: this is one to one
                return Marked(text, self._marks)
            alike = set(self._marks)
            return Marked(text, alike.pop() * len(text)) if len(alike) == 1 else text

        return changed

    upper, lower, title = _case(str.upper), _case(str.lower), _case(str.title)
    capitalize, swapcase = _case(str.capitalize), _case(str.swapcase)
    casefold = _case(str.casefold)

    def _pieces(self, parts: list[str], sep: str | None) -> list[str]:
        """Return the same parts with their marks; in their order, only sep between them."""
        end, pieces = 0, []
        for part in parts:
            start = str.find(self, part, end) if sep is None else end
            pieces.append(self[start : start + len(part)])
            end = start + len(part) + len(sep or "")
        return pieces

    def _neighbours(self, parts: Iterable[str]) -> list[str]:
        """Return the same parts with their marks; nothing between them."""
        return self._pieces(list(parts), "")


def marks_of(text: str) -> str:
    """Return the marks of any text."""
    return text._marks if isinstance(text, Marked) else INPUT * len(text)


@functools.lru_cache(maxsize=4096)
def mark_own(text: str) -> Marked:
    """Return a text as the format's own."""
    return Marked(text, OWN * len(text))


def join(parts: Iterable[str]) -> str:
    """Put texts together; plain if all of them are."""
    texts = list(parts)
    text = "".join(texts)
    if not any(isinstance(part, Marked) for part in texts):
        return text
    return Marked(text, "".join(map(marks_of, texts)))


def runs(text: str) -> Iterator[tuple[str, str]]:
    """Yield (mark, text) of the longest runs of one mark, the text plain."""
    plain = str.__str__(text)
    for run in re.finditer(r"(.)\1*", marks_of(text), re.S):
        yield run[1], plain[run.start() : run.end()]


def _matches(text: str, old: str, count: int) -> Iterator[int]:
    """Yield where `replace` replaces, at most `count` times if that is not negative."""
    start = 0
    while count != 0:
        start = str.find(text, old, start)
        if start < 0:
            return
        yield start
        start += len(old) or 1
        count -= 1


def _percent(form: Marked, values: Any) -> str:
    """Follow the % operator where each conversion can be done alone; input otherwise."""
    text = str.__mod__(form, values)
    alike = set(form._marks)
    if len(alike) != 1:
        return text
    mark, end = alike.pop(), 0
    parts: list[str] = []
    unused = list(values) if isinstance(values, tuple) else [values]
    for conversion in CONVERSION.finditer(form):
        parts.append(Marked(form[end : conversion.start()], mark * (conversion.start() - end)))
        end = conversion.end()
        key, flags, kind = conversion.groups()
        if kind == "%":
            parts.append(Marked("%", mark))
            continue
        if "*" in flags:
            return text
        if key is not None and isinstance(values, Mapping):
            value = values[key]
        elif unused:
            value = unused.pop(0)
        else:
            return text
        kept = isinstance(value, Marked) and kind == "s" and not flags
        parts.append(value if kept else str.__mod__(f"%{flags}{kind}", (value,)))
    parts.append(Marked(form[end:], mark * (len(form) - end)))
    followed = join(parts)
    return followed if followed == text else text
