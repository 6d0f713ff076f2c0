"""`gemlax chat`: reads turns, streams answers, and reports what each has cost.

`Terminal` prints through what it is given, and knows no model, only a session.
"""

import argparse
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Protocol

from gemlax.chat import Message
from gemlax.cli import output
from gemlax.cli.loading import load, model_name
from gemlax.cli.parser import CHAT_TOKENS
from gemlax.errors import Error, RequestError
from gemlax.generation import Reply, SamplingSettings, Session

__all__ = ["HELP", "Terminal", "run"]

HELP = """/reset  forget the conversation
/exit   end (or Ctrl-D)
/help   show this
//...   send a line that begins with one of these, without its first slash
Ctrl-C stops an answer."""


def run(args: argparse.Namespace) -> int:
    """Chat until the input ends; return the exit status."""
    if sys.stdin is None:
        raise Error("standard input is closed")
    settings = SamplingSettings(**args.settings)
    model = load(args)
    if settings.max_new_tokens is None and model.generation_config.get("max_new_tokens") is None:
        settings = dataclasses.replace(settings, max_new_tokens=CHAT_TOKENS)
    session = model.session(system=args.system, thinking=args.thinking or None, settings=settings)
    terminal = Terminal(session, output.write, output.dim if output.on_terminal() else output.note)
    if sys.stdin.isatty():
        output.note(f"{model_name(args)}\n{HELP}")
        terminal.run(_ask)
    else:
        lines = (line.decode("utf-8-sig") for line in sys.stdin.buffer)
        terminal.run(lambda: _next_line(lines))
    if args.json:
        output.write(json.dumps({"turns": terminal.turns}))
    return int(terminal.failed and not sys.stdin.isatty())


def _ask() -> str:
    """Read a turn from the terminal; Ctrl-C gives up the line."""
    with suppress(ImportError):
        import readline  # noqa: F401  # the line can be edited
    try:
        return input("> ")
    except KeyboardInterrupt:
        output.note("")
        return ""


def _next_line(lines: Iterator[str]) -> str:
    line = next(lines, None)
    if line is None:
        raise EOFError
    return line


class Write(Protocol):
    """Prints a text."""

    def __call__(self, text: str, end: str = "\n") -> None: ...


class Terminal:
    """One chat.

    Attributes:
        turns: what was said in each and what it has cost.
        failed: whether a turn was refused.
    """

    def __init__(self, session: Session, write: Write, note: Write):
        """`write` prints what the model says, `note` everything else."""
        self.turns: list[dict[str, Any]] = []
        self.failed = False
        self._session, self._write, self._note = session, write, note

    def run(self, read: Callable[[], str]) -> None:
        """Answer what `read` returns until it raises EOFError or /exit is read."""
        while True:
            try:
                text = read().strip()
            except EOFError:
                return
            if text == "/exit":
                return
            if text == "/reset":
                self._session.reset()
                self._note("the conversation is forgotten")
            elif text == "/help":
                self._note(HELP)
            elif text:
                self._answer(text.removeprefix("/") if text.startswith("//") else text)

    def _answer(self, text: str) -> None:
        try:
            reply = self._session.send(text)
        except RequestError as error:
            self.failed = True
            full = "; /reset starts anew" if "context" in str(error) else ""
            self._note(f"{error}{full}")
            return
        begin = time.perf_counter()
        with _interrupts(reply) as interrupted:
            self._show(reply)
        message, done = reply.message, reply.completion
        assert message is not None
        assert done is not None
        usage = done.usage
        speed = usage.num_tokens / usage.decode_s if usage.decode_s > 0 else None
        turn = {
            "content": message.content,
            "reasoning": message.reasoning,
            "tool_calls": message.tool_calls,
            "finish_reason": message.finish_reason,
            "prompt_tokens": reply.num_prompt_tokens,
            "prefill_tokens": usage.num_prefilled_tokens,
            "tokens": usage.num_tokens,
            "decode_tok_s": _rounded(speed),
            "accepted_per_step": _rounded(done.accepted_per_step),
            "seconds": round(time.perf_counter() - begin, 3),
            "context_used": self._session.num_tokens,
        }
        self.turns.append(turn)
        self._note(self._summary(turn, message, bool(interrupted)))

    def _show(self, reply: Reply) -> None:
        kind = "content"
        for delta in reply:
            if delta.kind != kind and kind == "reasoning":
                self._note("")
            kind = delta.kind
            if kind == "content":
                self._write(delta.text, end="")
            else:
                self._note(delta.text, end="" if kind == "reasoning" else "\n")
        if kind == "reasoning":
            self._note("")
        self._write("")

    def _summary(self, turn: dict[str, Any], message: Message, interrupted: bool) -> str:
        session = self._session
        accepted = turn["accepted_per_step"]
        speed = f", {turn['decode_tok_s']:.1f} tok/s" if turn["decode_tok_s"] else ""
        parts = [
            f"{turn['tokens']} tokens{speed}",
            *([f"{accepted:.2f} drafts accepted a step"] if accepted is not None else []),
            f"prefilled {turn['prefill_tokens']}",
            f"context {session.num_tokens}/{session.context}",
        ]
        if interrupted:
            parts.append("stopped")
        elif message.finish_reason == "length":
            full = session.num_tokens >= session.context
            parts.append(
                "the context is full: /reset starts anew" if full else "cut at --max-new-tokens"
            )
        return f"[{'; '.join(parts)}]"


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 3)


@contextmanager
def _interrupts(reply: Reply) -> Iterator[list[int]]:
    """Let the first Ctrl-C end the answer only; a second one is a KeyboardInterrupt."""
    caught: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        reply.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    old = signal.signal(signal.SIGINT, stop)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, old)
