"""Names of tensors that begin with what a program wrapped around the model when it was saved.

transformers 5.23.0 reads none of these: it fills the model with random numbers and warns.
"""

from collections import Counter
from collections.abc import Collection

__all__ = ["explain_names"]

# What may lie at the start of a name or inside it, by what writes it.
_WRAPPERS = {
    "_orig_mod.": "torch.compile", "_fsdp_wrapped_module.": "FSDP", "module.": "DataParallel",
    "_checkpoint_wrapped_module.": "activation checkpointing", "_forward_module.": "Lightning",
    "base_model.model.": "peft", "pretrained_model.": "TRL",
}  # fmt: skip
_ADAPTED = (".base_layer.", ".lora_A.", ".lora_B.", ".modules_to_save.", ".original_module.",
            ".lora_embedding_A.", ".lora_magnitude_vector.")  # fmt: skip


def explain_names(
    found: Collection[str], expected: Collection[str], read: Collection[str]
) -> str | None:
    """Say in one line how most names differ from those of the text decoder; None: in no such way.

    Args:
        found: the names that the files hold.
        expected: canonical names, such as "layers.0.mlp.up_proj.weight".
        read: what may stand in front of them.
    """
    adapted = [name for name in found if any(part in name for part in _ADAPTED)]
    if adapted:
        return (
            f"it holds {len(adapted)} tensors of adapters that are not merged, such as "
            f"{adapted[0]}; save the model after merge_and_unload(), or the adapter by itself"
        )
    known = set(expected)
    wrapped = [name for name in found if _wrappers(name) and _canonical(name) in known]
    fronts = Counter(_front(name, known) for name in found)
    ((front, count),) = fronts.most_common(1) or [(None, 0)]
    others = front is not None and front not in read and 2 * count > len(known)
    if not wrapped and not others:
        return None
    example = wrapped[0] if wrapped else next(n for n in found if _front(n, known) == front)
    writers = ", ".join(f"{part} is {_WRAPPERS[part]}'s" for part in _wrappers(example))
    where = f"begin with the prefix {front!r}" if others else "hold a wrapper's prefix"
    return (
        f"its names {where}{f' ({writers})' if writers else ''}, such as {example}; save the model "
        "that is inside the wrapper, or rename its tensors to model.layers..."
    )


def _wrappers(name: str) -> list[str]:
    return [part for part in _WRAPPERS if f".{part}" in f".{name}"]


def _front(name: str, known: Collection[str]) -> str | None:
    """Return what is in front of a canonical name; None: it does not end with one."""
    own = _canonical(name)
    return name.removesuffix(own) if own in known and name.endswith(own) else None


def _canonical(name: str) -> str:
    """Return a name without wrappers and without what is in front of the decoder."""
    for wrapper in _wrappers(name):
        name = f".{name}".replace(f".{wrapper}", ".")[1:]
    start = name.find("layers.")
    return name[start:] if start >= 0 else ".".join(name.split(".")[-2:])
