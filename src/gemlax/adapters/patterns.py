"""Patterns of module names, as peft's rank_pattern and alpha_pattern have them, in linear time.

A pattern comes from a file, and Python's own matching takes exponential time for some. So it
becomes an automaton (Glushkov's: a state per character that it may take), which reads a name once,
whatever the pattern is. What no automaton can do, look-arounds and references, is refused.
"""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

from gemlax.errors import CheckpointError, UnsupportedError

__all__ = ["matcher"]

_MAX_LENGTH = 2000
_MAX_STATES = 2000  # a count in braces multiplies them
_MAX_DEPTH = 50
# Without alternatives and repeats Python's matching is linear, too, and faster.
_PLAIN = re.compile(r"\^?(?:\w|-|\.|\\\.)*\$?")
_TOKEN = re.compile(
    r"(?P<set>\[\^?\]?(?:\\.|[^\\\]])*\])|(?P<escape>\\.)|(?P<open>\((?:\?:|\?P<\w+>)?)"
    r"|(?P<close>\))|(?P<or>\|)|(?P<repeat>(?:[*+?]|\{(?:\d+,?\d*|,\d*)\})\??)|(?P<one>.)",
    re.DOTALL,
)
# What stands for one character; other letters after a backslash assert or refer.
_ESCAPES = frozenset("dDwWsS")


class Part(NamedTuple):
    """A part of a pattern: whether it may be empty, and the states it begins and ends with."""

    empty: bool
    first: frozenset[int]
    last: frozenset[int]


_NOTHING = Part(True, frozenset(), frozenset())


@functools.lru_cache(maxsize=1024)
def matcher(pattern: str) -> Callable[[str], bool]:
    r"""Return what tells whether a pattern fits a name or what follows a dot in it, as in peft.

    peft asks `re.match(rf"(.*\.)?({pattern})$", name)`.
    """
    if len(pattern) > _MAX_LENGTH:
        raise UnsupportedError(f"a pattern of {len(pattern)} characters; at most {_MAX_LENGTH}")
    try:
        compiled = re.compile(rf"(?:.*\.)?(?:{pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"no regular expression: {error}") from error
    if _PLAIN.fullmatch(pattern):
        return lambda name: compiled.match(name) is not None
    return _Automaton(pattern).fits


class _Automaton:
    """The states of a pattern, and which may follow which."""

    def __init__(self, pattern: str):
        anchored = pattern.startswith("^")
        pattern = pattern.removeprefix("^")
        if pattern.endswith("$") and not pattern.endswith("\\$"):
            pattern = pattern.removesuffix("$")
        self._tokens = list(_TOKEN.finditer(pattern))
        self._at, self._depth = 0, 0
        self._accepts: list[re.Pattern[str]] = []
        self._follow: list[set[int]] = []
        whole = self._alternatives()
        if self._at < len(self._tokens):
            raise CheckpointError("no regular expression: unbalanced parenthesis")
        self._steps: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        self._whole, self._anchored = whole, anchored

    def fits(self, name: str) -> bool:
        """Tell whether the pattern is a name, or what follows a dot in it."""
        whole = self._whole
        ends = [-1, *(i for i, c in enumerate(name) if c == ".")]
        begins = {0} if self._anchored else {i + 1 for i in ends}
        states: frozenset[int] = frozenset()
        for i, character in enumerate(name):
            wanted = states | {-1} if i in begins else states
            key = (wanted, character)
            if key not in self._steps:
                self._steps[key] = self._step(wanted, character)
            states = self._steps[key]
        return bool(states & whole.last) or (whole.empty and len(name) in begins)

    def _step(self, states: frozenset[int], character: str) -> frozenset[int]:
        reached: set[int] = set()
        for state in states:
            reached |= self._whole.first if state < 0 else self._follow[state]
        return frozenset(s for s in reached if self._accepts[s].fullmatch(character))

    def _peek(self) -> str | None:
        return self._tokens[self._at].lastgroup if self._at < len(self._tokens) else None

    def _alternatives(self) -> Part:
        choice = self._sequence()
        while self._peek() == "or":
            self._at += 1
            other = self._sequence()
            choice = Part(
                choice.empty or other.empty, choice.first | other.first, choice.last | other.last
            )
        return choice

    def _sequence(self) -> Part:
        sequence = _NOTHING
        while self._peek() not in (None, "or", "close"):
            begin, made = self._at, self._one()
            if self._peek() == "repeat":
                made = self._repeated(begin, made)
            sequence = self._joined(sequence, made)
        return sequence

    def _joined(self, a: Part, b: Part) -> Part:
        for state in a.last:
            self._follow[state] |= b.first
        first = a.first | b.first if a.empty else a.first
        return Part(a.empty and b.empty, first, a.last | b.last if b.empty else b.last)

    def _repeated(self, begin: int, made: Part) -> Part:
        """Return a part as often as the token that follows it says; `begin` is where it begins."""
        token = self._tokens[self._at][0]
        after = self._at + 1
        least, greatest = _counts(token)
        repeated = self._joined(_NOTHING, made) if least else made._replace(empty=True)
        for number in range(1, max(least, 1) if greatest is None else greatest):
            self._at = begin
            again = self._one()
            repeated = self._joined(repeated, again._replace(empty=again.empty or number >= least))
            made = again
        if greatest is None:
            for state in made.last:
                self._follow[state] |= made.first
        self._at = after
        return _NOTHING if greatest == 0 else repeated

    def _one(self) -> Part:
        token, kind = self._tokens[self._at][0], self._peek()
        self._at += 1
        if kind == "open":
            return self._group()
        if kind == "repeat" or token in ("^", "$"):
            raise UnsupportedError(f"{token!r} inside is not supported")
        if kind == "escape" and token[1].isalnum() and token[1] not in _ESCAPES:
            raise UnsupportedError(f"{token} is not supported")
        if len(self._accepts) >= _MAX_STATES:
            raise UnsupportedError("it counts too far")
        state = len(self._accepts)
        self._accepts.append(re.compile(token))
        self._follow.append(set())
        return Part(False, frozenset({state}), frozenset({state}))

    def _group(self) -> Part:
        if self._peek() == "repeat":
            raise UnsupportedError("look-arounds, flags and references are not supported")
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise UnsupportedError("it is nested too deeply")
        group = self._alternatives()
        if self._peek() != "close":
            raise CheckpointError("no regular expression: unbalanced parenthesis")
        self._at += 1
        self._depth -= 1
        return group


def _counts(token: str) -> tuple[int, int | None]:
    """Return the least and the most that a repeat stands for; None: any number."""
    lazy = token.removesuffix("?") if len(token) > 1 else token
    if lazy in ("*", "+", "?"):
        return {"*": (0, None), "+": (1, None), "?": (0, 1)}[lazy]
    low, comma, high = lazy[1:-1].partition(",")
    least = int(low or 0)
    if not comma:
        return least, least
    return least, int(high) if high else None
