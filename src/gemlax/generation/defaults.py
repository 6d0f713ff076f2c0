"""What a checkpoint's generation_config.json says about a request.

Read as transformers reads it; what gemlax has no counterpart for is told, not passed over.
Source: transformers 5.23, GenerationConfig and GenerationMixin._get_logits_processor.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from gemlax.errors import CheckpointError, RequestError, check_int
from gemlax.sampling import check_number
from gemlax.tokenizer import Tokenizer

__all__ = ["Defaults", "read_defaults", "read_stop", "tell"]

logger = logging.getLogger(__name__)

# What transformers takes where a file that samples names no top_k, or null.
_TOP_K = 50
_OFF: tuple[Any, ...] = (None, False, 0, "", [], {})
# What changes the answer and has no counterpart here, with the values that change nothing.
_NOT_APPLIED: dict[str, tuple[Any, ...]] = {
    "num_beams": (*_OFF, 1),
    "num_beam_groups": (*_OFF, 1),
    "num_return_sequences": (*_OFF, 1),
    "diversity_penalty": _OFF,
    "constraints": _OFF,
    "force_words_ids": _OFF,
    "penalty_alpha": _OFF,
    "dola_layers": (None,),
    "typical_p": (None, 1),
    "top_h": (None,),
    "epsilon_cutoff": _OFF,
    "eta_cutoff": _OFF,
    "guidance_scale": (None, 1),
    "encoder_repetition_penalty": (None, 1),
    "encoder_no_repeat_ngram_size": _OFF,
    "exponential_decay_length_penalty": _OFF,
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "watermarking_config": _OFF,
    "token_healing": _OFF,
    "max_time": (None,),
}
# What changes no token: caches, compilation, what else is returned, how drafts are made, what only
# beams read, ids that are told elsewhere.
_WITHOUT_EFFECT = {
    "_commit_hash",
    "_from_model_config",
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_ensemble_weight",
    "assistant_lookbehind",
    "bos_token_id",
    "cache_config",
    "cache_implementation",
    "compile_config",
    "continuous_batching_config",
    "decoder_start_token_id",
    "disable_compile",
    "early_stopping",
    "is_assistant",
    "length_penalty",
    "low_memory",
    "max_cache_len",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "remove_invalid_values",
    "renormalize_logits",
    "return_dict_in_generate",
    "return_legacy_cache",
    "speculation_type",
    "target_lookbehind",
    "transformers_version",
    "trust_remote_code",
    "use_cache",
    "use_mtp",
}


class Defaults(NamedTuple):
    """What applies where a caller says nothing. `sampling` has the names of `make_sampling`.

    `max_length` and `min_length` count the prompt too; None: not said. `not_applied` holds what
    would change the answer and has no counterpart, `unknown` what transformers does not know.
    """

    sampling: dict[str, Any]
    bad_words: list[list[int]]
    sequence_bias: dict[tuple[int, ...], float]
    suppress: list[int]
    begin_suppress: list[int]
    max_new_tokens: int | None
    max_length: int | None
    min_new_tokens: int | None
    min_length: int
    stop: list[str]
    stop_ids: list[int]
    not_applied: dict[str, Any]
    unknown: dict[str, Any]


def read_defaults(
    config: Mapping[str, Any], vocab_size: int, source: str = "generation_config"
) -> Defaults:
    """Read a generation_config; `source` is what errors call it.

    Raises:
        CheckpointError: a value of the wrong type or out of range; it is named.
    """
    try:
        return _read(_Reader(config, vocab_size))
    except RequestError as error:
        raise CheckpointError(f"{source}: {error}") from error


def read_stop(text: str, tokenizer: Tokenizer) -> int | str | None:
    """Return what a stop string waits for: a control token, a text, or nothing that can come."""
    parts = [part for part in tokenizer.split_special(text) if part != ""]
    if not any(isinstance(part, int) for part in parts):
        return text
    return parts[0] if len(parts) == 1 else None


def tell(defaults: Defaults, tokenizer: Tokenizer | None, source: str) -> None:
    """Say in one line what a file asks for and does not get, in another what is not known."""
    lost = dict(defaults.not_applied)
    stop = [text for text in defaults.stop if not tokenizer or read_stop(text, tokenizer) is None]
    lost |= {"stop_strings": stop} if stop else {}
    if lost:
        said = ", ".join(f"{key}={value!r}" for key, value in lost.items())
        logger.warning("%s: not applied, gemlax has no such setting: %s", source, said)
    if defaults.unknown:
        logger.info("%s: not known, left aside: %s", source, ", ".join(sorted(defaults.unknown)))


class _Reader:
    """Takes checked values out of a generation_config; null is as good as absent."""

    def __init__(self, config: Mapping[str, Any], vocab_size: int):
        self.rest = {key: value for key, value in config.items() if value is not None}
        self._vocab_size = vocab_size

    def integer(self, name: str, default: Any, low: int) -> Any:
        value = self.rest.pop(name, None)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return default if value is None else check_int(name, value, low)

    def number(self, name: str, default: float, high: float, *, open_low: bool = False) -> float:
        value = self.rest.pop(name, None)
        return default if value is None else check_number(name, value, 0, high, open_low=open_low)

    def flag(self, name: str) -> bool:
        value = self.rest.pop(name, False)
        if not isinstance(value, bool):
            raise RequestError(f"{name} must be true or false, got {value!r}")
        return value

    def ids(self, name: str, *, one: bool = False, inside: bool = False) -> list[int]:
        """Return a list of ids; `one`: an id alone will do; `inside`: they are looked up."""
        value = self.rest.pop(name, [])
        value = [value] if one and not isinstance(value, (list, tuple)) else value
        if not isinstance(value, (list, tuple)):
            raise RequestError(f"{name} must be a list of token ids, got {value!r}")
        ids = [check_int(f"an id in {name}", id, 0) for id in value]
        if inside and any(id >= self._vocab_size for id in ids):
            raise RequestError(
                f"{name}: id {max(ids)} is outside the vocabulary, [0, {self._vocab_size})"
            )
        return ids

    def sequences(self, name: str, value: Any) -> list[list[int]]:
        """Return lists of ids that are inside the vocabulary, none empty."""
        whole = isinstance(value, (list, tuple))
        if not whole or not all(isinstance(ids, (list, tuple)) and ids for ids in value):
            raise RequestError(f"{name} must be lists of token ids, none empty, got {value!r}")
        return [_Reader({name: ids}, self._vocab_size).ids(name, inside=True) for ids in value]

    def biases(self) -> dict[tuple[int, ...], float]:
        value = self.rest.pop("sequence_bias", [])
        pairs = isinstance(value, list) and all(
            isinstance(pair, list) and len(pair) == 2 for pair in value
        )
        if not pairs:
            raise RequestError(f"sequence_bias must be a list of [ids, bias], got {value!r}")
        keys = self.sequences("sequence_bias", [ids for ids, _ in value])
        numbers = [
            check_number("a bias in sequence_bias", x, -math.inf, math.inf) for _, x in value
        ]
        return dict(zip(map(tuple, keys), numbers, strict=True))

    def texts(self, name: str) -> list[str]:
        value = self.rest.pop(name, [])
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(x, str) and x for x in texts):
            raise RequestError(f"{name} must be non-empty strings, got {value!r}")
        return texts


def _read(reader: _Reader) -> Defaults:
    samples = reader.flag("do_sample")
    temperature = reader.number("temperature", 1.0, math.inf)
    defaults = Defaults(
        sampling={
            # Without do_sample transformers takes the arg-max, whatever else is said.
            "temperature": temperature if samples else 0.0,
            "top_k": reader.integer("top_k", _TOP_K if samples else 0, -1),
            "top_p": reader.number("top_p", 1.0, 1),
            "min_p": reader.number("min_p", 0.0, 1),
            "repetition_penalty": reader.number("repetition_penalty", 1.0, math.inf, open_low=True),
            "no_repeat_ngram_size": reader.integer("no_repeat_ngram_size", 0, 0),
        },
        bad_words=reader.sequences("bad_words_ids", reader.rest.pop("bad_words_ids", [])),
        sequence_bias=reader.biases(),
        suppress=reader.ids("suppress_tokens", one=True),
        begin_suppress=reader.ids("begin_suppress_tokens", one=True),
        max_new_tokens=reader.integer("max_new_tokens", None, 1),
        max_length=reader.integer("max_length", None, 1),
        min_new_tokens=reader.integer("min_new_tokens", None, 0),
        min_length=reader.integer("min_length", 0, 0),
        stop=reader.texts("stop_strings"),
        stop_ids=reader.ids("eos_token_id", one=True),
        not_applied=_take(reader.rest, lambda key: key in _NOT_APPLIED),
        unknown={},
    )
    changing = {k: v for k, v in defaults.not_applied.items() if v not in _NOT_APPLIED[k]}
    unknown = _take(reader.rest, lambda key: key not in _WITHOUT_EFFECT)
    return defaults._replace(not_applied=changing, unknown=unknown)


def _take(rest: dict[str, Any], wanted: Callable[[str], bool]) -> dict[str, Any]:
    chosen: Iterable[str] = [key for key in rest if wanted(key)]
    return {key: rest.pop(key) for key in chosen}
