"""From the ids a model gives to content, reasoning and tool calls, token by token.

Structure comes from token ids alone: text that spells a control token is text. Nothing that a
model can write raises an error here; a call that cannot be read stays in the content as written.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from gemlax.chat.arguments import ArgumentStream, Piece
from gemlax.chat.calls import read_calls
from gemlax.tokenizer import TextStream, Tokenizer

__all__ = ["Delta", "OutputParser"]

QUOTE = '<|"|>'
THOUGHT = "thought\n"
OPEN_CALL, CLOSE_CALL = "<|tool_call>", "<tool_call|>"
OPEN_CHANNEL, CLOSE_CHANNEL = "<|channel>", "<channel|>"
APART = ("tool_calls", "call")  # each is one of its own
MARKERS = (OPEN_CALL, CLOSE_CALL, OPEN_CHANNEL, CLOSE_CHANNEL, QUOTE)


class Delta(NamedTuple):
    """What was added: text of the content or the reasoning, or one whole call as JSON.

    Where arguments are streamed, "call" is the name of a call that begins and "arguments" a piece
    of the JSON of its arguments, instead of the whole call.
    """

    kind: Literal["content", "reasoning", "tool_calls", "call", "arguments"]
    text: str


class OutputParser:
    """Takes ids as they come; `content`, `reasoning` and `tool_calls` hold what was found.

    Attributes:
        content_ids: the ids of the content, None when it is not one run of plain tokens.
        stopped: a stop string has appeared in the content; further ids are ignored.
        num_tokens: ids taken, the one that completed a stop string included.
        num_reasoning_tokens: how many of them are of a thought's text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        in_thought: bool = False,
        include_stop: bool = False,
        streams_arguments: bool = False,
    ):
        """Nothing was said yet.

        Args:
            tokenizer: of the ids.
            stop: strings that end the content.
            in_thought: the prompt ends inside a thought channel, after its name.
            include_stop: the content ends after the stop string, not before it.
            streams_arguments: give the arguments of calls as they come; a grammar must hold the
                model to the notation. A call that is cut off is then not part of the content.
        """
        self.content, self.reasoning = "", ""
        self.tool_calls: list[dict[str, Any]] = []
        self.content_ids: list[int] | None = []
        self.num_tokens = self.num_reasoning_tokens = 0
        self._stopped = False
        self._special = tokenizer.special_ids
        ids = ((tokenizer.id_of(piece), piece) for piece in MARKERS)
        self._markers = {id: piece for id, piece in ids if id in self._special}
        self._text = TextStream(tokenizer, stop, include_stop=include_stop)
        self._inner = TextStream(tokenizer)  # of reasoning and calls
        self._state: Literal["content", "thought", "call"] = "content"
        if in_thought:
            self._state = "thought"
        self._parts: list[str | None] = []  # of a call
        self._pending = ""  # of a thought
        self._named, self._begun = True, False
        self._streams_arguments = streams_arguments
        self._arguments = ArgumentStream()

    @property
    def stopped(self) -> bool:
        """Whether further ids are ignored."""
        return self._stopped or self._text.stopped

    @property
    def stop_string(self) -> str | None:
        """The stop string that has ended the content."""
        return self._text.stop

    def stop(self) -> None:
        """Ignore what comes from now on."""
        self._stopped = True

    def push(self, ids: Iterable[int]) -> list[Delta]:
        """Take ids; return what is now certain."""
        deltas: list[Delta] = []
        for id in ids:
            if self.stopped:
                break
            self.num_tokens += 1
            deltas += self._push(id)
        return _joined(deltas)

    def flush(self) -> list[Delta]:
        """Return what was held back: there are no more ids."""
        return _joined(self._leave())

    def _push(self, id: int) -> Iterator[Delta]:
        marker = self._markers.get(id)
        if marker is not None:
            yield from self._marker(marker)
        elif id in self._special:
            if self._state == "call":  # no call holds one: turn ends, media
                yield from self._leave()
        elif self._state == "content":
            if self.content_ids is not None:
                self.content_ids.append(id)
            yield from self._say("content", self._text.push([id]))
        elif self._state == "thought":
            self.num_reasoning_tokens += 1
            yield from self._think(self._inner.push([id]))
        else:
            yield from self._in_call(self._inner.push([id]))

    def _in_call(self, text: str | None) -> Iterator[Delta]:
        """Take text of a call, or a quote token (None)."""
        self._parts.append(text)
        if self._streams_arguments and text != "":
            stream = self._arguments
            pieces: list[Piece] = stream.quote() if text is None else stream.push(text)
            yield from (Delta(*piece) for piece in pieces)

    def _marker(self, marker: str) -> Iterator[Delta]:
        if marker == QUOTE:
            if self._state == "call":
                yield from self._in_call(self._inner.flush())
                yield from self._in_call(None)
        elif marker == CLOSE_CALL and self._state == "call":
            yield from self._end_call(closed=True)
        elif marker == OPEN_CALL:
            yield from self._leave()
            self._state, self._arguments = "call", ArgumentStream()
        elif marker == OPEN_CHANNEL and self._state != "thought":
            yield from self._leave()
            self._state, self._named, self._begun = "thought", False, False
        elif marker == CLOSE_CHANNEL and self._state != "content":
            yield from self._leave()

    def _leave(self) -> Iterator[Delta]:
        """End what is going on, complete or not, and go back to content."""
        state, self._state = self._state, "content"
        if state == "content":
            yield from self._say("content", self._text.flush())
        elif state == "thought":
            yield from self._end_thought()
        else:
            yield from self._end_call(closed=False)

    def _end_call(self, *, closed: bool) -> Iterator[Delta]:
        """Give the calls, also where their second token is missing and they are whole."""
        yield from self._in_call(self._inner.flush())
        calls = read_calls(self._parts, closed=closed)
        self._state = "content"
        parts, self._parts = self._parts, []
        if calls is None and self._streams_arguments:
            return
        if calls is None:  # then it is the text it is
            text = "".join(QUOTE if part is None else part for part in parts)
            self.content_ids = None
            yield from self._say("content", OPEN_CALL + text + (CLOSE_CALL if closed else ""))
            return
        self.content_ids = None if self.content_ids else self.content_ids
        self.tool_calls += calls
        for call in [] if self._streams_arguments else calls:
            yield Delta("tool_calls", json.dumps(call, ensure_ascii=False))

    def _think(self, text: str) -> Iterator[Delta]:
        """Take text of a thought; its name and the white space around it are left out."""
        self._pending += text
        if not self._named:
            if len(self._pending) < len(THOUGHT) and THOUGHT.startswith(self._pending):
                return
            self._pending, self._named = self._pending.removeprefix(THOUGHT), True
        if not self._begun:
            self._pending = self._pending.lstrip()
            if self._pending and self.reasoning:
                self._pending = "\n\n" + self._pending
        certain = self._pending.rstrip()
        if certain:
            self._begun = True
            self._pending = self._pending[len(certain) :]
            yield from self._say("reasoning", certain)

    def _end_thought(self) -> Iterator[Delta]:
        rest = self._inner.flush()
        if not self._named and (self._pending + rest).strip() == THOUGHT.strip():
            self._pending, rest = "", ""
        self._named = True
        yield from self._think(rest)
        self._pending = ""

    def _say(self, kind: Literal["content", "reasoning"], text: str) -> Iterator[Delta]:
        if not text:
            return
        if kind == "content":
            self.content += text
        else:
            self.reasoning += text
        yield Delta(kind, text)


def _joined(deltas: Iterable[Delta]) -> list[Delta]:
    """Put neighbours of one kind together; calls stay apart."""
    joined: list[Delta] = []
    for delta in deltas:
        if joined and joined[-1].kind == delta.kind and delta.kind not in APART:
            joined[-1] = Delta(delta.kind, joined[-1].text + delta.text)
        else:
            joined.append(delta)
    return joined
