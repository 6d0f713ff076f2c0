"""Checkpoints on disk, in every form Gemma is published in, as float arrays by canonical name.

`open_checkpoint` looks at what is there, not at what it is called. Each format is one file over the
skeleton of base.py. Nothing here knows jax, flax or how the decoder lays its weights out.
"""

from pathlib import Path

from gemlax.checkpoints.base import Checkpoint
from gemlax.checkpoints.convert import Converted, convert, generation_ids, write_tokenizer
from gemlax.checkpoints.find import DEMO, find, find_adapter, has_demo
from gemlax.checkpoints.gguf import GGUFCheckpoint
from gemlax.checkpoints.locate import find_gguf, locate
from gemlax.checkpoints.orbax import OrbaxCheckpoint
from gemlax.checkpoints.safetensors import SafetensorsCheckpoint
from gemlax.checkpoints.save import save_safetensors

__all__ = [
    "DEMO",
    "Checkpoint",
    "Converted",
    "convert",
    "find",
    "find_adapter",
    "find_gguf",
    "generation_ids",
    "has_demo",
    "open_checkpoint",
    "save_safetensors",
    "write_tokenizer",
]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hugging Face folder, a GGUF file or an Orbax folder; no weight is read yet.

    A file of a folder stands for the folder, and a folder for the one GGUF model in it.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        CheckpointError: it is none of the three, or it is damaged or incomplete.
        UnsupportedError: it is another model, or in a form that gemlax does not read.
    """
    place = locate(Path(path).expanduser())
    if place.form == "gguf":
        return GGUFCheckpoint(place.path)
    if place.form == "orbax":
        return OrbaxCheckpoint(place.path)
    return SafetensorsCheckpoint(place.path, place.file)
