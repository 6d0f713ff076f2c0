"""Experts as other tools lay them out: gate and up apart, or each expert in tensors of its own.

Source: transformers 5.23.0, conversion_mapping.py (experts one by one); mlx-lm,
models/switch_layers.py (`switch_glu`); llama.cpp,
src/models/gemma4.cpp (`ffn_gate_exps`, `ffn_up_exps`).
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np

from gemlax.checkpoints.base import fill
from gemlax.names import Weight

__all__ = ["Part", "fill_parts", "gguf_parts", "huggingface_parts"]

_STACKED, _ALONE = "switch_glu.{half}_proj.weight", "{expert}.{half}_proj.weight"


class Part(NamedTuple):
    """A tensor with some rows of a weight [experts, rows, width]: of one expert, or of all (None).

    `row` is the first of them.
    """

    tensor: str
    shape: tuple[int, ...]
    expert: int | None
    row: int


def huggingface_parts(weight: Weight, present: Collection[str], prefix: str) -> list[Part]:
    """Return the tensors of a folder that a weight of experts lies in apart; none: in no such way.

    Args:
        weight: any weight.
        present: names of tensors.
        prefix: what stands before the decoder's names.
    """
    base, experts, name = weight.name.partition("experts.")
    if not experts or len(weight.shape) != 3:
        return []
    base, halves = prefix + base + experts, name.removesuffix("_proj").split("_")
    if base + _STACKED.format(half=halves[0]) in present:
        return _of_all(weight, [base + _STACKED.format(half=half) for half in halves])
    alone = base + _ALONE.format(expert=0, half=halves[0]) in present
    # A damaged config may claim any number of experts.
    if not alone or weight.shape[0] > len(present):
        return []
    _, rows, width = weight.shape
    rows //= len(halves)
    return [
        Part(base + _ALONE.format(expert=expert, half=half), (rows, width), expert, i * rows)
        for expert in range(weight.shape[0])
        for i, half in enumerate(halves)
    ]


def gguf_parts(weight: Weight, present: Collection[str]) -> list[Part]:
    """Return the tensors of a GGUF file that a weight of experts lies in apart."""
    names = [weight.gguf.replace("gate_up", half) for half in ("gate", "up")]
    return _of_all(weight, names) if "gate_up" in weight.gguf and names[0] in present else []


def _of_all(weight: Weight, names: list[str]) -> list[Part]:
    experts, rows, width = weight.shape
    rows //= len(names)
    return [Part(name, (experts, rows, width), None, i * rows) for i, name in enumerate(names)]


def fill_parts(
    out: np.ndarray, parts: list[Part], values: Callable[[Part], Callable[[int, int], np.ndarray]]
) -> None:
    """Fill a weight from its parts; `values` gives what gives elements [a, b) of a tensor."""
    for part in parts:
        decode, (rows, width) = values(part), part.shape[-2:]
        experts = range(len(out)) if part.expert is None else [part.expert]
        for i, expert in enumerate(experts):
            first = i * rows * width

            def moved(start: int, stop: int, first: int = first) -> np.ndarray:
                return decode(first + start, first + stop)

            fill(out[expert, part.row : part.row + rows], moved, part.tensor)
