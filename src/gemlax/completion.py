"""One call of `generate` or `stream`: settings checked, rows read in blocks, text put together."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from gemlax.adapters import DEFAULT, entries
from gemlax.config import GemmaConfig
from gemlax.errors import RequestError
from gemlax.generate import STOP_PLACES, DecodeState, Engine, Rows
from gemlax.sampling import TOP_LOGPROBS, Sampling, make_sampling
from gemlax.speculation import MOST
from gemlax.tokenizer import TextStream, Tokenizer

__all__ = ["DEFAULTS", "Completion", "Request", "Stream", "TokenLogprob"]

FinishReason = Literal["stop", "length"]
_SHOWN = 5  # prompts named in one error


class TokenLogprob(NamedTuple):
    """The log-probability (natural, before any sampling setting) of a token, and the likeliest."""

    token: int
    logprob: float
    top: dict[int, float]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was generated. `tokens` includes the stop token, `text` shows no control token.

    `finish_reason` is "stop" (a stop id or stop string) or "length". `accepted_per_step`: how many
    drafts a step accepted on average, None without `speculate`.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None = None
    accepted_per_step: float | None = None


DEFAULTS: dict[str, Any] = {
    "max_new_tokens": 256, "context": None, "temperature": None, "top_k": None, "top_p": None,
    "min_p": None, "repetition_penalty": None, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    "logit_bias": None, "seed": 0, "stop": (), "stop_ids": (), "logprobs": None,
    "speculate": None,
    "adapter": DEFAULT,
}  # fmt: skip
_FROM_CONFIG = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0,
                "repetition_penalty": 1.0}  # fmt: skip


class Request:
    """One call of `generate` or `stream`: checked, prefilled, and read block by block."""

    def __init__(
        self,
        engine: Engine,
        config: GemmaConfig,
        tokenizer: Tokenizer | None,
        generation_config: Mapping[str, Any],
        prompts: list[list[int]],
        options: Mapping[str, Any],
    ):
        """Check everything; nothing runs yet. `options` are keys of `DEFAULTS`."""
        unknown = sorted(options.keys() - DEFAULTS.keys())
        if unknown:
            raise TypeError(f"unknown settings {unknown}; expected some of {sorted(DEFAULTS)}")
        self.engine, self.config, self.tokenizer = engine, config, tokenizer
        self.prompts = prompts
        self.options = DEFAULTS | dict(options)
        self.context = self._context()
        self.stop = self._stop_strings()
        self.stop_ids = self._stop_ids(generation_config)
        self.num_logprobs = self._num_logprobs()
        self.drafts = self._drafts()
        self.adapters = entries(engine.adapters, self.options["adapter"], len(prompts))
        self.settings = self._settings(generation_config)
        # Per row what says that a stop string was met; a chat puts its own parser here.
        self.streams: list[Any] = [
            TextStream(tokenizer, self.stop) if tokenizer else None for _ in prompts
        ]
        self.texts = ["" for _ in prompts]
        self.seen = [len(ids) for ids in prompts]

    def run(self, sizes: Iterator[int], before: DecodeState | None = None) -> Iterator[Rows]:
        """Prefill, then decode in blocks; a row whose stop string was met ends.

        `before`: see `Engine.start`.
        """
        state, limits = self.engine.start(
            self.prompts,
            self.options["max_new_tokens"],
            self.context,
            self.stop_ids,
            logprobs=self.num_logprobs is not None,
            drafts=self.drafts,
            before=before,
            adapters=self.adapters,
        )
        steps = self.engine.steps(state, limits, self.settings, sizes, self.drafts)
        ended: np.ndarray | None = None
        while True:
            try:
                rows = steps.send(ended)
            except StopIteration:
                return
            yield rows
            ended = np.zeros(len(rows.done), bool)
            ended[: len(self.streams)] = [bool(s and s.stopped) for s in self.streams]

    def push(self, rows: Rows) -> list[str]:
        """Take in what a block added; return each row's new text."""
        pieces = []
        for row, stream in enumerate(self.streams):
            new = rows.tokens[row, self.seen[row] : rows.lengths[row]].tolist()
            self.seen[row] = int(rows.lengths[row])
            piece = "" if stream is None or stream.stopped else stream.push(new)
            if stream is not None and rows.done[row] and not stream.stopped:
                piece += stream.flush()
            self.texts[row] += piece
            pieces.append(piece)
        return pieces

    def completion(self, row: int, rows: Rows | None) -> Completion:
        """Put together what row `row` generated. `rows` is None when nothing was to be done."""
        start = len(self.prompts[row])
        if rows is None:
            return Completion("", [], "length", None if self.num_logprobs is None else [])
        end = int(rows.lengths[row])
        stream = self.streams[row]
        if stream is not None and stream.stopped:
            end = start + stream.num_tokens
        tokens = rows.tokens[row, start:end].tolist()
        stopped = bool(stream and stream.stopped) or bool(tokens and tokens[-1] in self.stop_ids)
        return Completion(
            text=self.texts[row],
            tokens=tokens,
            finish_reason="stop" if stopped else "length",
            logprobs=self._logprobs(row, tokens, rows),
            accepted_per_step=self._accepted(row, rows),
        )

    def _accepted(self, row: int, rows: Rows) -> float | None:
        if rows.steps is None or not rows.steps[row]:
            return None
        return int(rows.lengths[row] - len(self.prompts[row])) / int(rows.steps[row]) - 1

    def _logprobs(self, row: int, tokens: list[int], rows: Rows) -> list[TokenLogprob] | None:
        if self.num_logprobs is None or rows.logprobs is None:
            return None
        start, n = len(self.prompts[row]), self.num_logprobs
        own, ids, values = (x[row, start : start + len(tokens)] for x in rows.logprobs)
        return [
            TokenLogprob(token, float(p), dict(zip(i[:n].tolist(), v[:n].tolist(), strict=True)))
            for token, p, i, v in zip(tokens, own, ids, values, strict=True)
        ]

    def _context(self) -> int:
        most = self.config.text.max_position_embeddings
        new = self.options["max_new_tokens"]
        if isinstance(new, bool) or not isinstance(new, (int, np.integer)) or new < 0:
            raise RequestError(f"max_new_tokens must be an integer >= 0, got {new!r}")
        context = self.options["context"]
        context = most if context is None else context
        if isinstance(context, bool) or not isinstance(context, int) or not 1 <= context <= most:
            raise RequestError(f"context must be in [1, {most}] tokens, got {context!r}")
        longest = max(map(len, self.prompts))
        if longest > context:
            raise RequestError(self._too_long(context))
        return context

    def _stop_strings(self) -> tuple[str, ...]:
        stop = self.options["stop"]
        stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
        if any(not isinstance(text, str) or not text for text in stop):
            raise RequestError(f"stop must be non-empty strings, got {list(stop)!r}")
        if stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this model has none")
        return stop

    def _too_long(self, context: int) -> str:
        """Say which prompts have more tokens than `context`."""
        sizes = {i: len(ids) for i, ids in enumerate(self.prompts) if len(ids) > context}
        if len(self.prompts) == 1:
            return (
                f"the prompt has {sizes[0]} tokens, more than the context of {context}: "
                "shorten it or raise `context`"
            )
        named = [f"{i} ({size} tokens)" for i, size in sizes.items()]
        more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
        return (
            f"{len(named)} of {len(self.prompts)} prompts, counted from 0, are longer than the "
            f"context of {context}: {', '.join(named[:_SHOWN])}{more}; shorten them, leave them "
            "out or raise `context`"
        )

    def _num_logprobs(self) -> int | None:
        n = self.options["logprobs"]
        number = isinstance(n, (int, np.integer)) and not isinstance(n, bool)
        if n is not None and not (number and 0 <= n <= TOP_LOGPROBS):
            raise RequestError(f"logprobs must be None or in [0, {TOP_LOGPROBS}], got {n!r}")
        return n

    def _drafts(self) -> int:
        most = self.options["speculate"]
        number = isinstance(most, (int, np.integer)) and not isinstance(most, bool)
        if most is not None and not (number and 0 <= most <= MOST):
            raise RequestError(f"speculate must be None or in [0, {MOST}] drafts, got {most!r}")
        return int(most or 0)

    def _settings(self, generation_config: Mapping[str, Any]) -> Sampling:
        options, limit = self.options, self.engine.num_tokens
        settings = _sampling_defaults(generation_config)
        settings |= {k: options[k] for k in _FROM_CONFIG if options[k] is not None}
        listed = generation_config.get("suppress_tokens") or ()
        bias = {i: -np.inf for i in (*listed, *self.config.placeholder_ids) if i < limit}
        return make_sampling(
            self.engine.rows(len(self.prompts)),
            limit,
            _seeds(options["seed"], len(self.prompts)),
            presence_penalty=options["presence_penalty"],
            frequency_penalty=options["frequency_penalty"],
            logit_bias=bias | dict(options["logit_bias"] or {}),
            **settings,
        )

    def _stop_ids(self, generation_config: Mapping[str, Any]) -> tuple[int, ...]:
        """Merge the stop ids of generation_config, config, tokenizer and the caller."""
        found = generation_config.get("eos_token_id")
        found = [] if found is None else [found] if isinstance(found, int) else list(found)
        own = [self.tokenizer.eos_id] if self.tokenizer else []
        extra = list(self.options["stop_ids"] or ())
        if any(isinstance(id, bool) or not isinstance(id, (int, np.integer)) for id in extra):
            raise RequestError(f"stop_ids must be token ids, got {extra!r}")
        ids = tuple(dict.fromkeys([*found, *self.config.eos_token_id, *own, *extra]))
        if len(ids) > STOP_PLACES:
            raise RequestError(f"at most {STOP_PLACES} stop ids are supported, got {len(ids)}")
        return ids


def _sampling_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """Read Hugging Face's defaults: without `do_sample` the arg-max is taken."""
    if not generation_config.get("do_sample", False):
        return dict(_FROM_CONFIG)
    found = {k: generation_config[k] for k in _FROM_CONFIG if generation_config.get(k) is not None}
    return _FROM_CONFIG | {"temperature": 1.0} | found


def _seeds(seed: Any, count: int) -> list[int]:
    if isinstance(seed, (int, np.integer)) and not isinstance(seed, bool):
        return [int(seed) + row for row in range(count)]
    if isinstance(seed, Sequence) and not isinstance(seed, str) and len(seed) == count:
        return list(seed)
    raise RequestError(f"seed must be an integer or a list of {count}, got {seed!r}")


class Stream:
    """An iterator over the text of one generation (ids, when the model has no tokenizer).

    `completion` is the whole `Completion` once the iterator is exhausted.
    """

    def __init__(self, request: Request):
        self.completion: Completion | None = None
        self._pieces = self._run(request)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Any:
        return next(self._pieces)

    def _run(self, request: Request) -> Iterator[Any]:
        rows, shown = None, len(request.prompts[0])
        # The first token at once; then few enough that reading keeps up with the eye.
        for rows in request.run(itertools.chain((1, 1, 2), itertools.repeat(4))):
            piece = request.push(rows)[0]
            if request.streams[0] is None:
                new = rows.tokens[0, shown : rows.lengths[0]].tolist()
                shown = int(rows.lengths[0])
                yield new
            elif piece:
                yield piece
        self.completion = request.completion(0, rows)
