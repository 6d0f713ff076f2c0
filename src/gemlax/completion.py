"""One call of `generate` or `stream`: settings checked, rows read in blocks, text put together."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import index
from typing import Any, Literal, NamedTuple

import numpy as np

from gemlax.adapters import DEFAULT, entries
from gemlax.config import GemmaConfig, TextConfig
from gemlax.errors import RequestError
from gemlax.generate import STOP_PLACES, DecodeState, Engine, Rows
from gemlax.sampling import (
    TOP_LOGPROBS,
    Sampling,
    check_integer,
    check_sampling,
    check_seed,
    make_sampling,
)
from gemlax.settings import read_defaults, read_stop
from gemlax.speculation import MOST
from gemlax.tokenizer import TextStream, Tokenizer

__all__ = [
    "DEFAULTS",
    "Completion",
    "Prompt",
    "Request",
    "Stream",
    "TokenLogprob",
    "as_ids",
    "check_ids",
    "check_settings",
    "read_prompts",
    "spelled_marker",
]

Prompt = str | Sequence[str] | Sequence[Sequence[int]]
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
    "max_new_tokens": None, "context": None, "temperature": None, "top_k": None, "top_p": None,
    "min_p": None, "repetition_penalty": None, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    "no_repeat_ngram_size": None, "bad_words": None, "min_new_tokens": None, "logit_bias": None,
    "seed": 0, "stop": (), "stop_ids": (), "logprobs": None, "speculate": None,
    "parse_special": False,
    "adapter": DEFAULT,
}  # fmt: skip
# What is generated where neither the caller nor the checkpoint says how much.
_NEW_TOKENS = 256


def as_ids(ids: Iterable[Any] | None, what: str) -> list[int]:
    """Return token ids as integers, of Python, NumPy or JAX; RequestError for anything else."""
    if not (ids is None or np.iterable(ids)):
        raise RequestError(f"{what} must be a list of token ids, got {ids!r}")
    found = []
    for id in () if ids is None else ids:
        try:
            if isinstance(id, (bool, np.bool_)):
                raise TypeError
            found.append(index(id))
        except TypeError:
            raise RequestError(
                f"{what} must be integer token ids, got {id!r} ({type(id).__name__})"
            ) from None
    return found


def read_prompts(
    prompt: Prompt, tokenizer: Tokenizer | None, config: TextConfig, *, parse_special: bool = False
) -> list[list[int]]:
    """Return prompts as ids that have a row in the table: a str gets one BOS."""
    items: list[Any] = [prompt] if isinstance(prompt, str) else list(prompt)
    if not items:
        raise RequestError("no prompt: got an empty list")
    if all(isinstance(item, str) for item in items):
        if tokenizer is None:
            raise RequestError("this model has no tokenizer: give lists of ids, not text")
        prompts = [tokenizer.encode(item, parse_special=parse_special) for item in items]
    elif any(isinstance(item, str) or not np.iterable(item) for item in items):
        raise RequestError("a prompt is a str, a list of str, or a list of lists of ids")
    else:
        prompts = [as_ids(item, "a prompt") for item in items]
    if not all(prompts):
        raise RequestError("a prompt of ids must hold at least one id (BOS)")
    check_ids(np.asarray(list(itertools.chain(*prompts))), config, tokenizer)
    return prompts


def check_ids(ids: np.ndarray, config: TextConfig, tokenizer: Tokenizer | None) -> None:
    """Raise RequestError for an id without a row in the tables; say what it stands for."""
    wrong = ids[(ids < 0) | (ids >= config.num_ids)]
    if wrong.size:
        known = tokenizer is not None and 0 <= wrong[0] < tokenizer.num_tokens
        named = f" ({tokenizer.piece(int(wrong[0]))!r})" if known and tokenizer else ""
        raise RequestError(config.refusal(int(wrong[0]), named))


def spelled_marker(prompt: Prompt, tokenizer: Tokenizer | None) -> str | None:
    """Return the first control token that the text of a prompt spells, if one does."""
    texts = [prompt] if isinstance(prompt, str) else prompt
    for text in texts if tokenizer else ():
        parts = tokenizer.split_special(text) if tokenizer and isinstance(text, str) else ()
        for part in parts:
            if isinstance(part, int) and tokenizer:
                return tokenizer.piece(part)
    return None


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise RequestError for what no model takes, before one is loaded."""
    given = _given(settings)
    check_sampling(**given)
    _drafts(given.get("speculate"))
    _seeds(given.get("seed", 0), 1)
    _stop(given.get("stop", ()))


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is said: None says nothing, but for the adapter, where it means the base."""
    return {k: v for k, v in settings.items() if v is not None or k == "adapter"}


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
        self.options = DEFAULTS | _given(options)
        self.defaults = read_defaults(generation_config, config.text.vocab_size)
        self.max_new_tokens, self.context = self._lengths()
        self.stop, ends = self._stop_strings()
        self.stop_ids = self._stop_ids(ends)
        self.num_logprobs = self._num_logprobs()
        self.drafts = _drafts(self.options["speculate"])
        self.adapters = entries(engine.adapters, self.options["adapter"], len(prompts))
        self.settings = self._settings()
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
            self.max_new_tokens,
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

    def _lengths(self) -> tuple[int, int]:
        """Return the most new tokens, and the most tokens of a row in all."""
        most = self.config.text.max_position_embeddings
        context = self.options["context"]
        context = most if context is None else context
        whole = isinstance(context, (int, np.integer)) and not isinstance(context, bool)
        if not whole or not 1 <= context <= most:
            raise RequestError(f"context must be in [1, {most}] tokens, got {context!r}")
        longest = max(map(len, self.prompts))
        if longest > context:
            raise RequestError(self._too_long(context))
        new, limit = self.options["max_new_tokens"], self.defaults.max_length
        if new is not None:
            return check_integer("max_new_tokens", new, 0), int(context)
        if self.defaults.max_new_tokens is not None:
            return self.defaults.max_new_tokens, int(context)
        # The checkpoint's max_length is a bound, no aim: memory is set aside for what may come.
        if limit is not None and longest >= limit:
            raise RequestError(
                f"the prompt has {longest} tokens, and the checkpoint's generation_config has "
                f"max_length {limit}: give max_new_tokens"
            )
        return _NEW_TOKENS, min(int(context), limit or most)

    def _stop_strings(self) -> tuple[tuple[str, ...], list[int]]:
        """Return the strings that end a text, and the ids of those that spell a control token."""
        stop = _stop(self.options["stop"])
        if self.tokenizer is None:
            if stop:
                raise RequestError("stop strings need a tokenizer, and this model has none")
            return (), []
        strings, ids = [], []
        for text in dict.fromkeys((*stop, *self.defaults.stop)):
            end = read_stop(text, self.tokenizer)
            if isinstance(end, int):
                ids.append(end)
            elif end is not None:
                strings.append(end)
            elif text in stop:
                raise RequestError(
                    f"the stop string {text!r} cannot occur: it holds a control token, which no "
                    "text shows; the token alone, as in '<end_of_turn>', stops where it comes"
                )
        return tuple(strings), ids

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

    def _settings(self) -> Sampling:
        options, limit, defaults = self.options, self.engine.num_tokens, self.defaults
        asked = {name: options[name] for name in defaults.sampling if options[name] is not None}
        unused = self.tokenizer.unused_ids if self.tokenizer else ()
        never = (*defaults.suppress, *self.config.placeholder_ids, *unused)
        bias = {i: -np.inf for i in never if i < limit} | _as_bias(options["logit_bias"] or {})
        words = {tuple(word): -np.inf for word in self._bad_words()}
        return make_sampling(
            self.engine.rows(len(self.prompts)),
            limit,
            _seeds(options["seed"], len(self.prompts)),
            presence_penalty=options["presence_penalty"],
            frequency_penalty=options["frequency_penalty"],
            logit_bias=bias,
            sequence_bias=defaults.sequence_bias | words,
            held=self._held(),
            **(defaults.sampling | asked),
        )

    def _bad_words(self) -> list[list[int]]:
        """Return the sequences that may not come."""
        asked, size = self.options["bad_words"], self.config.text.vocab_size
        if isinstance(asked, str):
            raise RequestError(f"bad_words must be a list of words or of ids, got {asked!r}")
        words = self.defaults.bad_words if asked is None else [
            ids for word in asked for ids in self._spellings(word)
        ]  # fmt: skip
        for id in itertools.chain(*words):
            if not 0 <= id < size:
                raise RequestError(f"bad_words: id {id} is outside [0, {size})")
        # As in transformers: what ends a text may come.
        return [word for word in words if not (len(word) == 1 and word[0] in self.stop_ids)]

    def _spellings(self, word: Any) -> list[list[int]]:
        """Return the ids of a bad word: of text with and without a space in front."""
        if not isinstance(word, (Sequence, np.ndarray)) or not len(word):
            raise RequestError(f"bad_words must be words or lists of ids, got {word!r}")
        if not isinstance(word, str):
            return [as_ids(word, "bad_words")]
        if self.tokenizer is None:
            raise RequestError("bad_words as text need a tokenizer: give lists of ids")
        id = self.tokenizer.id_of(word)
        if id in self.tokenizer.special_ids:
            return [as_ids([id], "bad_words")]
        texts = dict.fromkeys((word, " " + word.lstrip()))
        return [self.tokenizer.encode(text, add_bos=False) for text in texts]

    def _held(self) -> dict[int, list[int]]:
        """Return by id how many tokens must have come in each row before it may."""
        asked, defaults, limit = (
            self.options["min_new_tokens"],
            self.defaults,
            self.engine.num_tokens,
        )
        least = defaults.min_new_tokens if asked is None else asked
        if least is None:
            least_each = [max(0, defaults.min_length - len(ids)) for ids in self.prompts]
        else:
            least_each = [check_integer("min_new_tokens", least, 0)] * len(self.prompts)
        least_each = [min(least, self.context) for least in least_each]
        held = {id: [1] * len(self.prompts) for id in defaults.begin_suppress if id < limit}
        if any(least_each):
            for id in self.stop_ids:
                if 0 <= id < limit:
                    held[id] = [max(n, *held.get(id, [0])) for n in least_each]
        return held

    def _stop_ids(self, ends: Sequence[int]) -> tuple[int, ...]:
        """Merge the stop ids of generation_config, config, tokenizer and the caller."""
        own = [self.tokenizer.eos_id] if self.tokenizer else []
        extra, size = (
            as_ids(self.options["stop_ids"], "stop_ids"),
            self.config.text.vocab_size,
        )
        for id in extra:
            if not 0 <= id < size:
                raise RequestError(f"stop_ids: id {id} is outside [0, {size})")
        known = (*self.defaults.stop_ids, *self.config.eos_token_id, *own)
        ids = tuple(dict.fromkeys([*known, *ends, *extra]))
        if len(ids) > STOP_PLACES:
            raise RequestError(f"at most {STOP_PLACES} stop ids are supported, got {len(ids)}")
        return ids


def _stop(stop: Any) -> tuple[str, ...]:
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if any(not isinstance(text, str) or not text for text in stop):
        raise RequestError(f"stop must be non-empty strings, got {list(stop)!r}")
    return stop


def _drafts(most: Any) -> int:
    number = isinstance(most, (int, np.integer)) and not isinstance(most, bool)
    if most is not None and not (number and 0 <= most <= MOST):
        raise RequestError(f"speculate must be None or in [0, {MOST}] drafts, got {most!r}")
    return int(most or 0)


def _seeds(seed: Any, count: int) -> list[int]:
    """Return the seed of each row; after the largest one comes 0."""
    if isinstance(seed, (int, np.integer)) and not isinstance(seed, bool):
        first = check_seed(seed)
        return [(first + row) % 2**32 for row in range(count)]
    if isinstance(seed, Sequence) and not isinstance(seed, str) and len(seed) == count:
        return [check_seed(one) for one in seed]
    raise RequestError(f"seed must be an integer or a list of {count}, got {seed!r}")


def _as_bias(bias: Mapping[Any, float]) -> dict[Any, float]:
    """Return a logit_bias by id: the names of JSON's objects are strings of digits."""
    return {int(k) if isinstance(k, str) and k.isascii() and k.isdigit() else k: v
            for k, v in bias.items()}  # fmt: skip


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
