"""Google's own Orbax folders: flat as published, or nested as the gemma library saves them.

The folder has no config: it is a published size, told by its shapes, or there is a config.json
in it. Arrays are restored one at a time. `orbax` is imported only when such a folder is opened.
Source: google-deepmind/gemma, gm/ckpts/_checkpoint.py (FLAT and NESTED) and _compat.py.
"""

import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemlax.checkpoints.base import (
    FLOATS,
    Checkpoint,
    Piece,
    Ranges,
    Tensor,
    cast,
    fit_vocab,
    read_json,
    resolve_config,
    show,
)
from gemlax.config import GemmaConfig, from_hf
from gemlax.errors import CheckpointError, UnsupportedError
from gemlax.names import Weight, from_orbax, resolve
from gemlax.presets import PRESETS, preset
from gemlax.tokenizer import Tokenizer, find_tokenizer

__all__ = ["MARKERS", "OrbaxCheckpoint"]

MARKERS = {"_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt"}
TABLE = "embedder/input_embedding"
# What may stand before the names of the table. Source: transformers convert_gemma3_weights.py.
PREFIXES = ("rlx_networks/policy_network/", "transformer/")
# Source: the same, and convert_gemma4_weights.py.
OTHER_PARTS = (
    "SigLiPFromPatches_", "PatchInputVariablePoolingEncoder_", "vision_encoder/", "embedder/mm_",
    "AudioEncoder/", "audio_encoder/", "embedder/audio_",
)  # fmt: skip
STACKED = "stacked_layers/"
# The types that are read, as NumPy and as the other formats call them.
_TYPES = {dtype.name: name for name, dtype in FLOATS.items() if name != "F64"}

KeyPath = tuple[str, ...]


class OrbaxCheckpoint(Checkpoint):
    """A folder that orbax wrote."""

    _types = frozenset(_TYPES.values())
    _other_parts = OTHER_PARTS

    def __init__(self, folder: Path):
        self.source = folder
        self.generation_config = {}
        self._orbax, self._checkpointer = _import_orbax()
        self._kept: tuple[str, np.ndarray] | None = None
        leaves = list(_leaves(self._metadata()))
        self._paths: dict[str, KeyPath] = {name: path for name, path, _ in leaves}
        if len(self._paths) != len(leaves):
            raise CheckpointError(f"{folder} holds two trees of weights; expected one")
        self._tensors = {
            name: Tensor(_TYPES.get(str(info.dtype), str(info.dtype)), tuple(info.shape))
            for name, _, info in leaves
        }
        self.config = self._find_config()
        self._set_aside()
        self.stored_dtype = next(str(info.dtype) for name, _, info in leaves if name == TABLE)

    def _metadata(self) -> Mapping[str, Any]:
        try:
            tree = self._checkpointer.metadata(self.source).item_metadata.tree
        except Exception as error:  # orbax and tensorstore raise all kinds
            raise CheckpointError(f"{self.source}: orbax cannot read it: {error}") from error
        if not isinstance(tree, Mapping):
            raise CheckpointError(f"{self.source} holds a {type(tree).__name__}; expected a tree")
        return tree

    def _find_config(self) -> GemmaConfig:
        table = self._tensors[TABLE].shape if TABLE in self._tensors else ()
        if len(table) != 2:
            raise CheckpointError(
                f"{self.source} has no [vocabulary, hidden] {TABLE}; it holds "
                f"{', '.join(map(show, list(self._tensors)[:5])) or 'no arrays'}"
            )
        if any(name.startswith(STACKED) for name in self._tensors):
            raise UnsupportedError(
                f"{self.source} holds its layers stacked ({STACKED}...); only layouts with one "
                "tree for each layer (layer_0, layer_1, ...) are read"
            )
        rows, hidden = table
        numbers = [re.match(r"layer_(\d+)/", name) for name in self._tensors]
        layers = max((int(number[1]) + 1 for number in numbers if number), default=0)
        path = self.source / "config.json"
        if path.exists():
            config = read_json(path)
            resolved = resolve_config(
                lambda: from_hf(config),
                layers=config.get("num_hidden_layers"),
                tensors=len(self._tensors),
                source=path,
            )
            if not resolved.text.tie_word_embeddings:
                raise UnsupportedError(
                    f"{path} says tie_word_embeddings false, but Google's layout holds no head: "
                    f"{TABLE} makes the logits, too; set it to true, or leave it out"
                )
            return fit_vocab(resolved, rows)
        fitting = [
            config
            for config in map(preset, PRESETS)
            if (config.text.hidden_size, config.text.num_hidden_layers) == (hidden, layers)
        ]
        if fitting:  # 12B is as wide and as deep in both families
            return fit_vocab(max(fitting, key=self._count_known), rows)
        raise UnsupportedError(
            f"{self.source}: {layers} layers over a table of {list(table)} are no published size "
            f"({', '.join(PRESETS)}); put the model's Hugging Face config.json into the folder"
        )

    def _count_known(self, config: GemmaConfig) -> int:
        return sum(weight.orbax in self._tensors for weight in resolve(config.text).values())

    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer of the folder or, as Kaggle lays it out, of the folder above."""
        return find_tokenizer(self.source) or find_tokenizer(self.source.parent)

    def close(self) -> None:
        """Let go of the array kept for the next read."""
        self._kept = None
        self._checkpointer.close()

    def _stored_name(self, weight: Weight) -> str:
        return weight.orbax

    def _pieces(self, weight: Weight) -> list[Piece]:
        return [Piece(weight.orbax, weight.orbax_shape)]

    def _ranges(self, piece: Piece, tensor: Tensor, weight: Weight) -> Ranges:
        raise NotImplementedError("orbax gives whole arrays")

    def _fill(self, weight: Weight, out: np.ndarray) -> None:
        (piece,) = self._pieces(weight)
        self._find(piece)
        stored = self._restore(piece.tensor, keep=weight.part == 0)
        cast(out.reshape(weight.split_shape), from_orbax(stored, weight), piece.tensor)

    def _restore(self, name: str, keep: bool) -> np.ndarray:
        """Read one array; the first of a stacked pair is kept, since the second comes next."""
        if self._kept and self._kept[0] == name:
            stored = self._kept[1]
        else:
            self._kept = None
            stored = self._read(self._paths[name])
        self._kept = (name, stored) if keep else None
        return stored

    def _read(self, path: KeyPath) -> np.ndarray:
        args = self._orbax.RestoreArgs(restore_type=np.ndarray)
        item: Any = 0
        restore_args: Any = args
        for key in reversed(path):
            item, restore_args = {key: item}, {key: restore_args}
        partial = self._orbax.args.PyTreeRestore(
            item=item, restore_args=restore_args, partial_restore=True
        )
        try:
            found = self._checkpointer.restore(self.source, args=partial)
        except Exception as error:  # orbax and tensorstore raise all kinds
            raise CheckpointError(
                f"{self.source}: orbax cannot read {'/'.join(path)}: {error}"
            ) from error
        for key in path:
            found = found[key]
        return found


def _import_orbax() -> tuple[Any, Any]:
    try:
        orbax = importlib.import_module("orbax.checkpoint")
    except ImportError as error:
        raise UnsupportedError(
            "reading an Orbax checkpoint needs orbax-checkpoint: pip install 'gemlax[orbax]'"
        ) from error
    return orbax, orbax.PyTreeCheckpointer()


def _leaves(tree: Mapping[str, Any], above: KeyPath = ()) -> Iterator[tuple[str, KeyPath, Any]]:
    """Yield name as in the table, path in the tree, and what orbax says of every array."""
    for key, value in tree.items():
        path = (*above, str(key))
        if isinstance(value, Mapping):
            yield from _leaves(value, path)
        else:
            name = "/".join(path)
            for prefix in PREFIXES:
                name = name.removeprefix(prefix)
            # Gemma 3 has `_query_norm`, Gemma 4 `query_norm`.
            yield name.removesuffix("/w").replace("/attn/_", "/attn/"), path, value
