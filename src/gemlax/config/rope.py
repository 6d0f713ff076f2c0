"""The rope settings of a config.json: every spelling is read into a `RopeSpec` per kind of layer.

Source: transformers 5.23.0, modeling_rope_utils.py, and `convert_rope_params_to_dict` of
configuration_gemma3.py and configuration_gemma4.py.
"""

from collections.abc import Collection, Mapping
from typing import Any

from gemlax.config.keys import log_aside
from gemlax.config.layer import KINDS, Kind, RopeSpec
from gemlax.errors import UnsupportedError, check_positive, show_value

__all__ = ["read_ropes", "write_rope"]

SLIDING, FULL = KINDS
Settings = Mapping[str, Any]
# What each type reads beside rope_type and rope_theta; transformers passes over all else.
_READ = {
    "default": set[str](),
    "linear": {"factor", "partial_rotary_factor"},
    "proportional": {"factor", "partial_rotary_factor"},
}


def read_ropes(
    c: Settings, kinds: Collection[Kind], head_dims: Mapping[Kind, int], *, gemma3: bool
) -> dict[Kind, RopeSpec]:
    """Return the rope of each kind of layer that there is.

    Args:
        c: the text config: rope_parameters, rope_scaling, rope_theta, ...
        kinds: those that have layers.
        head_dims: of each such kind.
        gemma3: flat settings are those of full layers, and a kind has a default.
    """
    aside: list[str] = []
    by_kind = (_gemma3_settings if gemma3 else _gemma4_settings)(c, kinds, aside)
    partial = c.get("partial_rotary_factor")
    ropes = {}
    for kind in kinds:
        settings = {"partial_rotary_factor": partial} | by_kind[kind]
        ropes[kind] = _read_rope(_drop_nulls(settings), kind, head_dims[kind], aside)
    log_aside("rope settings", dict.fromkeys(aside))
    return ropes


def _gemma3_settings(
    c: Settings, kinds: Collection[Kind], aside: list[str]
) -> dict[Kind, dict[str, Any]]:
    """Return the settings of each kind; a kind that is left out has the default rope.

    `rope_scaling` comes after `rope_parameters`. Flat settings of either are those of full layers:
    that is what the older `rope_scaling` meant. transformers 5.23 reads flat `rope_parameters`,
    a `rope_scaling` by kind, and `type` in place of `rope_type`, as no scaling at all.
    """
    settings: dict[Kind, dict[str, Any]] = {
        SLIDING: {"rope_theta": c["rope_local_base_freq"]},
        FULL: {"rope_theta": c["rope_theta"]},
    }
    for name in ("rope_parameters", "rope_scaling"):
        by_kind, flat = _split(c, name)
        if by_kind:
            aside += [f"{name}.{key}" for key in flat]
        elif flat:
            by_kind = {FULL: flat}
        for kind, own in by_kind.items():
            if "type" in own and "rope_type" not in own:
                own = own | {"rope_type": own["type"]}
            settings[kind] |= own
    return settings


def _gemma4_settings(
    c: Settings, kinds: Collection[Kind], aside: list[str]
) -> dict[Kind, dict[str, Any]]:
    """Return the settings of each kind; a file that has any has them for all kinds, by kind."""
    name = "rope_scaling" if c.get("rope_scaling") else "rope_parameters"
    by_kind, flat = _split(c, name)
    if "rope_local_base_freq" in c:
        aside.append("rope_local_base_freq")
    if not by_kind and not flat:
        aside += [key for key in ("rope_theta", "partial_rotary_factor") if key in c]
        return {
            SLIDING: {"rope_theta": 10_000.0},
            FULL: {
                "rope_type": "proportional",
                "rope_theta": 1_000_000.0,
                "partial_rotary_factor": 0.25,
            },
        }
    missing = sorted(set(kinds) - by_kind.keys())
    if missing:
        raise UnsupportedError(
            f"config: {name} must hold settings for each kind of layer, got {sorted(by_kind)} "
            f"and {show_value(flat)}; add {', '.join(missing)}"
        )
    aside += [f"{name}.{key}" for key in flat]
    settings = {kind: {"rope_theta": c.get("rope_theta")} | by_kind[kind] for kind in kinds}
    for kind, own in settings.items():
        if own["rope_theta"] is None:
            raise UnsupportedError(f"config: {name}.{kind} has no rope_theta; add it")
    return settings


def _split(c: Settings, name: str) -> tuple[dict[Kind, dict[str, Any]], dict[str, Any]]:
    """Return the settings by kind, and those that are in no kind."""
    found = c.get(name) or {}
    known = [found.get(kind) for kind in KINDS] if isinstance(found, Mapping) else []
    for value in (found, *known):
        if value is not None and not isinstance(value, Mapping):
            raise UnsupportedError(
                f"config: rope settings must be objects, got {show_value(value)} in {name}"
            )
    unknown = sorted(k for k, v in found.items() if isinstance(v, Mapping) and k not in KINDS)
    if unknown:
        raise UnsupportedError(f"config: {name} has {unknown}; expected {list(KINDS)}")
    by_kind = {kind: _drop_nulls(found[kind]) for kind in KINDS if found.get(kind) is not None}
    return by_kind, _drop_nulls({k: v for k, v in found.items() if k not in KINDS})


def _drop_nulls(found: Settings) -> dict[str, Any]:
    return {key: value for key, value in found.items() if value is not None}


def _read_rope(found: Settings, kind: Kind, head_dim: int, aside: list[str]) -> RopeSpec:
    rope_type = found.get("rope_type", found.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in _READ:
        raise UnsupportedError(
            f"config: rope_type {show_value(rope_type)} of {kind} is not supported; expected one "
            f"of {list(_READ)}"
        )
    read = _READ[rope_type]
    ignored = found.keys() - read - {"rope_type", "type", "rope_theta"}
    aside += sorted(f"{key} of {rope_type!r}" for key in ignored)
    theta = _positive(found.get("rope_theta"), "rope_theta", rope_type)
    partial = found.get("partial_rotary_factor", 1.0) if read else 1.0
    if not _is_number(partial) or not 0 <= partial <= 1:
        raise UnsupportedError(
            f"config: partial_rotary_factor must be in [0, 1], got {show_value(partial)}"
        )
    if rope_type == "proportional":
        factor = _positive(found.get("factor", 1.0), "factor", rope_type)
        return RopeSpec(theta=theta, factor=factor, rotated=float(partial))
    if int(head_dim * partial) != head_dim:  # its frequencies would be too few for the head
        raise UnsupportedError(
            f"config: partial_rotary_factor {partial} with rope_type {rope_type!r}; only "
            "'proportional' turns a part of a head"
        )
    linear = rope_type == "linear"
    factor = _positive(found.get("factor"), "factor", rope_type) if linear else 1.0
    return RopeSpec(theta=theta, factor=factor)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _positive(value: Any, key: str, rope_type: str) -> float:
    return float(
        check_positive(f"config: for rope_type {rope_type!r}, {key}", value, error=UnsupportedError)
    )


def write_rope(rope: RopeSpec) -> dict[str, Any]:
    """Return settings that give `rope` back."""
    factor = {} if rope.factor == 1.0 else {"factor": rope.factor}
    if rope.rotated != 1.0:
        own = {"rope_type": "proportional", "partial_rotary_factor": rope.rotated}
    else:
        own = {"rope_type": "linear" if factor else "default"}
    return {"rope_theta": rope.theta} | own | factor
