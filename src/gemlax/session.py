"""Answers as they come, and conversations that keep their cache.

A `Reply` runs one request and takes its ids apart; a `Session` hands the state of one reply to
the next, so that only the tokens after the common beginning are prefilled.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from gemlax.chat import Delta, Message, OutputParser
from gemlax.chat.messages import REASONING, text_of
from gemlax.completion import Request
from gemlax.errors import RequestError
from gemlax.generate import DecodeState, Rows

__all__ = ["Reply", "Session"]


class Reply:
    """An iterator over what the model says: `Delta`s of content, reasoning and tool calls.

    Attributes:
        message: the whole `Message` once the iterator is exhausted, None before.
        num_prompt_tokens: tokens of the prompt, BOS included.
        accepted_per_step: as in `Completion`, once the iterator is exhausted.
    """

    def __init__(self, request: Request, parser: OutputParser, before: DecodeState | None = None):
        """Nothing runs yet. `before` is used up: see `Engine.start`."""
        request.streams = [parser]
        self.message: Message | None = None
        self.accepted_per_step: float | None = None
        self.num_prompt_tokens = len(request.prompts[0])
        self.at_end: Callable[[Message, Rows | None], None] | None = None
        self._request, self._parser, self._before = request, parser, before
        self._stopping = False
        # The first token at once; then few enough that reading keeps up with the eye.
        self._deltas = self._run(itertools.chain((1, 1, 2), itertools.repeat(4)))

    def __iter__(self) -> "Reply":
        return self

    def __next__(self) -> Delta:
        return next(self._deltas)

    def stop(self) -> None:
        """End the answer after the tokens that are on their way. Safe in a signal handler."""
        self._stopping = True

    def finish(self, sizes: Iterator[int]) -> Message:
        """Run to the end in blocks of `sizes` steps, instead of iterating."""
        for _ in self._run(sizes):
            pass
        assert self.message is not None
        return self.message

    def _run(self, sizes: Iterator[int]) -> Iterator[Delta]:
        rows, seen, parser = None, self.num_prompt_tokens, self._parser
        before, self._before = self._before, None
        for rows in self._request.run(sizes, before):
            new = rows.tokens[0, seen : rows.lengths[0]].tolist()
            seen = int(rows.lengths[0])
            yield from parser.push(new)
            if self._stopping:
                parser.stop()
        yield from parser.flush()
        done = self._request.completion(0, rows)
        self.accepted_per_step = done.accepted_per_step
        called = done.finish_reason == "stop" and bool(parser.tool_calls)
        self.message = Message(
            content=parser.content,
            reasoning=parser.reasoning or None,
            tool_calls=parser.tool_calls,
            tokens=done.tokens,
            finish_reason="tool_calls" if called else done.finish_reason,
        )
        if self.at_end is not None:
            self.at_end(self.message, rows)


class Session:
    """One conversation. Iterate over each reply to its end before the next `send`.

    A reply that is left before its end is forgotten with the next `send` or `reset`.

    Attributes:
        messages: what was said, in the form of `Model.chat`.
        context: how many tokens fit.
        num_tokens: how many are used, as of the last answer.
    """

    def __init__(self, ask: Callable[..., Reply], context: int, system: str | None = None):
        """`ask`: makes a reply of (messages, before=state); users call `Model.session`."""
        self._ask, self._system = ask, system
        self.context = context
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system text. The next turn prefills anew."""
        self.messages: list[Any] = []
        if self._system is not None:
            self.messages.append({"role": "system", "content": self._system})
        self.num_tokens = 0
        self._state: DecodeState | None = None
        self._reply: Reply | None = None  # the last one, which alone may add to the conversation

    def send(self, content: Any, *, role: str = "user", **fields: Any) -> Reply:
        """Say something (role "tool": answer a call); return the reply, to be iterated over.

        Until the reply has come to its end, `messages` stay as they are. Role "assistant": the
        beginning of an answer that the model is to go on with; both become one message.

        Raises:
            RequestError: the message is malformed, or the context is full.
        """
        said = {"role": role, "content": content, **fields}
        asked = [*self.messages, said]
        state = self._state
        # An interrupted step leaves its buffers deleted.
        if state is not None and cast(Any, state.tokens).is_deleted():
            state = None
        reply = self._ask(asked, before=state)
        if reply.num_prompt_tokens >= self.context:
            raise RequestError(
                f"the context is full: with this message the conversation has "
                f"{reply.num_prompt_tokens} tokens, and {self.context} fit; start anew"
            )
        self._state = None  # the reply uses it up
        self._reply = reply

        def at_end(message: Message, rows: Rows | None) -> None:
            if self._reply is not reply:  # something else was said meanwhile
                return
            begun = role in ("assistant", "model")
            self.messages = [*asked[:-1], _joined(said, message)] if begun else [*asked, message]
            self.num_tokens = reply.num_prompt_tokens + len(message.tokens)
            self._state = None if rows is None else rows.state

        reply.at_end = at_end
        return reply


def _joined(begun: Mapping[str, Any], rest: Message) -> Message:
    """Return the beginning of an answer and what the model went on with as one message."""
    content = text_of(begun["content"] or "")
    if rest.content[:1].isspace():  # the prompt ended in the text without its last space
        content = content.rstrip()
    thought = next((begun[name] for name in REASONING if begun.get(name)), "")
    return dataclasses.replace(
        rest,
        content=content + rest.content,
        reasoning=thought + (rest.reasoning or "") or None,
        tokens=[],
    )
