"""The requests of one call: prompts and settings, made into what the engine takes."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemlax.adapters import entries
from gemlax.config import GemmaConfig
from gemlax.engine import STOP_PLACES, Programs, Request
from gemlax.errors import RequestError
from gemlax.generation.defaults import read_defaults, read_stop
from gemlax.generation.prompts import as_ids
from gemlax.generation.settings import SamplingSettings, seeds
from gemlax.grammar import Constraint, Grammar, Markers, compiler_of
from gemlax.sampling import Sampling, make_sampling
from gemlax.tokenizer import Tokenizer

__all__ = ["FORCED_DRAFTS", "RequestBatch"]

_SHOWN = 5  # prompts named in one error
# What is generated where neither the caller nor the checkpoint says how much.
_NEW_TOKENS = 256
# Drafts of a step where a grammar says what must come next: the keys of an object are some tokens.
FORCED_DRAFTS = 3


class RequestBatch:
    """One request for each prompt of a call, checked; nothing runs yet.

    Attributes:
        requests: for the engine, in the order of the prompts.
        stop: strings that end an answer.
        num_logprobs: how many of the likeliest tokens are reported; None: no log-probabilities.
    """

    def __init__(
        self,
        programs: Programs,
        config: GemmaConfig,
        tokenizer: Tokenizer | None,
        generation_config: Mapping[str, Any],
        prompts: list[list[int]],
        settings: SamplingSettings,
    ):
        self._programs, self._config, self._tokenizer = programs, config, tokenizer
        self._prompts, self._settings = prompts, settings
        self._defaults = read_defaults(generation_config, config.text.vocab_size)
        max_new_tokens, self._context = self._lengths()
        self.stop, stops = self._stop_strings()
        self._stop_ids = self._all_stop_ids(stops)
        self.num_logprobs = settings.logprobs
        adapters = entries(programs.adapters, settings.adapter, len(prompts))
        sampling = self._sampling()
        drafts = 0 if settings.grammar is None else FORCED_DRAFTS
        drafts = drafts if settings.speculate is None else settings.speculate
        self.requests = [
            Request(
                prompt=tuple(prompt),
                max_length=min(len(prompt) + max_new_tokens, self._context),
                settings=sampling.row(index),
                stop_ids=self._stop_ids,
                adapter=adapter,
                num_drafts=drafts,
                logprobs=settings.logprobs is not None,
                constraint=self._constraint(prompt, grammar),
            )
            for index, (prompt, adapter, grammar) in enumerate(
                zip(prompts, adapters, self._grammars(), strict=True)
            )
        ]

    def _grammars(self) -> Sequence[Grammar | None]:
        """Return the grammar of each prompt."""
        given = self._settings.grammar
        if not isinstance(given, (list, tuple)):
            return [given] * len(self._prompts)  # type: ignore[list-item]
        if len(given) != len(self._prompts):
            raise RequestError(
                f"grammar must be one, or a list of {len(self._prompts)}, got {len(given)}"
            )
        return given

    def _constraint(self, prompt: Sequence[int], grammar: Grammar | None) -> Constraint | None:
        settings, tokenizer = self._settings, self._tokenizer
        if grammar is None and settings.allowed_ids is None and settings.thinking_budget is None:
            return None
        if tokenizer is None:
            raise RequestError(
                "grammar, allowed_ids and thinking_budget need a tokenizer, and this model has none"
            )
        for id in settings.allowed_ids or ():
            if id >= self._programs.num_tokens:
                raise RequestError(
                    f"allowed_ids: id {id} is outside [0, {self._programs.num_tokens})"
                )
        budget = None
        if settings.thinking_budget is not None:
            markers = Markers.of(tokenizer)
            budget = markers.budget(settings.thinking_budget, prompt)
        return compiler_of(tokenizer).constraint(
            grammar, self._stop_ids, allowed_ids=settings.allowed_ids, budget=budget
        )

    def _lengths(self) -> tuple[int, int]:
        """Return the most new tokens, and the most tokens of a prompt and its answer."""
        limit, context = self._config.text.max_position_embeddings, self._settings.context
        context = limit if context is None else context
        if context > limit:
            raise RequestError(f"context must be in [1, {limit}] tokens, got {context!r}")
        longest = max(map(len, self._prompts))
        if longest > context:
            raise RequestError(self._too_long(context))
        if self._settings.max_new_tokens is not None:
            return self._settings.max_new_tokens, context
        if self._defaults.max_new_tokens is not None:
            return self._defaults.max_new_tokens, context
        # The checkpoint's max_length is a bound, no aim: memory is set aside for what may come.
        max_length = self._defaults.max_length
        if max_length is not None and longest >= max_length:
            raise RequestError(
                f"the prompt has {longest} tokens, and the checkpoint's generation_config has "
                f"max_length {max_length}: give max_new_tokens"
            )
        return _NEW_TOKENS, min(context, max_length or limit)

    def _too_long(self, context: int) -> str:
        """Say which prompts have more tokens than `context`."""
        sizes = {i: len(ids) for i, ids in enumerate(self._prompts) if len(ids) > context}
        if len(self._prompts) == 1:
            return (
                f"the prompt has {sizes[0]} tokens, more than the context of {context}: "
                "shorten it or raise `context`"
            )
        named = [f"{i} ({size} tokens)" for i, size in sizes.items()]
        more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
        return (
            f"{len(named)} of {len(self._prompts)} prompts, counted from 0, are longer than the "
            f"context of {context}: {', '.join(named[:_SHOWN])}{more}; shorten them, leave them "
            "out or raise `context`"
        )

    def _stop_strings(self) -> tuple[tuple[str, ...], list[int]]:
        """Return the strings that end a text, and the ids of those that spell a control token."""
        stop = self._settings.stop
        if self._tokenizer is None:
            if stop:
                raise RequestError("stop strings need a tokenizer, and this model has none")
            return (), []
        strings, ids = [], []
        for text in dict.fromkeys((*stop, *self._defaults.stop)):
            end = read_stop(text, self._tokenizer)
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

    def _all_stop_ids(self, spelled: Sequence[int]) -> tuple[int, ...]:
        """Merge the stop ids of generation_config, config, tokenizer and the caller."""
        eos = [self._tokenizer.eos_id] if self._tokenizer else []
        extra, size = as_ids(self._settings.stop_ids, "stop_ids"), self._config.text.vocab_size
        for id in extra:
            if not 0 <= id < size:
                raise RequestError(f"stop_ids: id {id} is outside [0, {size})")
        known = (*self._defaults.stop_ids, *self._config.eos_token_id, *eos)
        ids = tuple(dict.fromkeys([*known, *spelled, *extra]))
        if len(ids) > STOP_PLACES:
            raise RequestError(f"at most {STOP_PLACES} stop ids are supported, got {len(ids)}")
        return ids

    def _sampling(self) -> Sampling:
        settings, defaults, limit = self._settings, self._defaults, self._programs.num_tokens
        asked = {
            "temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p,
            "min_p": settings.min_p, "repetition_penalty": settings.repetition_penalty,
            "no_repeat_ngram_size": settings.no_repeat_ngram_size,
        }  # fmt: skip
        chosen = {name: value for name, value in asked.items() if value is not None}
        unused = self._tokenizer.unused_ids if self._tokenizer else ()
        never = (*defaults.suppress, *self._config.placeholder_ids, *unused)
        bias = {i: -np.inf for i in never if i < limit} | _as_bias(settings.logit_bias or {})
        words = {tuple(word): -np.inf for word in self._bad_words()}
        return make_sampling(
            limit,
            seeds(settings.seed, len(self._prompts)),
            presence_penalty=settings.presence_penalty,
            frequency_penalty=settings.frequency_penalty,
            logit_bias=bias,
            sequence_bias=defaults.sequence_bias | words,
            forbidden_until=self._forbidden_until(),
            **(defaults.sampling | chosen),
        )

    def _bad_words(self) -> list[list[int]]:
        """Return the sequences that may not come."""
        asked, size = self._settings.bad_words, self._config.text.vocab_size
        if isinstance(asked, str):
            raise RequestError(f"bad_words must be a list of words or of ids, got {asked!r}")
        words = self._defaults.bad_words if asked is None else [
            ids for word in asked for ids in self._spellings(word)
        ]  # fmt: skip
        for id in itertools.chain(*words):
            if not 0 <= id < size:
                raise RequestError(f"bad_words: id {id} is outside [0, {size})")
        # As in transformers: what ends a text may come.
        return [word for word in words if not (len(word) == 1 and word[0] in self._stop_ids)]

    def _spellings(self, word: Any) -> list[list[int]]:
        """Return the ids of a bad word: of text with and without a space in front."""
        if not isinstance(word, (Sequence, np.ndarray)) or not len(word):
            raise RequestError(f"bad_words must be words or lists of ids, got {word!r}")
        if not isinstance(word, str):
            return [as_ids(word, "bad_words")]
        if self._tokenizer is None:
            raise RequestError("bad_words as text need a tokenizer: give lists of ids")
        id = self._tokenizer.id_of(word)
        if id in self._tokenizer.special_ids:
            return [as_ids([id], "bad_words")]
        texts = dict.fromkeys((word, " " + word.lstrip()))
        return [self._tokenizer.encode(text, add_bos=False) for text in texts]

    def _forbidden_until(self) -> dict[int, list[int]]:
        """Return by id how many tokens each prompt's answer must have before it may come."""
        defaults, prompts = self._defaults, self._prompts
        limit, asked = self._programs.num_tokens, self._settings.min_new_tokens
        fewest = defaults.min_new_tokens if asked is None else asked
        if fewest is None:
            each = [max(0, defaults.min_length - len(ids)) for ids in prompts]
        else:
            each = [fewest] * len(prompts)
        each = [min(number, self._context) for number in each]
        until = {id: [1] * len(prompts) for id in defaults.begin_suppress if id < limit}
        if any(each):
            for id in self._stop_ids:
                if 0 <= id < limit:
                    until[id] = [max(n, *until.get(id, [0])) for n in each]
        return until


def _as_bias(bias: Mapping[Any, float]) -> dict[Any, float]:
    """Return a logit_bias by id: the names of JSON's objects are strings of digits."""
    return {int(k) if isinstance(k, str) and k.isascii() and k.isdigit() else k: v
            for k, v in bias.items()}  # fmt: skip
