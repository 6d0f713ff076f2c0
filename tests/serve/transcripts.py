"""Transcripts of exchanges: golden/*.json. Run as a command it writes anew what they answer.

A file has a path, a request, and the updates of the answer; then what the kitchen was asked, the
status, and the body or the events, without times and with ids numbered in order.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from serve.fake import FakeKitchen, events_of, post

from gemlax.serve.work import Delta, Update, Usage

FOLDER = Path(__file__).parent / "golden"
GIVEN = ("path", "request", "updates")
ID = re.compile(r"\b([a-z]+[_-])([0-9a-f]{24})\b")
TIMES = re.compile(r'"(created|created_at|completed_at)": \d+')


def update_of(written: dict[str, Any]) -> Update:
    fields = dict(written)
    fields["deltas"] = [Delta(*delta) for delta in fields.get("deltas", ())]
    return Update(0, **fields | {"usage": Usage(**fields.get("usage", {}))})


def replay(given: dict[str, Any]) -> dict[str, Any]:
    """What is answered to the request of a transcript now."""
    kitchen = FakeKitchen([update_of(one) for one in given["updates"]])
    response = post(kitchen, given["path"], given["request"])
    answer: dict[str, Any] = {"status": response.status_code}
    if response.headers["content-type"].startswith("text/event-stream"):
        answer["events"] = events_of(response)
    else:
        answer["body"] = response.json()
    for request in kitchen.requests:
        asked = dataclasses.asdict(request)
        answer["asked"] = {key: value for key, value in asked.items() if value not in ((), {}, "")}
    return json.loads(plain(json.dumps(answer)))


def plain(text: str) -> str:
    """A text of JSON without times, its random ids numbered in the order in which they come."""
    numbers: dict[str, int] = {}

    def numbered(match: re.Match[str]) -> str:
        return f"{match[1]}{numbers.setdefault(match[2], len(numbers) + 1)}"

    return ID.sub(numbered, TIMES.sub(r'"\1": 0', text))


def main() -> None:
    for path in sorted(FOLDER.glob("*.json")):
        given = {key: json.loads(path.read_text("utf-8"))[key] for key in GIVEN}
        text = json.dumps({**given, **replay(given)}, indent=1, ensure_ascii=False)
        path.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
