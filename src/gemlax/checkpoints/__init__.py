"""Checkpoints on disk, in every form Gemma is published in, as float arrays by canonical name.

`open_checkpoint` looks at what is there, not at names. Each format is one file; names.py is the
one table they share. Nothing here knows jax, flax or how the decoder lays its weights out.
"""

from pathlib import Path

from gemlax.checkpoints.base import Checkpoint
from gemlax.checkpoints.convert import Converted, convert, generation_ids, write_tokenizer
from gemlax.checkpoints.find import DEMO, find, has_demo
from gemlax.checkpoints.gguf import MAGIC, GGUFCheckpoint
from gemlax.checkpoints.names import text_weights
from gemlax.checkpoints.orbax import MARKERS, OrbaxCheckpoint
from gemlax.checkpoints.safetensors import INDEX, SafetensorsCheckpoint
from gemlax.checkpoints.save import save_safetensors
from gemlax.errors import CheckpointError

__all__ = [
    "DEMO",
    "Checkpoint",
    "Converted",
    "convert",
    "find",
    "generation_ids",
    "has_demo",
    "open_checkpoint",
    "save_safetensors",
    "text_weights",
    "write_tokenizer",
]

_FORMS = "a Hugging Face folder, a .gguf file or an Orbax folder"


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hugging Face folder, a GGUF file or an Orbax folder; no weight is read yet.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        CheckpointError: it is none of the three, or it is damaged or incomplete.
        UnsupportedError: it is another model, or in a form that gemlax does not read.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; expected {_FORMS}")
    with path.open("rb") as file:
        start = file.read(4)
    if start == MAGIC or path.suffix == ".gguf":
        return GGUFCheckpoint(path)
    hint = "; give the folder it is in" if path.suffix in (".safetensors", ".json") else ""
    raise CheckpointError(f"{path} is a file that begins with {start!r}; expected {_FORMS}{hint}")


def _open_folder(folder: Path) -> Checkpoint:
    names = {path.name for path in folder.iterdir()}
    if INDEX in names or any(name.endswith(".safetensors") for name in names):
        if "config.json" not in names:
            raise CheckpointError(f"{folder} has .safetensors files but no config.json; add it")
        return SafetensorsCheckpoint(folder)
    if names & MARKERS:
        return OrbaxCheckpoint(folder)
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if ggufs:
        raise CheckpointError(f"{folder} holds {', '.join(ggufs[:5])}; give the path of the file")
    inside = f"it holds {', '.join(sorted(names)[:5])}" if names else "it is empty"
    raise CheckpointError(f"{folder} is no checkpoint: {inside}; expected {_FORMS}")
