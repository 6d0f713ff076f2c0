"""Adapters in peft's layout: adapter_config.json and adapter_model.safetensors, in and out.

What gemlax adds, the digests of the base and each module's dropout, lies beside them in a file that
peft does not read. A file is never trusted: names, shapes and patterns are checked.
Source: peft 0.21.2, tuners/lora/config.py and utils/save_and_load.py.
"""

import collections
import logging
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemlax.adapters.attach import adapter_of, detach, put, read
from gemlax.adapters.fingerprint import differs, fingerprint
from gemlax.adapters.folders import CONFIG, WEIGHTS, find_folder
from gemlax.adapters.names import PREFIXES, ROOT, is_encoder, modules
from gemlax.adapters.patterns import matcher
from gemlax.adapters.rules import Adapter, Base, Module, adaptable_modules
from gemlax.checkpoints.base import read_json, show
from gemlax.checkpoints.safetensors import read_tensors
from gemlax.checkpoints.save import new_folder, write_json, write_tensors
from gemlax.config import TextConfig
from gemlax.decoder import Decoder
from gemlax.errors import CheckpointError, Error, RequestError, UnsupportedError

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

OWN = "gemlax_adapter.json"
_VERSION = 1
# Keys of a config that are read, and those that say nothing about the result: how training began or
# saved memory, and where the base is. Any other key passes where it is off.
_READ = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora",
    "target_modules", "init_lora_weights", "modules_to_save", "exclude_modules",
    "layers_to_transform", "layers_pattern",
}  # fmt: skip
_IDLE = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "peft_version", "megatron_core", "megatron_config", "loftq_config", "qalora_group_size",
    "runtime_config", "eva_config", "ensure_weight_tying", "lora_ga_config", "corda_config",
    "velora_config", "unsloth_fixed", "unsloth_version",
    # peft turns it off, with a warning, for layers such as Gemma's.
    "fan_in_fan_out",
}  # fmt: skip
# These keep the base that was trained on as it was; others (pissa, olora, loftq) change it.
_INITS = (True, False, "gaussian", "eva", "orthogonal", None)
_SHOWN = 5


class Stored(NamedTuple):
    """An adapter as it was read: the record, (A, B) by module, and the digests of its base."""

    source: Path
    adapter: Adapter
    values: dict[str, tuple[np.ndarray, np.ndarray]]
    base: dict[str, Any]


def save(
    decoder: Decoder, folder: str | Path, *, multimodal: bool | None = None, overwrite: bool = False
) -> None:
    """Write the adapter of a decoder as a folder that peft and `restore` read; all or nothing.

    Args:
        decoder: its base must be the one that the adapter was trained on.
        folder: a new or empty folder whose parent exists.
        multimodal: name the modules as in a model that has encoders, too; None: as the checkpoint
            has them that the decoder was loaded from. peft and vLLM apply nothing of other names.
        overwrite: replace a folder that holds an adapter.

    Raises:
        RequestError: the decoder has no adapter.
        FileExistsError: `folder` is not empty, unless `overwrite`.
        OSError: it cannot be written; nothing is left behind.
    """
    adapter = adapter_of(decoder)
    base = Base() if decoder.base is None else decoder.base
    prefix = PREFIXES[0 if (base.multimodal if multimodal is None else multimodal) else 2]
    tensors = {}
    for module, a, b in read(decoder):
        tensors[f"{ROOT}{prefix}{module.name}.lora_A.weight"] = a
        tensors[f"{ROOT}{prefix}{module.name}.lora_B.weight"] = b
    dropout = {module.name: module.dropout for module in adapter}
    extra = {"version": _VERSION, "base": fingerprint(decoder), "dropout": dropout}
    with new_folder(folder, marker=CONFIG, overwrite=overwrite) as part:
        write_tensors(part / WEIGHTS, tensors)
        write_json(part / CONFIG, _config(adapter, decoder.config, prefix, base.name))
        write_json(part / OWN, extra)


def _config(adapter: Adapter, config: TextConfig, prefix: str, base: str | None) -> dict[str, Any]:
    """Return what adapter_config.json says."""
    ranks = {prefix + m.name: m.rank for m in adapter}
    alphas = {
        prefix + m.name: int(m.alpha) if m.alpha == int(m.alpha) else m.alpha for m in adapter
    }
    rank, alpha = (
        collections.Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas)
    )
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "auto_mapping": None,
        "base_model_name_or_path": base, "revision": None, "r": rank, "lora_alpha": alpha,
        "lora_dropout": max(module.dropout for module in adapter),
        "use_rslora": adapter.rslora, "use_dora": False, "bias": "none", "fan_in_fan_out": False,
        "init_lora_weights": True, "modules_to_save": None, "layers_to_transform": None,
        "layers_pattern": None, "target_modules": _targets(adapter, config, prefix),
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "inference_mode": True,
    }  # fmt: skip


def _targets(adapter: Adapter, config: TextConfig, prefix: str) -> list[str]:
    """Return short names where all modules of a name are adapted, else every module's own.

    In a model with encoders a short name would fit their layers too.
    """
    names = {module.name for module in adapter}
    short = sorted({name.rpartition(".")[2] for name in names})
    fitted = {name for name in adaptable_modules(config) if name.rpartition(".")[2] in short}
    if fitted == names and prefix == "model.":
        return short
    return [prefix + module.name for module in adapter]


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
    put(decoder, [(stored.adapter, stored.values)], dtype=dtype)
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
    theirs, ours = ({(m.name, m.rank, m.alpha) for m in each} for each in (stored.adapter, has))
    if theirs != ours or stored.adapter.rslora != has.rslora:
        first = min(theirs ^ ours, default="use_rslora")
        raise RequestError(
            f"{stored.source} is not what the decoder's adapter is: they differ in {first} "
            "(name, rank, alpha); attach the same rules, or detach it before"
        )


def read_folder(folder: str | Path, config: TextConfig) -> Stored:
    """Read and check a folder; see `restore` for the errors."""
    folder = find_folder(folder)
    said = read_json(folder / CONFIG)
    _check_config(said, folder / CONFIG)
    extra = read_json(folder / OWN) if (folder / OWN).is_file() else {}
    prefix, values = modules(read_tensors(folder / WEIGHTS), config, folder / WEIGHTS)
    is_target = _target(said, prefix, folder / CONFIG)
    aside = [name for name in values if not is_target(name)]
    if len(aside) == len(values):
        raise CheckpointError(f"{folder / WEIGHTS} holds no module that {CONFIG} names")
    if aside:
        _log.warning(
            "%s: left aside %d modules that %s does not name, as peft does: %s",
            folder, len(aside), CONFIG, ", ".join(aside[:_SHOWN]),
        )  # fmt: skip
        values = {name: pair for name, pair in values.items() if name not in aside}
    if isinstance(said.get("target_modules"), list):
        _check_whole(
            values, [name for name in adaptable_modules(config) if is_target(name)], folder
        )
    alpha_of = _patterns(said, "alpha_pattern", "lora_alpha", folder / CONFIG)
    rank_of = _patterns(said, "rank_pattern", "r", folder / CONFIG)
    dropouts = extra.get("dropout", {})
    adapted = []
    for name, (a, b) in values.items():
        rank, alpha = rank_of(prefix + name), float(alpha_of(prefix + name))
        if a.shape[0] != rank:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {name} has rank {a.shape[0]}, but {CONFIG} says {rank:g}"
            )
        rate = dropouts.get(name, said.get("lora_dropout") or 0.0)
        shape = (b.shape[0], a.shape[1])
        adapted.append(Module(name, a.shape[0], alpha, float(rate), shape))
    adapter = Adapter(tuple(adapted), bool(said.get("use_rslora")))
    return Stored(folder, adapter, values, extra.get("base", {}))


def updates(stored: Stored) -> Callable[[str], np.ndarray | None]:
    """Return what gives the update to a weight by canonical name, or None where there is none."""
    scales = {f"{m.name}.weight": np.float32(stored.adapter.scale(m)) for m in stored.adapter}

    def update(name: str) -> np.ndarray | None:
        if name not in scales:
            return None
        a, b = stored.values[name.removesuffix(".weight")]
        return b @ a * scales[name]

    return update


def _check_config(said: Mapping[str, Any], path: Path) -> None:
    """Refuse what would make another result than A and B do."""
    if said.get("peft_type") != "LORA":
        raise UnsupportedError(f"{path}: peft_type is {said.get('peft_type')!r}; only LORA is read")
    wrong = {key: value for key, value in said.items() if key not in _READ | _IDLE and value}
    if wrong.get("bias") == "none":
        del wrong["bias"]
    if said.get("init_lora_weights", True) not in _INITS:
        wrong["init_lora_weights"] = said["init_lora_weights"]
    _check_saved(said.get("modules_to_save") or [], path)
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


def _check_saved(names: Any, path: Path) -> None:
    """Refuse whole modules that were trained beside A and B, but those of encoders."""
    listed = names if isinstance(names, list) else [names]
    in_text = [str(name) for name in listed if not is_encoder(str(name))]
    if in_text:
        raise UnsupportedError(
            f"{path}: modules_to_save={show(repr(in_text))}: whole modules were trained beside "
            "LoRA, which gemlax does not apply; merge them into the base with peft "
            "(merge_and_unload, then save_pretrained) and load the result"
        )


def _patterns(said: Mapping[str, Any], key: str, otherwise: str, path: Path) -> Any:
    """Return what gives the value of a module by its full name, as peft matches patterns."""
    patterns = said.get(key) or {}
    if not isinstance(patterns, Mapping):
        raise CheckpointError(f"{path}: {key} must be an object, got {patterns!r}")
    fits = []
    for pattern, value in patterns.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise CheckpointError(f"{path}: {key} of {show(pattern)} is {value!r}, not positive")
        fits.append((_matcher(pattern, key, path), value))
    return lambda name: next((v for fit, v in fits if fit(name)), said[otherwise])


def _matcher(pattern: str, key: str, path: Path) -> Callable[[str], bool]:
    try:
        return matcher(pattern)
    except Error as error:
        raise type(error)(f"{path}: {key} has the pattern {show(pattern)}: {error}") from error


def _target(said: Mapping[str, Any], prefix: str, path: Path) -> Callable[[str], bool]:
    """Return what tells whether a config applies to a module, by canonical name.

    Targets that are a pattern are not asked: the file holds what it fitted.
    Source: peft 0.21.2, tuners/tuners_utils.py, check_target_module_exists.
    """
    targets, excluded = (_listed(said, k, str, path) for k in ("target_modules", "exclude_modules"))
    layers = _listed(said, "layers_to_transform", int, path)
    stacks = _listed(said, "layers_pattern", str, path)
    in_stack = not stacks or any(
        _matcher(one, "layers_pattern", path)(f"{prefix}layers") for one in stacks
    )
    is_pattern = isinstance(said.get("exclude_modules"), str)
    excludes = _matcher(f"^(?:{excluded[0]})", "exclude_modules", path) if is_pattern else None

    def ends(name: str, listed: list[Any]) -> bool:
        # The config may be for another layout than the file.
        return any(f".{p}{name}".endswith(f".{one}") for p in PREFIXES for one in listed)

    def is_target(name: str) -> bool:
        if excludes(prefix + name) if excludes else ends(name, excluded):
            return False
        if prefix + name in targets:
            return True
        layer = re.match(r"layers\.(\d+)\.", name)
        if layers and not (in_stack and layer and int(layer[1]) in layers):
            return False
        return not isinstance(said.get("target_modules"), list) or ends(name, targets)

    return is_target


def _listed(said: Mapping[str, Any], key: str, kind: type, path: Path) -> list[Any]:
    """Return what a key lists; one by itself is a list of it."""
    value = said.get(key)
    listed = value if isinstance(value, list) else [] if value is None else [value]
    for one in listed:
        if not isinstance(one, kind) or isinstance(one, bool):
            raise CheckpointError(f"{path}: {key} must list {kind.__name__}, got {show(repr(one))}")
    return listed


def _check_whole(values: Mapping[str, Any], meant: list[str], path: Path) -> None:
    """Compare what is there with what the targets name: a part of an adapter is not one."""
    lacking = [name for name in meant if name not in values]
    if lacking:
        shown = ", ".join(lacking[:_SHOWN])
        raise CheckpointError(
            f"{path / WEIGHTS} lacks {len(lacking)} of the {len(meant)} modules that {CONFIG} "
            f"names: {shown}"
        )
