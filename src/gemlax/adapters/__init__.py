"""LoRA adapters: on a decoder, merged into it, and exchanged with peft."""

from gemlax.adapters.attach import (
    Kept,
    LoRAScale,
    attach,
    detach,
    dropout,
    lora_enabled,
    merge,
    put,
    read,
    unmerge,
)
from gemlax.adapters.peft import restore, save
from gemlax.adapters.rules import Adapter, Module, Rule, Rules

__all__ = [
    "Adapter",
    "Kept",
    "LoRAScale",
    "Module",
    "Rule",
    "Rules",
    "attach",
    "detach",
    "dropout",
    "lora_enabled",
    "merge",
    "put",
    "read",
    "restore",
    "save",
    "unmerge",
]
