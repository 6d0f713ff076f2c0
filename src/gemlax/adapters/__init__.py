"""LoRA adapters: on a decoder, merged into it, several in one batch, and exchanged with peft."""

from gemlax.adapters.attach import (
    Kept,
    LoRAScale,
    adapted,
    attach,
    detach,
    dropout,
    hold,
    lora_enabled,
    merge,
    put,
    read,
    unmerge,
)
from gemlax.adapters.folders import base_of, beside
from gemlax.adapters.peft import Stored, check_same_base, read_folder, restore, save, updates
from gemlax.adapters.rules import Adapter, Base, Module, Rule, Rules, resolve
from gemlax.adapters.tables import (
    DEFAULT,
    Choice,
    choose,
    entries,
    put_tables,
    read_folders,
    template_of,
)

__all__ = [
    "DEFAULT",
    "Adapter",
    "Base",
    "Choice",
    "Kept",
    "LoRAScale",
    "Module",
    "Rule",
    "Rules",
    "Stored",
    "adapted",
    "attach",
    "base_of",
    "beside",
    "check_same_base",
    "choose",
    "detach",
    "dropout",
    "entries",
    "hold",
    "lora_enabled",
    "merge",
    "put",
    "put_tables",
    "read",
    "read_folder",
    "read_folders",
    "resolve",
    "restore",
    "save",
    "template_of",
    "unmerge",
    "updates",
]
