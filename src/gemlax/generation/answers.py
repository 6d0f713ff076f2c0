"""Answers as they come: the events of an engine, taken apart into tokens and text."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from gemlax.engine import Engine, Event, FinishReason, Request, Usage

__all__ = ["Answer", "Completion", "Parser", "Stream", "TokenLogprob", "drive", "streaming"]


class TokenLogprob(NamedTuple):
    """The log-probability (natural, before any sampling setting) of a token, and the likeliest."""

    token: int
    logprob: float
    top: dict[int, float]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was generated. `tokens` includes the stop token, `text` shows no control token.

    `finish_reason` is "stop" (a stop id, a stop string, or a grammar that is complete), "length",
    or "error": no token could come by the grammar, for which `error` says why. `accepted_per_step`:
    how many drafts a step accepted on average, None without drafts. `usage`: what it took.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None = None
    accepted_per_step: float | None = None
    usage: Usage = dataclasses.field(default=Usage(), compare=False)
    error: str | None = None


class Parser(Protocol):
    """Takes ids, returns what they say: `TextStream` text, `OutputParser` deltas."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the answer."""
        ...

    @property
    def num_tokens(self) -> int:
        """How many ids were taken, the one that completed a stop string included."""
        ...

    def push(self, ids: list[int], /) -> Any:
        """Take ids; return what is now certain."""
        ...

    def flush(self) -> Any:
        """Return what was held back: there are no more ids."""
        ...


class Answer:
    """The answer to one request, so far.

    Attributes:
        tokens: all that came, also those after a stop string.
        logprobs: of each of them, where asked for.
        usage: what they took.
    """

    def __init__(self, request: Request, parser: Parser | None, num_logprobs: int | None):
        """`parser` None: ids alone are wanted."""
        self.request, self.parser = request, parser
        self.tokens: list[int] = []
        self._num_logprobs = num_logprobs
        self.logprobs: list[TokenLogprob] = []
        self.usage = Usage(len(request.prompt))
        self._reason: FinishReason = "length"
        self.error: str | None = None

    @property
    def is_stopped(self) -> bool:
        """Whether the text has come to its end before the engine knows."""
        return self.parser is not None and self.parser.stopped

    def take(self, event: Event) -> Any:
        """Take in an event; return what the parser makes of it, without a parser the new ids."""
        self.tokens += event.tokens
        self.usage, self.error = event.usage, event.error
        self._reason = event.finish_reason or self._reason
        if event.logprobs is not None:
            self._note(event.tokens, *event.logprobs)
        if self.parser is None:
            return event.tokens
        piece = self.parser.push(event.tokens)
        if event.finish_reason is not None and not self.parser.stopped:
            piece = piece + self.parser.flush()
        return piece

    def _note(self, tokens: list[int], logprobs: Any, ids: Any, values: Any) -> None:
        count = self._num_logprobs
        self.logprobs += [
            TokenLogprob(token, float(p), dict(zip(i[:count].tolist(), v[:count].tolist(),
                                                   strict=True)))
            for token, p, i, v in zip(tokens, logprobs, ids, values, strict=True)
        ]  # fmt: skip

    def completion(self, text: str = "") -> Completion:
        """Put together what was generated."""
        tokens = self.tokens
        if self.parser is not None and self.parser.stopped:
            tokens = tokens[: self.parser.num_tokens]
        stopped = self.is_stopped or bool(tokens and tokens[-1] in self.request.stop_ids)
        accepted = None
        if self.request.num_drafts and self.usage.num_steps:
            accepted = len(self.tokens) / self.usage.num_steps - 1
        return Completion(
            text=text,
            tokens=tokens,
            finish_reason="stop" if stopped else self._reason,
            logprobs=None if self._num_logprobs is None else self.logprobs[: len(tokens)],
            accepted_per_step=accepted,
            usage=self.usage,
            error=self.error,
        )


def drive(
    engine: Engine, answers: Sequence[Answer], sizes: Iterator[int]
) -> Iterator[tuple[Answer, Any]]:
    """Run requests on an engine of their own to their ends, in steps of up to `sizes` tokens.

    Yields each piece as it comes. A request whose text is complete is cancelled, and so is
    everything when the caller does not go on to the end.
    """
    running = {engine.submit(answer.request): answer for answer in answers}
    try:
        while running:
            for event in engine.step(next(sizes)):
                answer = running[event.request_id]
                yield answer, answer.take(event)
                if event.finish_reason is not None or answer.is_stopped:
                    engine.cancel(event.request_id)
                    del running[event.request_id]
    finally:
        for request_id in running:
            engine.cancel(request_id)


def streaming() -> Iterator[int]:
    """Return sizes of steps: the first token at once, then few enough for the eye to keep up."""
    return itertools.chain((1, 1, 2), itertools.repeat(4))


class Stream:
    """An iterator over the text of one generation (ids, when the model has no tokenizer).

    `completion` is the whole `Completion` once the iterator is exhausted.
    """

    def __init__(self, engine: Engine, answer: Answer):
        self.completion: Completion | None = None
        self._pieces = self._run(engine, answer)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Any:
        return next(self._pieces)

    def _run(self, engine: Engine, answer: Answer) -> Iterator[Any]:
        text = ""
        for _, piece in drive(engine, [answer], streaming()):
            if answer.parser is not None:
                text += piece
            if piece:
                yield piece
        self.completion = answer.completion(text)
