"""One request in the server: its answers on their way through the engine. No jax, no HTTP."""

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar

from gemlax import chat
from gemlax.chat import OutputParser
from gemlax.engine import Event
from gemlax.generation.answers import Answer
from gemlax.generation.answers import TokenLogprob as Logprob
from gemlax.serve.admission import Place
from gemlax.serve.outbox import Outbox
from gemlax.serve.work import Delta, FinishReason, ServeError, TokenLogprob, Update, Usage
from gemlax.tokenizer import TextStream, Tokenizer

__all__ = ["JOBS", "Job", "Ticket", "Times", "show_logprob", "show_token"]

# The jobs of the HTTP request that is being answered: they end with it, whatever becomes of it.
JOBS: ContextVar[list["Job"] | None] = ContextVar("jobs", default=None)


@dataclasses.dataclass
class Times:
    """When things happened to an answer, by time.monotonic; 0: not yet."""

    started: float = 0.0
    first: float = 0.0
    last: float = 0.0


@dataclasses.dataclass(eq=False)
class Ticket:
    """One answer of a job: from the queue to its end. Only the engine's thread touches it.

    Attributes:
        stop_names: what is reported as `stop`, by the id that ends the answer.
        single_call: the answer ends after its first tool call.
        request_id: the engine's, while it has a slot.
    """

    job: "Job"
    index: int
    answer: Answer
    tokenizer: Tokenizer
    key: str
    priority: int
    stop_names: Mapping[int, str | int]
    single_call: bool
    arrival: float
    request_id: int | None = None
    times: Times = dataclasses.field(default_factory=Times)

    @property
    def parser(self) -> OutputParser | TextStream:
        """What takes the ids apart."""
        assert isinstance(self.answer.parser, OutputParser | TextStream)
        return self.answer.parser

    def take(self, event: Event) -> Update:
        """Take in what a step did; return what the client is told."""
        answer, parser = self.answer, self.parser
        num_before = len(answer.tokens)
        deltas = _deltas(answer.take(event))
        if self.single_call and isinstance(parser, OutputParser) and parser.tool_calls:
            kinds = [delta.kind for delta in deltas]
            deltas = deltas[: kinds.index("arguments") + 1]
            parser.stop()
        tokens = event.tokens
        reason: FinishReason | None = event.finish_reason
        if parser.stopped:
            reason, tokens = "stop", tokens[: parser.num_tokens - num_before]
        stop = None if reason is None else self._stop(tokens)
        if reason == "stop" and isinstance(parser, OutputParser) and parser.tool_calls:
            reason = "tool_calls"
        logprobs = answer.logprobs[num_before : num_before + len(tokens)]
        return Update(
            self.index,
            deltas,
            tokens,
            [show_logprob(self.tokenizer, one) for one in logprobs],
            self.usage(num_before + len(tokens)),
            reason,
            stop,
            # The grammar was checked before: that it fails is not the client's fault.
            ServeError(500, event.error) if event.error is not None else None,
        )

    def _stop(self, tokens: Sequence[int]) -> str | int | None:
        text = self.parser.stop_string if isinstance(self.parser, OutputParser) else None
        text = self.parser.stop if isinstance(self.parser, TextStream) else text
        if text is not None or not tokens or self.parser.stopped:
            return text
        return self.stop_names.get(tokens[-1])

    def usage(self, tokens: int | None = None) -> Usage:
        """Return what the answer took; `tokens` of it are the client's."""
        took = self.answer.usage
        parser = self.answer.parser
        return Usage(
            prompt=len(self.answer.request.prompt),
            cached=took.num_cached_tokens,
            completion=took.num_tokens if tokens is None else tokens,
            reasoning=parser.num_reasoning_tokens if isinstance(parser, OutputParser) else 0,
            prefill_s=took.prefill_s,
            decode_s=took.decode_s,
        )


class Job:
    """A request that was admitted: `Answers` for the protocol, tickets for the engine's thread.

    Attributes:
        num_answers: prompts * n.
        prompts: the ids of each prompt.
        model: the name under which the model answers.
        tickets: one for each answer.
        open_answers: how many have not ended; the engine's thread counts them down.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        model: str,
        place: Place,
        cancel: Callable[["Job"], None],
    ):
        """`cancel` sends the wish to end the job to the engine's thread."""
        self.prompts, self.model, self.place = prompts, model, place
        self.tickets: list[Ticket] = []
        self.num_answers = self.open_answers = 0
        self.is_cancelled = False
        self.loop = asyncio.get_running_loop()
        self._cancel = cancel
        self._outbox = Outbox()
        self._filled = asyncio.Event()
        if (jobs := JOBS.get()) is not None:
            jobs.append(self)

    def add(self, tickets: Iterable[Ticket]) -> None:
        """Set the answers, before the job is submitted."""
        self.tickets = list(tickets)
        self.num_answers = self.open_answers = len(self.tickets)

    def put(self, update: Update) -> None:
        """Add an update; called by the engine's thread, which wakes the reader afterwards."""
        self._outbox.put(update)

    def wake(self) -> None:
        """Let the reader look; called on the event loop."""
        self._filled.set()

    async def __aiter__(self) -> AsyncIterator[Update]:
        """Yield updates until every answer has ended."""
        left = self.num_answers
        while left:
            await self._filled.wait()
            self._filled.clear()
            for update in self._outbox.take():
                left -= update.finish_reason is not None
                yield update

    async def cancel(self) -> None:
        """End what still runs."""
        self.cancel_now()

    def cancel_now(self) -> None:
        """Likewise, from the event loop and without waiting."""
        if not self.is_cancelled and self.open_answers:
            self.is_cancelled = True
            self._cancel(self)


def _deltas(piece: str | Sequence[chat.Delta]) -> list[Delta]:
    """Return what a parser gave as deltas of the wire: a whole call is its name and arguments."""
    if isinstance(piece, str):
        return [Delta("content", piece)] if piece else []
    deltas = []
    for kind, text in piece:
        if kind == "tool_calls":
            call = json.loads(text)
            arguments = json.dumps(call["arguments"], ensure_ascii=False)
            deltas += [Delta("call", call["name"]), Delta("arguments", arguments)]
        else:
            deltas.append(Delta(kind, text))
    return deltas


def show_logprob(tokenizer: Tokenizer, one: Logprob) -> TokenLogprob:
    """Return a log-probability with the texts of its tokens."""
    top = tuple(show_token(tokenizer, token, value) for token, value in one.top.items())
    return show_token(tokenizer, one.token, one.logprob, top)


def show_token(
    tokenizer: Tokenizer, token: int, logprob: float | None, top: tuple[TokenLogprob, ...] = ()
) -> TokenLogprob:
    """Return a token with its text and the bytes that it adds: a control token adds none."""
    data = tokenizer.token_bytes(token)
    shown = data or tokenizer.token_bytes(token, skip_special=False)
    return TokenLogprob(token, shown.decode("utf-8", "replace"), data, logprob, top)
