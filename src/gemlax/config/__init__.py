"""What a Gemma checkpoint is, resolved once from its config file into frozen data.

`spec` holds the data, `plan` how layers are stacked, `hf` and `gguf` read (and write) the files.
"""

from gemlax.config.plan import Location, Run, Segment, StackPlan
from gemlax.config.spec import CHUNK, KINDS, GemmaConfig, Kind, LayerSpec, RopeSpec, TextConfig

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
]
