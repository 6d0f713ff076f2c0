"""Conversations as Anthropic's API and OpenAI's responses write them, made into messages."""

from collections.abc import Sequence

from gemlax.serve.body import JsonObject, refuse

__all__ = ["Turns"]

SYSTEM = ("system", "developer")
# What stands between texts that were given apart. An answer is continued as it stands.
BETWEEN = {"assistant": ""}


class Turns:
    """Collects the messages of a `ChatRequest`.

    Turns of one side that follow each other become one, and what the system says before anybody
    else likewise, for templates want to see the sides alternate.
    """

    def __init__(self) -> None:
        self._messages: list[JsonObject] = []
        self._names: dict[str, str] = {}  # of the tools called, by the id of the call

    def say(self, role: str, texts: Sequence[str]) -> None:
        """Add texts of somebody; none: an empty turn."""
        if role in SYSTEM and all(one["role"] in SYSTEM for one in self._messages):
            role = "system"
        self._turn(role)["content"] += texts

    def think(self, text: str) -> None:
        """Add what the model thought before it said what comes next."""
        if not text:
            return
        turn = self._turn("assistant")
        turn["reasoning"] = turn.get("reasoning", "") + text

    def call(self, id: str, name: str, arguments: JsonObject) -> None:
        """Add a tool call."""
        self._names[id] = name
        call = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
        self._turn("assistant").setdefault("tool_calls", []).append(call)

    def result(self, id: str, text: str, where: str) -> None:
        """Add what a called tool answers; `where`: the field with the id."""
        if id not in self._names:
            refuse(where, f"no tool call before has the id {id[:64]!r}")
        tool = {"role": "tool", "tool_call_id": id, "name": self._names[id], "content": [text]}
        self._messages.append(tool)

    def messages(self) -> list[JsonObject]:
        """Return the messages."""
        return [
            one | {"content": BETWEEN.get(one["role"], "\n\n").join(one["content"])}
            for one in self._messages
        ]

    def _turn(self, role: str) -> JsonObject:
        """Return the message that `role` is at: the last one, or a new one."""
        if role == "tool" or not self._messages or self._messages[-1]["role"] != role:
            self._messages.append({"role": role, "content": []})
        return self._messages[-1]
