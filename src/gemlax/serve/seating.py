"""Messages of the wire, placed as chat templates take them.

Agents put system messages anywhere and send several messages of one role in a row; a template may
take neither.
"""

from collections.abc import Iterable, Mapping, Sequence

from gemlax.serve.body import JsonObject

__all__ = ["count_characters", "seated"]

_SYSTEM = ("system", "developer")


def seated(messages: Iterable[Mapping[str, object]], family: str | None) -> list[JsonObject]:
    """Return messages with system texts first.

    A later system message becomes the user's, for what it says concerns what follows. Where the
    template wants turns to alternate (Gemma 3), messages of the user in a row become one.
    """
    placed: list[JsonObject] = []
    for message in messages:
        one = dict(message)
        if one.get("role") in _SYSTEM and any(m.get("role") not in _SYSTEM for m in placed):
            one["role"] = "user"
        if one.get("role") != "tool":
            one["content"] = _without_refusals(one.get("content"))
        previous = placed[-1] if placed else {}
        first, second = previous.get("content"), one.get("content")
        joins = family == "gemma3" and one.get("role") == "user" == previous.get("role")
        if joins and isinstance(first, str | list) and isinstance(second, str | list):
            previous["content"] = [*_parts(first), *_parts(second, "\n\n")]
        else:
            placed.append(one)
    return placed


def _parts(content: str | list[JsonObject], separator: str = "") -> list[JsonObject]:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    return [{"type": "text", "text": separator}, *parts] if separator else parts


def _without_refusals(content: object) -> object:
    """Return content whose refusals, which OpenAI's models write, are texts."""
    if not isinstance(content, Sequence) or isinstance(content, str):
        return content
    parts = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type") == "refusal":
            part = {"type": "text", "text": part.get("refusal")}
        parts.append(part)
    return parts or ""


def count_characters(value: object) -> int:
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
