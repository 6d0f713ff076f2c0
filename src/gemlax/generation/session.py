"""Answers as they come, and conversations that keep their cache.

A `Reply` runs one request and takes its ids apart. A `Session` runs its replies on one engine with
one slot, whose cache keeps the conversation: only what is new is prefilled.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gemlax.chat import Delta, Message, OutputParser
from gemlax.chat.messages import REASONING, text_of
from gemlax.engine import Engine, Request
from gemlax.errors import RequestError
from gemlax.generation.answers import Answer, Completion, drive, streaming

__all__ = ["Reply", "Session"]


class Reply:
    """An iterator over what the model says: `Delta`s of content, reasoning and tool calls.

    Attributes:
        message: the whole `Message` once the iterator is exhausted, None before.
        num_prompt_tokens: tokens of the prompt, BOS included.
        completion: the whole `Completion` once the iterator is exhausted, None before.
    """

    def __init__(self, engine: Engine, request: Request, parser: OutputParser):
        """Nothing runs yet."""
        self.message: Message | None = None
        self.completion: Completion | None = None
        self.num_prompt_tokens = len(request.prompt)
        self._engine, self._parser = engine, parser
        self._answer = Answer(request, parser, None)
        self._stopping = False
        self._at_end: Callable[[Message], None] | None = None
        self._deltas = self._run(streaming())

    def __iter__(self) -> "Reply":
        return self

    def __next__(self) -> Delta:
        return next(self._deltas)

    def stop(self) -> None:
        """End the answer after the tokens that are on their way. Safe in a signal handler."""
        self._stopping = True

    def finish(self, sizes: Iterator[int]) -> Message:
        """Run to the end in steps of up to `sizes` tokens, instead of iterating."""
        for _ in self._run(sizes):
            pass
        assert self.message is not None
        return self.message

    def _run(self, sizes: Iterator[int]) -> Iterator[Delta]:
        parser = self._parser
        for _, deltas in drive(self._engine, [self._answer], sizes):
            yield from deltas
            if self._stopping:
                parser.stop()
        yield from parser.flush()
        self.completion = done = self._answer.completion()
        called = done.finish_reason == "stop" and bool(parser.tool_calls)
        self.message = Message(
            content=parser.content,
            reasoning=parser.reasoning or None,
            tool_calls=parser.tool_calls,
            tokens=done.tokens,
            finish_reason="tool_calls" if called else done.finish_reason,
        )
        if self._at_end is not None:
            self._at_end(self.message)

    def then(self, at_end: Callable[[Message], None]) -> None:
        """Call `at_end` with the message when the answer has come to its end."""
        self._at_end = at_end


class Session:
    """One conversation. Iterate over each reply to its end before the next `send`.

    A reply that is left before its end is forgotten with the next `send` or `reset`.

    Attributes:
        messages: what was said, in the form of `Model.chat`.
        context: how many tokens fit.
        num_tokens: how many are used, as of the last answer.
    """

    def __init__(
        self,
        ask: Callable[[list[Any], Engine], Reply],
        new_engine: Callable[[], Engine],
        context: int,
        system: str | None = None,
    ):
        """`ask`: returns the reply to messages, on an engine; users call `Model.session`."""
        self._ask, self._new_engine, self._system = ask, new_engine, system
        self.context = context
        self._engine = new_engine()
        self._reply: Reply | None = None  # the last one, which alone may add to the conversation
        self.reset()

    def reset(self) -> None:
        """Forget everything except the system text."""
        self.messages: list[Any] = []
        if self._system is not None:
            self.messages.append({"role": "system", "content": self._system})
        self.num_tokens = 0
        self._leave()

    def send(self, content: Any, *, role: str = "user", **fields: Any) -> Reply:
        """Say something (role "tool": answer a call); return the reply, to be iterated over.

        Until the reply has come to its end, `messages` stay as they are. Role "assistant": the
        beginning of an answer that the model is to go on with; both become one message.

        Raises:
            RequestError: the message is malformed, or the context is full.
        """
        said = {"role": role, "content": content, **fields}
        asked = [*self.messages, said]
        self._leave()
        reply = self._ask(asked, self._engine)
        if reply.num_prompt_tokens >= self.context:
            raise RequestError(
                f"the context is full: with this message the conversation has "
                f"{reply.num_prompt_tokens} tokens, and {self.context} fit; start anew"
            )
        self._reply = reply

        def at_end(message: Message) -> None:
            if self._reply is not reply:  # something else was said meanwhile
                return
            begun = role in ("assistant", "model")
            self.messages = [*asked[:-1], _joined(said, message)] if begun else [*asked, message]
            self.num_tokens = reply.num_prompt_tokens + len(message.tokens)

        reply.then(at_end)
        return reply

    def _leave(self) -> None:
        """Let an unfinished reply keep its engine, should somebody read it to its end."""
        if self._reply is not None and self._reply.message is None:
            self._engine = self._new_engine()
        self._reply = None


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
