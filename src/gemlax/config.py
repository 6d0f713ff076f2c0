"""What a Gemma checkpoint is, resolved once from its config file into frozen data.

Every fact that differs between layers ends up in a `LayerSpec`; `StackPlan` says how equal
layers are stacked and scanned. Nothing here holds an array or knows a framework; no later
code asks what the model is called.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from gemlax.errors import UnsupportedError

__all__ = [
    "GemmaConfig",
    "LayerSpec",
    "Location",
    "RopeSpec",
    "Run",
    "Segment",
    "StackPlan",
    "TextConfig",
]

Kind = Literal["sliding_attention", "full_attention"]
KINDS: tuple[Kind, ...] = ("sliding_attention", "full_attention")


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding of one layer: frequencies are theta ** (-2i / head_dim) / factor."""

    theta: float
    factor: float = 1.0


@dataclass(frozen=True)
class LayerSpec:
    """All that distinguishes one decoder layer from another. No index: equal layers are equal.

    `window` counts the tokens a query sees, itself included; None sees all. A layer with
    `owns_kv` False reads the keys and values of its donor (`StackPlan.donor`).
    """

    kind: Kind
    window: int | None
    num_key_value_heads: int
    head_dim: int
    rope: RopeSpec
    attention_scale: float
    intermediate_size: int
    owns_kv: bool = True


@dataclass(frozen=True)
class TextConfig:
    """The text decoder. Field names are those of transformers' `Gemma3TextConfig` where it has one.

    `norm_offset` is what RMSNorm adds to its weight (1 for Gemma 3). `query_pre_attn_scalar`
    is kept only to be written back; the layers read `LayerSpec.attention_scale`.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    max_position_embeddings: int
    query_pre_attn_scalar: float
    layers: tuple[LayerSpec, ...]
    rms_norm_eps: float = 1e-6
    norm_offset: float = 1.0

    @property
    def num_hidden_layers(self) -> int:
        """How many decoder layers there are."""
        return len(self.layers)

    @property
    def plan(self) -> "StackPlan":
        """How the layers are stacked and scanned."""
        return StackPlan.of(self.layers)

    def first(self, kind: Kind) -> LayerSpec | None:
        """Return the spec of the first layer of `kind`, or None if there is no such layer."""
        return next((spec for spec in self.layers if spec.kind == kind), None)


@dataclass(frozen=True)
class GemmaConfig:
    """A whole checkpoint: the text decoder and the ids that generation needs."""

    text: TextConfig
    bos_token_id: int = 2
    eos_token_id: tuple[int, ...] = (1,)
    pad_token_id: int = 0
    image_token_id: int | None = None  # stands for image features; never an output

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "GemmaConfig":
        """Resolve a Hugging Face `config.json` (text-only, or the text part of a multimodal one).

        Raises:
            UnsupportedError: another architecture, a key that is not known, or a known key at a
                value that is not supported; every offending key is named.
        """
        model_type = config.get("model_type")
        if model_type == "gemma3":
            if not isinstance(config.get("text_config"), Mapping):
                raise UnsupportedError("config.json: model_type 'gemma3' without a 'text_config'")
            _refuse_unknown(config, _MULTIMODAL_KEYS, "config.json")
            text = dict(config["text_config"])
            text.setdefault("model_type", "gemma3_text")
            text = {key: value for key, value in config.items() if key in _ID_KEYS} | text
            if "eos_token_id" in config:
                text["eos_token_id"] = config["eos_token_id"]
        else:
            text = dict(config)
        if text.get("model_type") != "gemma3_text":
            raise UnsupportedError(
                f"config.json: model_type {model_type!r} is not supported; "
                "expected 'gemma3_text' or 'gemma3'"
            )
        _refuse_unknown(text, _TEXT_KEYS, "config.json")
        ids = {
            key: text[key] for key in ("bos_token_id", "pad_token_id") if text.get(key) is not None
        }
        eos = _as_ids(text.get("eos_token_id"))
        image = config.get("image_token_index", 262_144) if model_type == "gemma3" else None
        return cls(_text_from_hf(text), eos_token_id=eos, image_token_id=image, **ids)

    def to_hf(self) -> dict[str, Any]:
        """Write a `config.json` that transformers 4 and 5 read; `from_hf` reads it back equal."""
        text = self.text
        sliding, full = text.first("sliding_attention"), text.first("full_attention")
        spec = text.layers[0]
        eos = self.eos_token_id
        factor = full.rope.factor if full else 1.0
        return {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": text.model_type,
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": spec.intermediate_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": spec.num_key_value_heads,
            "head_dim": spec.head_dim,
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": text.max_position_embeddings,
            "rms_norm_eps": text.rms_norm_eps,
            "query_pre_attn_scalar": text.query_pre_attn_scalar,
            "sliding_window": sliding.window if sliding else _HF_DEFAULTS["sliding_window"],
            "layer_types": [layer.kind for layer in text.layers],
            "rope_theta": full.rope.theta if full else _HF_DEFAULTS["rope_theta"],
            "rope_local_base_freq": (
                sliding.rope.theta if sliding else _HF_DEFAULTS["rope_local_base_freq"]
            ),
            "rope_scaling": {"rope_type": "linear", "factor": factor} if factor != 1.0 else None,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "use_bidirectional_attention": False,
            "tie_word_embeddings": True,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(eos) if len(eos) != 1 else eos[0],
            "pad_token_id": self.pad_token_id,
        }

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "GemmaConfig":
        """Resolve the metadata of a GGUF file (keys as llama.cpp writes them).

        What the file does not say is supplied: the local rope base (10000), the pattern (every
        sixth layer full) and the query scale (hidden / heads at 62 layers, else head_dim).
        Source: llama.cpp src/models/gemma3.cpp.

        Raises:
            UnsupportedError: another architecture, or a `gemma3.*` key that is missing or unknown.
        """
        architecture = metadata.get("general.architecture")
        if architecture != "gemma3":
            raise UnsupportedError(
                f"GGUF architecture {architecture!r} is not supported; expected 'gemma3'"
            )
        own = {k[7:]: v for k, v in metadata.items() if k.startswith("gemma3.")}
        _refuse_unknown(own, _GGUF_KEYS, "GGUF metadata, gemma3.*")
        missing = sorted(_GGUF_REQUIRED - own.keys())
        if missing:
            raise UnsupportedError(f"GGUF metadata lacks gemma3.{', gemma3.'.join(missing)}")
        vocab = own.get("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ())))
        text = _text_from_hf(_gguf_to_hf(own, vocab))
        return cls(
            text,
            bos_token_id=int(metadata.get("tokenizer.ggml.bos_token_id", 2)),
            eos_token_id=(int(metadata.get("tokenizer.ggml.eos_token_id", 1)),),
            pad_token_id=int(metadata.get("tokenizer.ggml.padding_token_id", 0)),
        )


# --- Hugging Face keys -------------------------------------------------------------------------

_ID_KEYS = {"bos_token_id", "eos_token_id", "pad_token_id"}
# What the checkpoint's file leaves out. Source: transformers 5.23.0, Gemma3TextConfig.
_HF_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}
_READ_KEYS = _HF_DEFAULTS.keys() | _ID_KEYS | {
    "model_type", "layer_types", "sliding_window_pattern", "_sliding_window_pattern",
    "rope_scaling", "rope_parameters",
}  # fmt: skip
# Known keys that pass only at these values: another value would change the model's output.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (False, None),
    "tie_word_embeddings": (True, None),
    "quantization_config": (None,),
}
# Keys that change nothing in the forward pass of a decoder at inference.
_INERT = {
    "architectures", "attention_dropout", "cache_implementation", "chunk_size_feed_forward",
    "dtype", "id2label", "initializer_range", "is_encoder_decoder", "label2id", "_name_or_path",
    "name_or_path", "output_attentions", "output_hidden_states", "problem_type", "return_dict",
    "torch_dtype", "transformers_version", "use_cache", "unsloth_fixed", "unsloth_version",
}  # fmt: skip
_TEXT_KEYS = _READ_KEYS | _NEUTRAL.keys() | _INERT
_MULTIMODAL_KEYS = _ID_KEYS | _INERT | {
    "model_type", "text_config", "vision_config", "boi_token_index", "eoi_token_index",
    "image_token_index", "mm_tokens_per_image", "tie_word_embeddings", "quantization_config",
}  # fmt: skip


def _refuse_unknown(found: Mapping[str, Any], known: Any, where: str) -> None:
    wrong = [f"{key} = {found[key]!r} (not known)" for key in found if key not in known]
    wrong += [
        f"{key} = {found[key]!r} (only {allowed[0]!r} is supported)"
        for key, allowed in _NEUTRAL.items()
        if key in found and found[key] not in allowed
    ]
    if wrong:
        raise UnsupportedError(f"{where}: {'; '.join(sorted(wrong))}")


def _as_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return (1,)
    ids = (value,) if isinstance(value, int) else value
    if not isinstance(ids, (list, tuple)) or not all(isinstance(i, int) for i in ids):
        raise UnsupportedError(f"config: eos_token_id must be an id or a list of ids, got {ids!r}")
    return tuple(ids)


def _text_from_hf(found: Mapping[str, Any]) -> TextConfig:
    c = _HF_DEFAULTS | {key: value for key, value in found.items() if value is not None}
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
                "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
                "sliding_window"):  # fmt: skip
        if not isinstance(c[key], int) or isinstance(c[key], bool) or c[key] <= 0:
            raise UnsupportedError(f"config: {key} must be a positive integer, got {c[key]!r}")
    if c["num_attention_heads"] % c["num_key_value_heads"]:
        raise UnsupportedError(
            f"config: num_attention_heads {c['num_attention_heads']} is not a multiple of "
            f"num_key_value_heads {c['num_key_value_heads']}"
        )
    ropes = _ropes_from_hf(c)
    common = dict(
        num_key_value_heads=c["num_key_value_heads"],
        head_dim=c["head_dim"],
        attention_scale=_positive(c, "query_pre_attn_scalar") ** -0.5,
        intermediate_size=c["intermediate_size"],
    )
    layers = tuple(
        LayerSpec(
            kind=kind,
            window=c["sliding_window"] if kind == "sliding_attention" else None,
            rope=ropes[kind],
            **common,
        )
        for kind in _layer_types(c)
    )
    return TextConfig(
        model_type=c.get("model_type", "gemma3_text"),
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        num_attention_heads=c["num_attention_heads"],
        max_position_embeddings=c["max_position_embeddings"],
        query_pre_attn_scalar=c["query_pre_attn_scalar"],
        layers=layers,
        rms_norm_eps=_positive(c, "rms_norm_eps"),
    )


def _positive(c: Mapping[str, Any], key: str) -> float:
    value = c[key]
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise UnsupportedError(f"config: {key} must be a positive number, got {value!r}")
    return value


def _layer_types(c: Mapping[str, Any]) -> list[Kind]:
    count = c["num_hidden_layers"]
    if "layer_types" not in c:
        period = c.get("sliding_window_pattern", c.get("_sliding_window_pattern", 6))
        if not isinstance(period, int) or period < 1:
            raise UnsupportedError(
                f"config: sliding_window_pattern must be a positive integer, got {period!r}"
            )
        return [KINDS[(i + 1) % period == 0] for i in range(count)]
    kinds = c["layer_types"]
    kinds = list(kinds) if isinstance(kinds, (list, tuple)) else [kinds]
    if len(kinds) != count or any(kind not in KINDS for kind in kinds):
        raise UnsupportedError(
            f"config: layer_types must be {count} of {list(KINDS)}, got {len(kinds)}: "
            f"{sorted(set(map(str, kinds)))}"
        )
    return kinds


def _ropes_from_hf(c: Mapping[str, Any]) -> dict[Kind, RopeSpec]:
    """Read both layouts: rope_theta / rope_local_base_freq / rope_scaling, and rope_parameters."""
    by_kind = c.get("rope_parameters", {})
    scaling = c.get("rope_scaling", {})
    for found in (by_kind, scaling, *(by_kind.values() if isinstance(by_kind, Mapping) else ())):
        if not isinstance(found, Mapping):
            raise UnsupportedError(f"config: rope settings must be objects, got {found!r}")
    unknown = sorted(by_kind.keys() - set(KINDS))
    if unknown:
        raise UnsupportedError(f"config: rope_parameters has {unknown}; expected {list(KINDS)}")
    full = dict(scaling) | dict(by_kind.get("full_attention") or {})
    return {
        "sliding_attention": _rope(
            by_kind.get("sliding_attention") or {}, c["rope_local_base_freq"]
        ),
        "full_attention": _rope(full, c["rope_theta"]),
    }


def _rope(found: Mapping[str, Any], theta: float) -> RopeSpec:
    kind = found.get("rope_type", found.get("type", "default"))
    unknown = sorted(found.keys() - {"rope_type", "type", "rope_theta", "factor"})
    if unknown or kind not in ("default", "linear"):
        raise UnsupportedError(
            f"config: rope {dict(found)!r} is not supported; expected rope_type 'default' or "
            "'linear' with rope_theta and factor"
        )
    spec = {"theta": found.get("rope_theta", theta), "factor": found.get("factor", 1.0)}
    factor = float(_positive(spec, "factor")) if kind == "linear" else 1.0
    return RopeSpec(theta=float(_positive(spec, "theta")), factor=factor)


# --- GGUF keys ---------------------------------------------------------------------------------

_GGUF_REQUIRED = {
    "context_length", "embedding_length", "block_count", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.sliding_window", "attention.layer_norm_rms_epsilon",
}  # fmt: skip
_GGUF_KEYS = _GGUF_REQUIRED | {
    "attention.value_length", "attention.sliding_window_pattern", "rope.freq_base",
    "rope.freq_base_swa", "rope.scaling.type", "rope.scaling.factor", "vocab_size",
    "rope.scaling.original_context_length", "rope.dimension_count",
}  # fmt: skip


def _gguf_to_hf(own: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    heads, head_dim = own["attention.head_count"], own["attention.key_length"]
    if own.get("attention.value_length", head_dim) != head_dim:
        raise UnsupportedError("GGUF metadata: key_length and value_length differ")
    # The file stores float32; the published value is 1e-6.
    eps = float(f"{own['attention.layer_norm_rms_epsilon']:.6g}")
    deep = own["block_count"] == 62
    pattern = own.get("attention.sliding_window_pattern", 6)
    layer_types = None
    if not isinstance(pattern, int):
        layer_types, pattern = [KINDS[not sliding] for sliding in pattern], 6
    scaling = own.get("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise UnsupportedError(f"GGUF metadata: rope.scaling.type {scaling!r}; expected 'linear'")
    factor = float(own.get("rope.scaling.factor", 1.0))
    return {
        "model_type": "gemma3_text",
        "vocab_size": int(vocab_size),
        "hidden_size": own["embedding_length"],
        "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": own["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": own["attention.head_count_kv"],
        "head_dim": head_dim,
        "max_position_embeddings": own["context_length"],
        "rms_norm_eps": eps,
        "query_pre_attn_scalar": own["embedding_length"] // heads if deep else head_dim,
        "sliding_window": own["attention.sliding_window"],
        "layer_types": layer_types,
        "sliding_window_pattern": pattern,
        "rope_theta": float(own.get("rope.freq_base", 1_000_000.0)),
        "rope_local_base_freq": float(own.get("rope.freq_base_swa", 10_000.0)),
        "rope_scaling": {"rope_type": "linear", "factor": factor} if factor != 1.0 else None,
    }


# --- how layers are stacked --------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """`count` equal layers in a row inside one period."""

    spec: LayerSpec
    count: int


@dataclass(frozen=True)
class Segment:
    """`repeats` copies of a period of runs, from layer `first` on.

    All layers of one kind in a segment are equal, so a segment holds one stack per kind.
    """

    first: int
    runs: tuple[Run, ...]
    repeats: int

    @property
    def period(self) -> int:
        """Layers in one period."""
        return sum(run.count for run in self.runs)

    @property
    def num_layers(self) -> int:
        """Layers in the segment."""
        return self.period * self.repeats

    def per_period(self, kind: Kind) -> int:
        """Layers of `kind` in one period."""
        return sum(run.count for run in self.runs if run.spec.kind == kind)

    @functools.cached_property
    def specs(self) -> dict[Kind, LayerSpec]:
        """The spec of each kind in the segment, in order of appearance."""
        return {run.spec.kind: run.spec for run in self.runs}


@dataclass(frozen=True)
class Location:
    """Where a layer lies: row `row` of the stack of `kind` in segment `segment`."""

    segment: int
    kind: Kind
    row: int


@dataclass(frozen=True)
class StackPlan:
    """Layers as segments of a repeated period: with the fewest layer bodies to compile."""

    layers: tuple[LayerSpec, ...]
    segments: tuple[Segment, ...]

    @classmethod
    @functools.cache
    def of(cls, layers: tuple[LayerSpec, ...]) -> "StackPlan":
        """Plan any sequence of layers (dynamic programming over where the next segment ends)."""
        best: dict[int, tuple[tuple[int, int], tuple[Segment, ...]]] = {len(layers): ((0, 0), ())}
        for first in reversed(range(len(layers))):
            options = []
            for runs, repeats in _periods(layers, first):
                segment = Segment(first, runs, repeats)
                (bodies, count), rest = best[first + segment.num_layers]
                options.append(((bodies + len(runs), count + 1), (segment, *rest)))
            best[first] = min(options, key=lambda option: (option[0], -option[1][0].num_layers))
        return cls(layers, best[0][1])

    def locate(self, layer: int) -> Location:
        """Return where layer `layer` lies."""
        for index, segment in enumerate(self.segments):
            offset = layer - segment.first
            if 0 <= offset < segment.num_layers:
                kind = self.layers[layer].kind
                before = self.layers[segment.first : layer]
                return Location(index, kind, sum(spec.kind == kind for spec in before))
        raise IndexError(f"layer {layer} of {len(self.layers)}")

    def donor(self, layer: int) -> int:
        """Return the layer whose keys and values layer `layer` reads: itself if it owns them."""
        kind = self.layers[layer].kind
        for i in range(layer, -1, -1):
            if self.layers[i].owns_kv and self.layers[i].kind == kind:
                return i
        raise ValueError(f"layer {layer} owns no K/V and no {kind} layer before it does")

    def cache_row(self, layer: int) -> int:
        """Return the row of `layer`'s donor in the stacked cache of its kind."""
        donor = self.donor(layer)
        kind = self.layers[donor].kind
        return sum(spec.kind == kind and spec.owns_kv for spec in self.layers[:donor])

    def cache_rows(self, kind: Kind) -> int:
        """Return how many layers of `kind` own keys and values."""
        return sum(spec.kind == kind and spec.owns_kv for spec in self.layers)


def _periods(layers: tuple[LayerSpec, ...], first: int):
    """Yield (runs, repeats) of each segment that may start at `first`."""
    rest = layers[first:]
    for length in range(1, len(rest) + 1):
        period = rest[:length]
        if len({spec.kind for spec in period}) != len(set(period)):
            return  # a kind with two specs: it needs another segment
        runs: list[Run] = []
        for spec in period:
            if runs and runs[-1].spec == spec:
                runs[-1] = replace(runs[-1], count=runs[-1].count + 1)
            else:
                runs.append(Run(spec, 1))
        repeats = 1
        while rest[repeats * length : (repeats + 1) * length] == period:
            repeats += 1
        yield tuple(runs), repeats
