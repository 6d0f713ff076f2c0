"""Adapters in peft's layout: adapter_config.json and adapter_model.safetensors, in and out.

What gemlax adds, the digests of the base and each module's dropout, lies beside them in a file that
peft does not read. A file is never trusted: names, shapes and patterns are checked.
Source: peft 0.21.2, tuners/lora/config.py and utils/save_and_load.py.
"""

import collections
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemlax.adapters.attach import adapter_of, detach, put, read
from gemlax.adapters.fingerprint import differs, fingerprint
from gemlax.adapters.rules import Adapter, Module, adaptable
from gemlax.checkpoints import find_adapter, text_weights
from gemlax.checkpoints.base import read_json, show
from gemlax.checkpoints.names import unused
from gemlax.checkpoints.safetensors import OTHER_PARTS, read_tensors
from gemlax.checkpoints.save import new_folder, write_json, write_tensors
from gemlax.config import TextConfig
from gemlax.decoder import Decoder
from gemlax.errors import CheckpointError, RequestError, UnsupportedError

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "Stored",
    "check_same_base",
    "read_folder",
    "restore",
    "save",
    "updates",
]

_log = logging.getLogger(__name__)

CONFIG, WEIGHTS, OWN = "adapter_config.json", "adapter_model.safetensors", "gemlax_adapter.json"
_VERSION = 1
_ROOT = "base_model.model."
# Where the text decoder's modules lie: in a multimodal model, as older versions wrote it, in a
# text-only one, and bare. The longest that fits counts.
_PREFIXES = ("model.language_model.", "language_model.model.", "model.", "")
_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(\.default)?\.weight")
# Keys of a config that say nothing about the result, or that are read below.
_READ = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora",
    "target_modules", "init_lora_weights", "fan_in_fan_out", "bias",
}  # fmt: skip
_IDLE = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "peft_version", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core",
    "loftq_config", "qalora_group_size", "runtime_config", "eva_config", "ensure_weight_tying",
    "lora_ga_config", "corda_config",
}  # fmt: skip
# These keep the base that was trained on as it was; others (pissa, olora, loftq) change it.
_INITS = (True, False, "gaussian", "eva", "orthogonal", None)
# What a pattern of names may hold: no repeated groups, which take exponential time.
_PATTERN = re.compile(r"(?:\w|-|\\\.|\.\*|\.|\\d\+|\(|\)|\||\^|\$|\[\d+-?\d*\])*")
_MAX_PATTERN = 200
_SHOWN = 5


class Stored(NamedTuple):
    """An adapter as it was read: the record, (A, B) by module, and the digests of its base."""

    source: Path
    adapter: Adapter
    values: dict[str, tuple[np.ndarray, np.ndarray]]
    base: dict[str, Any]


# --- out ---------------------------------------------------------------------------------------


def save(
    decoder: Decoder, folder: str | Path, *, multimodal: bool = False, overwrite: bool = False
) -> None:
    """Write the adapter of a decoder as a folder that peft and `restore` read; all or nothing.

    Args:
        decoder: its base must be the one that the adapter was trained on.
        folder: a new or empty folder whose parent exists.
        multimodal: name the modules as in a model that has encoders, too.
        overwrite: replace a folder that holds an adapter.

    Raises:
        RequestError: the decoder has no adapter.
        FileExistsError: `folder` is not empty, unless `overwrite`.
        OSError: it cannot be written; nothing is left behind.
    """
    adapter = adapter_of(decoder)
    prefix = _PREFIXES[0 if multimodal else 2]
    tensors = {}
    for module, a, b in read(decoder):
        tensors[f"{_ROOT}{prefix}{module.name}.lora_A.weight"] = a
        tensors[f"{_ROOT}{prefix}{module.name}.lora_B.weight"] = b
    own = {
        "version": _VERSION,
        "base": fingerprint(decoder),
        "dropout": {module.name: module.dropout for module in adapter},
    }
    with new_folder(folder, marker=CONFIG, overwrite=overwrite) as part:
        write_tensors(part / WEIGHTS, tensors)
        write_json(part / CONFIG, _config(adapter, decoder.config, prefix))
        write_json(part / OWN, own)


def _config(adapter: Adapter, config: TextConfig, prefix: str) -> dict[str, Any]:
    """Return what adapter_config.json says."""
    rank = _most(module.rank for module in adapter)
    alpha = _most(module.alpha for module in adapter)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": max(module.dropout for module in adapter),
        "use_rslora": adapter.rslora,
        "bias": "none",
        "target_modules": _targets(adapter, config, prefix),
        "rank_pattern": {prefix + m.name: m.rank for m in adapter if m.rank != rank},
        "alpha_pattern": {prefix + m.name: _plain(m.alpha) for m in adapter if m.alpha != alpha},
        "inference_mode": True,
    }


def _most(values: Iterable[Any]) -> Any:
    return collections.Counter(values).most_common(1)[0][0]


def _plain(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha


def _targets(adapter: Adapter, config: TextConfig, prefix: str) -> list[str]:
    """Return short names where all modules of a name are adapted, else every module's own.

    In a model with encoders a short name would fit their layers too.
    """
    own = {module.name for module in adapter}
    short = sorted({name.rpartition(".")[2] for name in own})
    meant = {n for n in adaptable(config) if n.rpartition(".")[2] in short}
    if meant == own and prefix == "model.":
        return short
    return [prefix + module.name for module in adapter]


# --- in ----------------------------------------------------------------------------------------


def restore(
    decoder: Decoder,
    folder: str | Path,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    dtype: Any = np.float32,
    check_base: bool = True,
) -> Adapter:
    """Put the adapter of a folder on a decoder, in place of the one it has; say what it changes.

    Args:
        decoder: if it has an adapter, that must change the same modules alike.
        folder: as peft or `save` wrote it.
        rank, alpha: what every module must have; None: whatever the folder says.
        dtype: of A and B, float32 or bfloat16.
        check_base: compare the base with the one the adapter was made on, where the folder says.

    Raises:
        FileNotFoundError: no adapter there.
        CheckpointError: a damaged folder, or tensors that do not fit the decoder.
        UnsupportedError: another kind of adapter, or one of experts or encoders.
        RequestError: another rank or alpha than was asked for, or another base.
    """
    stored = read_folder(folder, decoder.config)
    check_wanted(stored, rank, alpha)
    if check_base:
        check_same_base(stored, decoder)
    if decoder.adapter is not None:
        _check_same(stored, decoder.adapter)
        detach(decoder)
    put(decoder, stored.adapter, stored.values, dtype=dtype)
    return stored.adapter


def check_wanted(stored: Stored, rank: int | None, alpha: float | None) -> None:
    """Compare ranks and alphas with what was asked for."""
    for module in stored.adapter:
        for what, wanted, got in (("rank", rank, module.rank), ("alpha", alpha, module.alpha)):
            if wanted is not None and wanted != got:
                raise RequestError(
                    f"{stored.source}: {module.name} has {what} {got:g}, not {wanted:g}; leave "
                    f"{what} out to take what the adapter has"
                )


def check_same_base(stored: Stored, decoder: Decoder) -> None:
    """Compare the decoder with the base that an adapter was made on, where that is known."""
    if stored.base and differs(fingerprint(decoder), stored.base):
        raise RequestError(
            f"{stored.source} was trained on another base: its weights are not those of this "
            "model; load the base it was made for, or pass check_base=False"
        )


def _check_same(stored: Stored, has: Adapter) -> None:
    theirs = {(m.name, m.rank, m.alpha) for m in stored.adapter}
    ours = {(m.name, m.rank, m.alpha) for m in has}
    if theirs != ours or stored.adapter.rslora != has.rslora:
        differ = sorted(theirs ^ ours)
        first = differ[0] if differ else "use_rslora"
        raise RequestError(
            f"{stored.source} is not what the decoder's adapter is: they differ in {first} "
            "(name, rank, alpha); attach the same rules, or detach it before"
        )


def read_folder(folder: str | Path, config: TextConfig) -> Stored:
    """Read and check a folder; see `restore` for the errors."""
    folder = find_adapter(folder)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"no adapter at {folder}: {' and '.join(missing)} missing; expected a folder that peft "
            "or gemlax wrote"
        )
    said = read_json(folder / CONFIG)
    _check_config(said, folder / CONFIG)
    own = read_json(folder / OWN) if (folder / OWN).is_file() else {}
    prefix, values = _values(read_tensors(folder / WEIGHTS), config, folder / WEIGHTS)
    _check_targets(said, prefix, values, config, folder)
    alpha_of = _patterns(said, "alpha_pattern", "lora_alpha", folder / CONFIG)
    rank_of = _patterns(said, "rank_pattern", "r", folder / CONFIG)
    dropouts = own.get("dropout", {})
    modules = []
    for name, (a, b) in values.items():
        rank, alpha = rank_of(prefix + name), float(alpha_of(prefix + name))
        if a.shape[0] != rank:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {name} has rank {a.shape[0]}, but {CONFIG} says {rank:g}"
            )
        rate = dropouts.get(name, said.get("lora_dropout") or 0.0)
        shape = (b.shape[0], a.shape[1])
        modules.append(Module(name, a.shape[0], alpha, float(rate), shape))
    adapter = Adapter(tuple(modules), bool(said.get("use_rslora")))
    return Stored(folder, adapter, values, own.get("base", {}))


def updates(stored: Stored) -> Callable[[str], np.ndarray | None]:
    """Return what gives the update to a weight by canonical name, or None where there is none."""
    modules = {f"{module.name}.weight": module for module in stored.adapter}

    def update(name: str) -> np.ndarray | None:
        module = modules.get(name)
        if module is None:
            return None
        a, b = stored.values[module.name]
        return b @ a * np.float32(stored.adapter.scale(module))

    return update


def _check_config(said: Mapping[str, Any], path: Path) -> None:
    """Refuse what would make another result than A and B do."""
    if said.get("peft_type") != "LORA":
        raise UnsupportedError(f"{path}: peft_type is {said.get('peft_type')!r}; only LORA is read")
    wrong = {key: value for key, value in said.items() if key not in _READ | _IDLE and value}
    if said.get("bias", "none") != "none":
        wrong["bias"] = said["bias"]
    if said.get("fan_in_fan_out"):
        wrong["fan_in_fan_out"] = True
    if said.get("init_lora_weights", True) not in _INITS:
        wrong["init_lora_weights"] = said["init_lora_weights"]
    if wrong:
        listed = ", ".join(f"{show(key)}={show(repr(value))}" for key, value in wrong.items())
        raise UnsupportedError(
            f"{path}: {listed} is not supported: gemlax reads LoRA's A and B of the text decoder's "
            "projections, with rank_pattern, alpha_pattern and use_rslora"
        )
    for key in ("r", "lora_alpha"):
        value: Any = said.get(key)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise CheckpointError(f"{path}: {key} must be a positive number, got {value!r}")


def _patterns(said: Mapping[str, Any], key: str, otherwise: str, path: Path) -> Any:
    """Return what gives the value of a module by its full name, as peft matches patterns."""
    patterns = said.get(key) or {}
    if not isinstance(patterns, Mapping):
        raise CheckpointError(f"{path}: {key} must be an object, got {patterns!r}")
    compiled = []
    for pattern, value in patterns.items():
        if len(pattern) > _MAX_PATTERN or not _PATTERN.fullmatch(pattern):
            raise UnsupportedError(f"{path}: {key} has the pattern {show(pattern)}; too intricate")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise CheckpointError(f"{path}: {key} of {show(pattern)} is {value!r}, not positive")
        try:
            compiled.append((re.compile(rf"(.*\.)?({pattern})$"), value))
        except re.error as error:
            raise CheckpointError(f"{path}: {key} has {show(pattern)}: {error}") from error
    return lambda name: next((v for p, v in compiled if p.match(name)), said[otherwise])


def _values(
    tensors: Mapping[str, np.ndarray], config: TextConfig, path: Path
) -> tuple[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Return the prefix of the names, and A and B by canonical module, in layer order."""
    shapes = {n.removesuffix(".weight"): s for n, s in text_weights(config).items()}
    idle = {weight.name.removesuffix(".weight") for weight in unused(config)}
    named = {name: _NAME.fullmatch(name.removeprefix(_ROOT)) for name in tensors}
    bare = [found["module"] for found in named.values() if found]
    prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in bare)), "")
    parts: dict[str, dict[str, np.ndarray]] = {}
    others, aside = [], []
    for name, found in named.items():
        module = found["module"].removeprefix(prefix) if found else ""
        if found and module in adaptable(config):
            parts.setdefault(module, {})[found["part"]] = tensors[name].astype(np.float32)
        elif found and module in idle:
            aside.append(module)
        else:
            others.append(name)
    if others:
        _refuse(others, path)
    if aside:
        _log.info(
            "%s: left aside %d tensors of layers that read the K/V of another", path, len(aside)
        )
    values = {}
    for module in (module for module in shapes if module in parts):
        values[module] = _pair(module, parts[module], shapes[module], path)
    if not values:
        raise CheckpointError(f"{path} holds no tensor of an adapter")
    return prefix, values


def _pair(
    module: str, parts: Mapping[str, np.ndarray], shape: tuple[int, ...], path: Path
) -> tuple[np.ndarray, np.ndarray]:
    if len(parts) != 2:
        raise CheckpointError(f"{path}: {module} has only lora_{''.join(parts)}; A and B belong")
    a, b = parts["A"], parts["B"]
    fits = a.ndim == b.ndim == 2 and (b.shape[0], a.shape[1]) == shape and a.shape[0] == b.shape[1]
    if not fits or not a.shape[0]:
        raise CheckpointError(
            f"{path}: {module} is {list(shape)}, which A {list(a.shape)} and B {list(b.shape)} do "
            "not fit; the adapter is of another model"
        )
    for part, array in (("A", a), ("B", b)):
        if not np.isfinite(array).all():
            raise CheckpointError(f"{path}: lora_{part} of {module} has values that are not finite")
    return a, b


def _refuse(names: list[str], path: Path) -> None:
    """Say what tensors are that belong to no projection of the text decoder."""
    shown = ", ".join(show(name) for name in names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    bare = [name.removeprefix(_ROOT).removeprefix("model.") for name in names]
    known = (
        *OTHER_PARTS,
        "lora_magnitude",
        "lora_embedding",
        ".experts.",
        "router.",
        "embed_tokens",
        "lm_head",
    )
    if any(part in name for name in bare for part in known):
        raise UnsupportedError(
            f"{path} holds {shown}{more}: adapters of experts, routers, tables, heads and "
            "encoders, and DoRA, are not supported"
        )
    raise CheckpointError(
        f"{path} holds {shown}{more}, which is no projection of this model; is it its base?"
    )


def _check_targets(
    said: Mapping[str, Any], prefix: str, values: Mapping[str, Any], config: TextConfig, path: Path
) -> None:
    """Compare a plain list of targets with what is there: a part of an adapter is none."""
    targets = said.get("target_modules")
    chosen = ("layers_to_transform", "layers_pattern", "exclude_modules")
    if not isinstance(targets, list) or any(said.get(key) for key in chosen):
        return
    names = [str(target) for target in targets]
    meant = [
        name
        for name in adaptable(config)
        if any(f".{prefix}{name}".endswith(f".{target}") for target in names)
    ]
    lacking = [name for name in meant if name not in values]
    if lacking:
        shown = ", ".join(lacking[:_SHOWN])
        raise CheckpointError(
            f"{path / WEIGHTS} lacks {len(lacking)} of the {len(meant)} modules that {CONFIG} "
            f"names: {shown}"
        )
