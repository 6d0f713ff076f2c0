"""From specs to constraints: one compiler for each vocabulary, with the grammars that it built."""

import importlib
import json
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Collection, Sequence
from types import ModuleType
from typing import Any

from gemlax.errors import RequestError
from gemlax.grammar.constraint import Constraint, Matcher, ThinkingBudget
from gemlax.grammar.specs import Grammar
from gemlax.tokenizer import Tokenizer
from gemlax.workers import Worker

__all__ = ["Compiler", "compiler_of"]

logger = logging.getLogger(__name__)

TIMEOUT_S = 2.0
MEMORY_BYTES = 2**30
MAX_REPLY_BYTES = 2**20
MAX_ERROR_CHARS = 500  # of an error of llguidance, which may quote a whole grammar
NUM_KEPT = 256  # compiled grammars; a matcher is some kB


def import_llguidance() -> ModuleType:
    """Import llguidance, or say what to install."""
    try:
        return importlib.import_module("llguidance")
    except ImportError as error:
        raise ImportError(
            "structured output needs llguidance: pip install 'gemlax[serve]'"
        ) from error


class Compiler:
    """Compiles grammars for one vocabulary. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, *, timeout_s: float = TIMEOUT_S):
        """Build nothing yet: llguidance's form of the vocabulary takes 1 s and 120 MB."""
        # The tokenizer is what this compiler is kept by (`compiler_of`).
        self._tokenizer = weakref.ref(tokenizer)
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._matchers: OrderedDict[str, Matcher] = OrderedDict()
        self._worker = Worker(
            "gemlax.grammar.validate", packages=("llguidance",), memory=MEMORY_BYTES,
            timeout_s=timeout_s, max_reply=MAX_REPLY_BYTES,
        )  # fmt: skip

    def constraint(
        self,
        grammar: Grammar | None,
        stop_ids: Collection[int],
        *,
        allowed_ids: Sequence[int] | None = None,
        budget: ThinkingBudget | None = None,
    ) -> Constraint:
        """Return the constraint of one request; its grammar is compiled at first use.

        Raises:
            RequestError: the grammar is malformed, out of bounds, or takes too long to build.
            ImportError: llguidance is not installed.
        """
        matcher = None if grammar is None else self.matcher(grammar).deep_copy()
        tokenizer = self._held_tokenizer()
        special = frozenset(tokenizer.special_ids) if grammar is not None else frozenset()
        return Constraint(
            matcher, num_tokens=tokenizer.num_tokens, eos_id=tokenizer.eos_id, stop_ids=stop_ids,
            special_ids=special, allowed_ids=allowed_ids, budget=budget,
        )  # fmt: skip

    def matcher(self, grammar: Grammar) -> Matcher:
        """Return llguidance's matcher of a grammar, to be copied."""
        llguidance = import_llguidance()
        source = grammar.source()
        try:
            source.encode()
        except UnicodeEncodeError as error:
            raise RequestError("the grammar holds a lone surrogate") from error
        with self._lock:
            if source in self._matchers:
                self._matchers.move_to_end(source)
                return self._matchers[source]
        written = json.dumps({"grammars": [{"lark_grammar": source}]})
        self._validate(written)
        limits = llguidance.LLParserLimits(verbose_errors=False)
        vocabulary = self._built_vocabulary(llguidance)
        matcher = llguidance.LLMatcher(vocabulary, written, log_level=0, limits=limits)
        if matcher.is_error():
            raise RequestError(f"the grammar cannot be built: {_short(matcher.get_error())}")
        probe = matcher.deep_copy()
        probe.compute_bitmask()
        if probe.is_error():
            raise RequestError("the grammar matches no text")
        with self._lock:
            self._matchers[source] = matcher
            while len(self._matchers) > NUM_KEPT:
                self._matchers.popitem(last=False)
        return matcher

    def _validate(self, written: str) -> None:
        """Let the worker build the grammar first: what hangs there is killed."""
        answer = self._worker.ask(json.dumps({"grammar": written}).encode())
        if answer is None:
            raise RequestError(
                f"the grammar is too complex: it took longer than {self._timeout_s:g} s to build, "
                "or too much memory"
            )
        if answer["error"]:
            raise RequestError(f"the grammar cannot be built: {_short(answer['error'])}")
        for warning in answer["warnings"]:
            logger.warning("grammar: %s (left out)", _short(warning))

    def _built_vocabulary(self, llguidance: ModuleType) -> Any:
        with self._lock:
            if self._vocabulary is None:
                tokenizer = self._held_tokenizer()
                self._vocabulary = llguidance.LLTokenizer(
                    _Vocabulary(tokenizer), n_vocab=tokenizer.num_tokens,
                    eos_token=[tokenizer.eos_id],
                )  # fmt: skip
            return self._vocabulary

    def _held_tokenizer(self) -> Tokenizer:
        tokenizer = self._tokenizer()
        assert tokenizer is not None
        return tokenizer


class _Vocabulary:
    """A tokenizer as `LLTokenizer` reads it. Its names are llguidance's."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer):
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        # What stands for no text can come from no rule of text.
        never = tokenizer.special_ids | tokenizer.unused_ids
        self.tokens = [
            tokenizer.token_bytes(id, skip_special=False) for id in range(tokenizer.num_tokens)
        ]
        self.special_token_ids = sorted(never)
        self._tokenizer = weakref.ref(tokenizer)

    def __call__(self, text: str | bytes) -> list[int]:
        tokenizer = self._tokenizer()
        assert tokenizer is not None
        read = text if isinstance(text, str) else text.decode(errors="replace")
        return tokenizer.encode(read, add_bos=False)


_COMPILERS: "weakref.WeakKeyDictionary[Tokenizer, Compiler]" = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def compiler_of(tokenizer: Tokenizer) -> Compiler:
    """Return the compiler of a tokenizer, the same one each time."""
    with _LOCK:
        if tokenizer not in _COMPILERS:
            _COMPILERS[tokenizer] = Compiler(tokenizer)
        return _COMPILERS[tokenizer]


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_ERROR_CHARS else text[:MAX_ERROR_CHARS] + "..."
