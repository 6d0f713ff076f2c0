"""Messages of the wire, placed as chat templates take them.

Agents put system messages anywhere and send several messages of one role in a row; a template may
take neither.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["count_characters", "seated"]

_SYSTEM = ("system", "developer")


def seated(messages: Iterable[Mapping[str, Any]], family: str | None) -> list[dict[str, Any]]:
    """Return messages with system texts first.

    A later system message becomes the user's, for what it says concerns what follows. Where the
    template wants turns to alternate (Gemma 3), messages of the user in a row become one.
    """
    placed: list[dict[str, Any]] = []
    for message in messages:
        one = dict(message)
        if one.get("role") in _SYSTEM and any(m.get("role") not in _SYSTEM for m in placed):
            one["role"] = "user"
        if one.get("role") != "tool":
            one["content"] = _without_refusals(one.get("content"))
        before = placed[-1] if placed else {}
        joins = family == "gemma3" and one.get("role") == "user" == before.get("role")
        if joins and _is_text(one.get("content")) and _is_text(before.get("content")):
            before["content"] = [*_parts(before["content"]), *_parts(one["content"], "\n\n")]
        else:
            placed.append(one)
    return placed


def _is_text(content: Any) -> bool:
    return isinstance(content, str | list)


def _parts(content: Any, before: str = "") -> list[Any]:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    return [{"type": "text", "text": before}, *parts] if before else parts


def _without_refusals(content: Any) -> Any:
    """Return content whose refusals, which OpenAI's models write, are texts."""
    if not isinstance(content, Sequence) or isinstance(content, str):
        return content
    parts = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type") == "refusal":
            part = {"type": "text", "text": part.get("refusal")}
        parts.append(part)
    return parts or ""


def count_characters(value: Any) -> int:
    """Return how many characters the texts of a request have; it may be nested deeply."""
    total, left = 0, [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            total += len(one)
        elif isinstance(one, Mapping):
            left.extend(one.values())
        elif isinstance(one, list | tuple):
            left.extend(one)
    return total
