"""What a Gemma checkpoint is, resolved once from its config file into frozen data.

`layer` and `spec` hold the data, `plan` how layers are stacked; `hf` and `gguf` read the files.
"""

from gemlax.config.gguf import from_gguf
from gemlax.config.hf import edit, from_hf
from gemlax.config.layer import CHUNK, KINDS, Kind, LayerSpec, RopeSpec
from gemlax.config.plan import Location, Run, Segment, StackPlan
from gemlax.config.spec import GemmaConfig, TextConfig

__all__ = [
    "CHUNK",
    "KINDS",
    "GemmaConfig",
    "Kind",
    "LayerSpec",
    "Location",
    "RopeSpec",
    "Run",
    "Segment",
    "StackPlan",
    "TextConfig",
    "edit",
    "from_gguf",
    "from_hf",
]
