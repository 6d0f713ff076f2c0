"""What a GGUF file says of generation: where to stop, how to sample, how to chat.

Source: gguf 0.19.0, constants.py (Keys); llama.cpp, src/llama-vocab.cpp, common/common.cpp and
conversion/base.py (generation_config.json to `general.sampling.*`).
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemlax.checkpoints.base import show
from gemlax.errors import CheckpointError

__all__ = ["find_template", "read_sampling", "read_stops", "read_suppressed"]

logger = logging.getLogger(__name__)

_STOPS = ("eos_token_id", "eos_token_ids", "eot_token_id", "eom_token_id")
_SAMPLING = "general.sampling."
# The file's names of what generation_config.json says.
_SETTINGS = {
    "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}  # fmt: skip
# Of the other samplers, the values with which they do nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "xtc_probability": (0.0,), "mirostat": (0,), "penalty_freq": (0.0,), "penalty_present": (0.0,),
    "typ_p": (1.0,), "dry_multiplier": (0.0,), "top_n_sigma": (-1.0, 0.0), "dynatemp_range": (0.0,),
}  # fmt: skip
# Those that say something only where another one is on. A last_n of -1 is the whole text.
_IDLE = {"xtc_threshold", "mirostat_tau", "mirostat_eta", "dynatemp_exponent", "dry_base",
         "dry_allowed_length", "dry_penalty_last_n"}  # fmt: skip
_TEMPLATE = "tokenizer.chat_template"


def read_stops(metadata: Mapping[str, Any], num_tokens: int, source: Path) -> tuple[int, ...]:
    """Return the ids that end a text: end of sequence, of turn and of message.

    An id outside the vocabulary stands for none, as in llama.cpp.
    """
    found: list[int] = []
    for name in _STOPS:
        found += _ids(metadata, name, 1 if name == _STOPS[0] else [], num_tokens, source)
    return tuple(dict.fromkeys(found))


def read_suppressed(metadata: Mapping[str, Any], num_tokens: int, source: Path) -> list[int]:
    """Return the ids that are never generated. Source: llama.cpp conversion/gemma.py."""
    return _ids(metadata, "suppress_tokens", [], num_tokens, source)


def _ids(
    metadata: Mapping[str, Any], name: str, default: Any, num_tokens: int, source: Path
) -> list[int]:
    """Return one id or several, without those outside the vocabulary."""
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    ids = value if isinstance(value, list) else [value]
    if any(type(id) is not int for id in ids):
        raise CheckpointError(
            f"{source}: tokenizer.ggml.{name} must be an integer or a list of them, got "
            f"{show(repr(value))}"
        )
    inside = [id for id in ids if 0 <= id < num_tokens]
    if len(inside) < len(ids):
        logger.warning(
            "%s: left aside tokenizer.ggml.%s, outside the vocabulary of %d", source, name,
            num_tokens,
        )  # fmt: skip
    return inside


def read_sampling(metadata: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Return the file's sampling defaults by the names of generation_config.json."""
    own = {k.removeprefix(_SAMPLING): v for k, v in metadata.items() if k.startswith(_SAMPLING)}
    found: dict[str, Any] = {}
    for name, key in _SETTINGS.items():
        if name not in own:
            continue
        value = own[name]
        if type(value) not in (int, float) or value != value or abs(value) == float("inf"):
            raise CheckpointError(
                f"{source}: {_SAMPLING}{name} must be a finite number, got {show(repr(value))}"
            )
        # The file stores float32: 0.95, not 0.949999988.
        found[key] = float(f"{value:.6g}") if isinstance(value, float) else value
    if own.get("penalty_last_n") == 0:
        found.pop("repetition_penalty", None)  # of no token
    _settle(found)
    _log_others(own, found, source)
    return found


def _settle(found: dict[str, Any]) -> None:
    """Say as generation_config.json does whether to sample: at no temperature, the likeliest."""
    drawn = found.keys() & {"temperature", "top_k", "top_p", "min_p"}
    if not drawn:
        return
    found["do_sample"] = found.get("temperature", 1.0) > 0
    if not found["do_sample"]:
        for key in drawn:
            del found[key]
    elif "top_k" in found:
        found["top_k"] = max(int(found["top_k"]), 0)
    else:
        found["top_k"] = 0  # where it is not said, transformers takes 50


def _log_others(own: Mapping[str, Any], found: Mapping[str, Any], source: Path) -> None:
    """Name the settings that are not applied and would do something."""
    others = [
        f"{name} = {show(str(value))}"
        for name, value in own.items()
        if name not in _SETTINGS.keys() | _IDLE and value not in _NEUTRAL.get(name, ())
    ]
    if "repetition_penalty" not in found or own.get("penalty_last_n") in (-1, 0):
        others = [other for other in others if not other.startswith("penalty_last_n")]
    if others:
        logger.warning("%s: %s is not applied: %s", source, _SAMPLING + "*", ", ".join(others))


def find_template(metadata: Mapping[str, Any], source: Path) -> str | dict[str, str] | None:
    """Return the chat template, several by name, or None; the one without a name is "default"."""
    found = {
        key.removeprefix(_TEMPLATE).removeprefix(".") or "default": value
        for key, value in metadata.items()
        if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.")
    }
    found |= {"default": metadata[_TEMPLATE]} if _TEMPLATE in metadata else {}
    named = {k: v for k, v in found.items() if isinstance(v, str) and v.strip()}
    if len(named) != 1:
        return named or None
    ((name, template),) = named.items()
    if name != "default":
        logger.info("%s: the only chat template, %s, is used", source, show(name))
    return template
