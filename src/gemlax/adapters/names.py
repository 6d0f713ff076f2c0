"""From the names of a file's tensors to A and B of the text decoder's modules.

The names are peft's, with what wrappers and older versions put around them. What belongs to an
encoder is left aside, what else is no A or B of a projection is refused by name.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gemlax.adapters.rules import adaptable_modules
from gemlax.checkpoints.base import show
from gemlax.checkpoints.safetensors import OTHER_PARTS
from gemlax.config import TextConfig
from gemlax.errors import CheckpointError, UnsupportedError
from gemlax.names import text_weights, unused

__all__ = ["PREFIXES", "ROOT", "is_encoder", "modules"]

_log = logging.getLogger(__name__)

ROOT = "base_model.model."
# Where the text decoder's modules lie: in a multimodal model, as older versions wrote it, in a
# text-only one, and bare. The longest that fits counts.
PREFIXES = ("model.language_model.", "language_model.model.", "model.", "")
_ENCODERS = tuple(part for part in OTHER_PARTS if part != "assistant.")
# What torch.compile, FSDP, DDP and gradient checkpointing put into a name.
_WRAPPERS = re.compile(
    r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|(?<![^.])module)\."
)
_NAME = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>[AB])(?:\.(?P<adapter>(?!bias$)[^.]+?))??(?:\.weight)?"
)
# What else a file may hold, what it is, and what to do.
_OTHERS = {
    r".*lora_magnitude_vector.*": "DoRA",
    r".*lora_[AB](\.\w+)?\.bias": "biases of LoRA (lora_bias)",
    r".*\.experts\b.*": "adapters of experts",
    r".*\brouter\..*": "adapters of routers",
    r".*(lora_embedding_[AB]|(embed_tokens|embed_tokens_per_layer|lm_head)\.(\w+\.)*lora_[AB]).*":
        "adapters of embeddings",
    r".*(embed_tokens|lm_head)\b.*": "whole tables of embeddings",
    r".*\.lora_[ab]": "names as mlx-lm writes them",
    r".*norm.*": "whole norms",
    r".*\.bias": "biases",
}  # fmt: skip
_MERGE = "; merge it into its base with peft (merge_and_unload, save_pretrained) and load that"
_SHOWN = 5


class _Part(NamedTuple):
    module: str  # with the prefix
    part: str
    adapter: str | None


def modules(
    tensors: Mapping[str, np.ndarray], config: TextConfig, path: Path
) -> tuple[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Return the prefix of the names, and A and B by canonical module, in layer order."""
    shapes = {n.removesuffix(".weight"): s for n, s in text_weights(config).items()}
    idle = {weight.name.removesuffix(".weight") for weight in unused(config)}
    named = {name: _bare(name) for name in tensors}
    encoders = [name for name, bare in named.items() if is_encoder(bare)]
    parts_by_name = {name: _part(bare) for name, bare in named.items() if not is_encoder(bare)}
    bare = [part.module for part in parts_by_name.values() if part]
    prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in bare)), "")
    parts: dict[str, dict[str, np.ndarray]] = {}
    others, aside = [], []
    for name, part in parts_by_name.items():
        module = part.module.removeprefix(prefix) if part else ""
        if part and module in adaptable_modules(config):
            if part.part in parts.setdefault(module, {}):
                raise _several(parts_by_name.values(), path)
            parts[module][part.part] = tensors[name].astype(np.float32)
        elif part and module in idle:
            aside.append(module)
        else:
            others.append(name)
    if others:
        _refuse(others, path)
    _tell(encoders, aside, path, bool(parts))
    values = {}
    for module in (module for module in shapes if module in parts):
        values[module] = _pair(module, parts[module], shapes[module], path)
    if not values:
        raise CheckpointError(f"{path} holds no tensor of an adapter")
    return prefix, values


def is_encoder(name: str) -> bool:
    """Tell whether a name is of an encoder, or of what joins one to the decoder."""
    return f"{name.removeprefix(ROOT).removeprefix('model.')}.".startswith(_ENCODERS)


def _bare(name: str) -> str:
    """Return a name without what peft and wrappers put in front of it or into it."""
    name = _WRAPPERS.sub("", name)
    while name.startswith(ROOT):
        name = name.removeprefix(ROOT)
    return name


def _part(name: str) -> _Part | None:
    match = _NAME.fullmatch(name)
    return _Part(match["module"], match["part"], match["adapter"]) if match else None


def _several(parts: Iterable[_Part | None], path: Path) -> CheckpointError:
    names = sorted({part.adapter or "one without a name" for part in parts if part})
    return CheckpointError(
        f"{path} holds a module twice, of the adapters {', '.join(map(show, names[:_SHOWN]))}: "
        "save one of them by itself"
    )


def _tell(encoders: list[str], idle: list[str], path: Path, has_text: bool) -> None:
    """Say what is left aside; refuse an adapter that has nothing else."""
    if encoders:
        towers = sorted({_bare(name).removeprefix("model.").partition(".")[0] for name in encoders})
        if not has_text:
            raise UnsupportedError(
                f"{path} adapts {', '.join(towers)} alone: gemlax runs the text decoder, for which "
                "there is nothing"
            )
        _log.info(
            "%s: left aside %d tensors of %s, which gemlax does not run",
            path, len(encoders), ", ".join(towers),
        )  # fmt: skip
    if idle:
        _log.info(
            "%s: left aside %d tensors of layers that read the K/V of another", path, len(idle)
        )


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
    kinds = [
        what
        for pattern, what in _OTHERS.items()
        if any(len(name) < 500 and re.fullmatch(pattern, name) for name in names)
    ]
    if kinds:
        raise UnsupportedError(
            f"{path} holds {shown}{more}: {kinds[0]}, which gemlax does not apply beside LoRA of "
            f"the text decoder's projections{_MERGE}"
        )
    raise CheckpointError(
        f"{path} holds {shown}{more}, which is no projection of this model; is it its base?"
    )
