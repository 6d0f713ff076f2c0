"""Cases of docs/compatibility.md: config.json files, as found in public and as people edit them."""

from functools import partial
from pathlib import Path
from typing import Any

from compatibility import Case, Read
from configs import INDEX, published

from gemlax import preset
from gemlax.config import from_hf

__all__ = ["CASES"]

FOUND, EDITED = "config.json files found in public", "config.json, other spellings"
SMALL, LARGE = "gemma-3-1b-it", "gemma-3-4b-it"
Keys = dict[str, Any]


def equals(folder: Path, config: Keys, name: str) -> Read:
    return Read(from_hf(config).text, preset(name).text)


def found_case(name: str) -> Case:
    entry = INDEX[name]
    check = partial(equals, config=published(name), name=entry["preset"])
    if "refused" in entry:
        return Case(FOUND, name, check, "refused", error=entry["refused"])
    return Case(FOUND, name, check, "loads", f"equals the preset {entry['preset']}")


def edited(file: str, keys: Keys, drop: tuple[str, ...] = (), inside: bool = False) -> Keys:
    """Return a published file with other keys, outside or in its text_config."""
    config = published(file)
    if inside:
        text = {key: value for key, value in config["text_config"].items() if key not in drop}
        return config | {"text_config": text | keys}
    return {key: value for key, value in config.items() if key not in drop} | keys


def edited_case(kind: str, config: Keys, name: str, log: str = "", error: str = "") -> Case:
    check = partial(equals, config=config, name=name)
    verdict = "refused" if error else "loads"
    oracle = "" if error else f"equals the preset {name}"
    return Case(EDITED, kind, check, verdict, oracle, log, error)


LINEAR = {"rope_type": "linear", "factor": 8.0}
ROPES = ("rope_scaling", "rope_parameters")


def rope(keys: Keys) -> Keys:
    return edited(LARGE, keys, ROPES, inside=True)


CASES = [
    *(found_case(name) for name in INDEX),
    edited_case("unknown keys at null, false, 0 or empty",
                edited(SMALL, {"some_key": None, "other": [], "third": False}), "gemma-3-1b",
                log="other, third"),
    edited_case("an unknown key that says something", edited(SMALL, {"some_key": 3}),
                "gemma-3-1b", error="some_key = 3"),
    edited_case("keys of unsloth, TRL and remote code",
                edited(SMALL, {"unsloth_version": "2026.4", "auto_map": {"AutoModel": "m.M"}}),
                "gemma-3-1b", log="its code is not run"),
    edited_case("keys of mlx and of losses",
                edited(LARGE, {"ignore_index": -100, "quantization": None,
                               "vision_config": {"skip_vision": True}}), "gemma-3-4b"),
    edited_case("generation settings, as transformers 4 wrote them",
                edited(SMALL, {"max_length": 20, "num_beams": 1, "top_k": 50}), "gemma-3-1b",
                log="max_length"),
    edited_case("whole numbers written as floats",
                edited(SMALL, {"sliding_window": 512.0, "query_pre_attn_scalar": 256.0}),
                "gemma-3-1b"),
    edited_case("copies of the text_config's keys outside of it",
                edited(LARGE, {"hidden_size": 2560, "num_hidden_layers": 34}), "gemma-3-4b"),
    edited_case("a copy that differs", edited(LARGE, {"hidden_size": 2304}), "gemma-3-4b",
                error="the model has 2560"),
    edited_case("`rope_scaling` with `type`", rope({"rope_scaling": {"type": "linear",
                "factor": 8.0}}), "gemma-3-4b"),
    edited_case("`rope_parameters` flat", rope({"rope_parameters": LINEAR}), "gemma-3-4b"),
    edited_case("`rope_scaling` by kind of layer",
                rope({"rope_scaling": {"full_attention": LINEAR, "sliding_attention": None}}),
                "gemma-3-4b"),
    edited_case("YaRN", rope({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
                "gemma-3-4b", error="rope_type 'yarn'"),
    edited_case("an empty `quantization_config`", edited(SMALL, {"quantization_config": {}}),
                "gemma-3-1b"),
    edited_case("quantised by mlx", edited(SMALL, {"quantization": {"group_size": 64, "bits": 4}}),
                "gemma-3-1b", error="quantization"),
    edited_case("quantised by GPTQ", edited(SMALL, {"quantization_config": {"quant_method": "gptq",
                "bits": 4}}), "gemma-3-1b", error="quantization_config"),
    edited_case("bidirectional attention (EmbeddingGemma)",
                edited(SMALL, {"use_bidirectional_attention": True}), "gemma-3-1b",
                error="use_bidirectional_attention = True"),
    edited_case("another activation", edited(SMALL, {"hidden_activation": "silu"}), "gemma-3-1b",
                error="gelu_pytorch_tanh"),
    *(
        edited_case(f"model_type {name}", edited(LARGE, {"model_type": name}), "gemma-3-4b",
                    error=f"model_type '{name}' is not supported")
        for name in ("gemma2", "gemma3n", "shieldgemma2", "llama")
    ),
]  # fmt: skip
