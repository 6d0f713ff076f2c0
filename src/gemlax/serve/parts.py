"""The parts of an answer, whole or on their way, between `Update`s and a protocol's events."""

import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple

from gemlax.serve.body import random_id
from gemlax.serve.work import Answers, ServeError, TokenLogprob, Update, Usage

__all__ = ["Part", "Parts", "Step", "failure", "gather"]


@dataclasses.dataclass
class Part:
    """A stretch of text or of reasoning, or a tool call.

    Attributes:
        index: among the parts.
        text: of a call: its arguments as JSON text.
        name: of the tool that is called.
        key: 24 characters that ids of the part are made of.
        logprobs: of the tokens of a text.
        complete: it was not cut off.
    """

    index: int
    kind: Literal["content", "reasoning", "call"]
    name: str = ""
    text: str = ""
    key: str = dataclasses.field(default_factory=random_id)
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    complete: bool = False


class Step(NamedTuple):
    """A part opens, grows by a text, or closes. Parts open and close one after another."""

    kind: Literal["open", "grow", "close"]
    part: Part
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()


class Parts:
    """The parts of one answer so far.

    Attributes:
        last: the update that ended the answer; None: it goes on.
        usage: of the last update.
    """

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.last: Update | None = None
        self.usage = Usage()
        self._is_open = False
        self._logprobs: list[TokenLogprob] = []  # of tokens whose text has not come yet

    def take(self, update: Update) -> Iterator[Step]:
        """Yield what an update changes. Iterate to the end."""
        self._logprobs += update.logprobs
        for kind, text in update.deltas:
            if kind == "call":
                yield from self._open("call", text)
            elif kind == "arguments":
                if not self._is_open or self.parts[-1].kind != "call":
                    raise ValueError("arguments of a tool call that did not begin")
                yield self._grow(text)
            elif text:
                if not self._is_open or self.parts[-1].kind != kind:
                    yield from self._open(kind)
                yield self._grow(text)
        self.usage = update.usage
        if update.finish_reason is not None:
            self.last = update
            yield from self._close(update.finish_reason in ("stop", "tool_calls"))

    def _open(
        self, kind: Literal["content", "reasoning", "call"], name: str = ""
    ) -> Iterator[Step]:
        yield from self._close(complete=True)
        self.parts.append(Part(len(self.parts), kind, name))
        self._is_open = True
        yield Step("open", self.parts[-1])

    def _grow(self, text: str) -> Step:
        part, logprobs = self.parts[-1], tuple(self._logprobs)
        self._logprobs = []
        part.text += text
        if part.kind != "content":
            return Step("grow", part, text)
        part.logprobs += logprobs
        return Step("grow", part, text, logprobs)

    def _close(self, complete: bool) -> Iterator[Step]:
        if not self._is_open:
            return
        part = self.parts[-1]
        if self.last is not None and self._logprobs and part.kind == "content":
            yield self._grow("")
        if part.kind == "call" and complete and not part.text:
            yield self._grow("{}")
        part.complete, self._is_open = complete, False
        yield Step("close", part)


def failure(update: Update) -> ServeError | None:
    """Return why an answer has no proper end; None: it has, or goes on."""
    if update.finish_reason == "error":
        return update.error or ServeError(500, "the answer failed")
    if update.finish_reason == "abort":
        return update.error or ServeError(503, "the answer was ended before it was complete")
    return None


async def gather(answers: Answers) -> Parts:
    """Return the parts of a whole answer; raise the ServeError that ended it, if one did."""
    parts = Parts()
    try:
        async for update in answers:
            for _ in parts.take(update):
                pass
            if error := failure(update):
                raise error
    finally:
        await answers.cancel()
    if parts.last is None:
        raise ServeError(500, "the answer has no end")
    return parts
