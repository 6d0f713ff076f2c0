"""Several adapters of one model, by name, and which of them each row of a batch takes.

They are entries of one table on the decoder; entry 0 is no adapter. The choice is an argument of
its call, so that another one needs no new program.
"""

import filecmp
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemlax.adapters.attach import put
from gemlax.adapters.folders import beside
from gemlax.adapters.peft import Stored, check_same_base, read_folder
from gemlax.config import TextConfig
from gemlax.decoder import Decoder
from gemlax.errors import RequestError
from gemlax.tokenizer import find_chat_template

__all__ = ["DEFAULT", "Choice", "entries", "put_folders", "read_folders", "template_of"]

_log = logging.getLogger(__name__)

# The adapter that is taken where nothing is said, if one has this name.
DEFAULT = "default"
Template = str | Mapping[str, str] | None
# An adapter by name for all rows, None for none of them, or one of these for each row.
Choice = str | None | Sequence[str | None]


def entries(names: Sequence[str], choice: Choice, count: int) -> tuple[int, ...]:
    """Return the entry of the tables that each of `count` rows takes."""
    is_one = choice is None or isinstance(choice, str)
    chosen: Any = [choice] * count if is_one else list(choice or ())
    if len(chosen) != count:
        raise RequestError(f"adapter must be one name, or {count} of them, got {len(chosen)}")
    known: dict[str | None, int] = {None: 0, **{name: i for i, name in enumerate(names, 1)}}
    if not names or DEFAULT not in names:
        known[DEFAULT] = 0
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise RequestError(
            f"there is no adapter {unknown[0]!r}: "
            + (f"this model has {', '.join(names)}" if names else "load(adapters=...) takes some")
        )
    return tuple(known[name] for name in chosen)


def read_folders(given: Any, config: TextConfig, model: Path) -> dict[str, Stored]:
    """Read and check adapters, before the weights of their base; return them by name.

    Args:
        given: a folder, several by name, or None: the adapter that lies beside the model's weights.
        config: of the model.
        model: its folder or file.
    """
    neighbour = beside(model)
    if neighbour is not None and given is None:
        _log.info("%s: the adapter beside the weights is applied, as transformers does", model)
        given = neighbour
    elif neighbour is not None and neighbour.resolve() not in _folders(given):
        _log.warning("%s: the adapter beside the weights is left aside for those given", model)
    if not given:
        return {}
    named = dict(given) if isinstance(given, Mapping) else {DEFAULT: given}
    return {name: read_folder(folder, config) for name, folder in named.items()}


def template_of(stored: Mapping[str, Stored], base: Template, model: Path) -> Template:
    """Return the chat template of a model with adapters: that of the only one, else the base's.

    A tokenizer beside an adapter is left aside, with a line in the log.
    """
    chosen = base
    for one in stored.values():
        template = find_chat_template(one.source)
        if template is not None and template != base:
            used = list(stored) == [DEFAULT]
            chosen = template if used else base
            _log.info(
                "%s: its chat template, which differs from the base's, is %s",
                one.source, "used" if used else "left aside: it is one of several adapters",
            )  # fmt: skip
        for name in ("tokenizer.json", "tokenizer.model"):
            if (one.source / name).is_file() and not _is_same(one.source / name, model / name):
                _log.info("%s: left aside for the base's tokenizer", one.source / name)
    return chosen


def _is_same(path: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(path, other, shallow=False)


def _folders(given: Any) -> list[Path]:
    each = given.values() if isinstance(given, Mapping) else [given]
    return [Path(folder).expanduser().resolve() for folder in each]


def put_folders(decoder: Decoder, stored: Mapping[str, Stored]) -> None:
    """Put several adapters on a decoder, in place: entry i + 1 of the table is the i-th of them."""
    if not stored:
        return
    for one in stored.values():
        check_same_base(one, decoder)
    put(decoder, [None, *((one.adapter, one.values) for one in stored.values())])
