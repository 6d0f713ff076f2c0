"""LoRA adapters: on a decoder, merged into it, several in one batch, and exchanged with peft."""

from gemlax.adapters.attach import Merged, adapted, attach, detach, merge, put, read, unmerge
from gemlax.adapters.folders import base_of, beside
from gemlax.adapters.peft import Stored, check_same_base, read_folder, restore, save, updates
from gemlax.adapters.rules import Adapter, Base, Module, Rule, Rules, resolve
from gemlax.adapters.tables import (
    DEFAULT,
    Choice,
    entries,
    put_folders,
    read_folders,
    template_of,
)

__all__ = [
    "DEFAULT",
    "Adapter",
    "Base",
    "Choice",
    "Merged",
    "Module",
    "Rule",
    "Rules",
    "Stored",
    "adapted",
    "attach",
    "base_of",
    "beside",
    "check_same_base",
    "detach",
    "entries",
    "merge",
    "put",
    "put_folders",
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
