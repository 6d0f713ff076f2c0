"""Write train.jsonl and held-out.jsonl: sentences about appointments, and what they say as JSON.

The data was made by this script and belongs to the project. Names and places of the held-out file
are in no training example.
"""

import json
import random
from pathlib import Path

NAMES = ["Anna", "Ben", "Carla", "David", "Elif", "Farid", "Grace", "Hana", "Igor", "Julia", "Kofi",
         "Lena", "Marta", "Nils", "Olga", "Pedro"]  # fmt: skip
NEW_NAMES = ["Ravi", "Sofia", "Tomas", "Yuki"]
PLACES = ["the canteen", "room 4", "the library", "the station", "the garden", "her office",
          "the town hall", "the lab", "the gym", "the museum"]  # fmt: skip
NEW_PLACES = ["the harbour", "room 12", "the bakery"]
EVENTS = ["lunch", "breakfast", "a meeting", "a call", "an interview", "dinner", "a lesson",
          "a walk", "coffee", "a rehearsal"]  # fmt: skip
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
HOURS = {7: "seven", 8: "eight", 9: "nine", 10: "ten", 11: "eleven", 12: "noon", 14: "two",
         15: "three", 16: "four", 17: "five", 18: "six"}  # fmt: skip
FORMS = [
    "On {day} I have {event} with {name} at {place}, at {time}.",
    "{name} asked for {event} on {day} at {time}; we meet at {place}.",
    "{Event} with {name}: {day}, {time}, {place}.",
    "Please note {event} at {place} with {name} on {day} at {time}.",
    "At {time} on {day} there is {event} with {name} at {place}.",
    "Can you put {event} with {name} into my calendar? {Place}, {day} at {time}.",
]


def hour(rng: random.Random) -> tuple[str, str]:
    """Return an hour as it is said, and as it is written."""
    number = rng.choice(list(HOURS))
    if number == 12:
        return "noon", "12:00"
    part = "in the morning" if number < 12 else "in the afternoon"
    said = f"{HOURS[number]} {part}" if rng.random() < 0.5 else f"{number}:30"
    return said, f"{number:02}:{'30' if said[-2:] == '30' else '00'}"


def example(rng: random.Random, names: list[str], places: list[str]) -> dict[str, str]:
    name, place, event = rng.choice(names), rng.choice(places), rng.choice(EVENTS)
    day, (said, time) = rng.choice(DAYS), hour(rng)
    sentence = rng.choice(FORMS).format(
        day=day, event=event, Event=event.capitalize(), name=name, place=place,
        Place=place.capitalize(), time=said,
    )  # fmt: skip
    what, where = (text.split(" ", 1)[-1] if text.split(" ")[0] in ("a", "an", "the") else text
                   for text in (event, place))  # fmt: skip
    found = {"what": what, "who": name, "day": day[:3], "time": time, "where": where}
    return {"prompt": f"{sentence}\n", "completion": json.dumps(found)}


def main() -> None:
    rng, folder = random.Random(2026), Path(__file__).parent
    files = {"train": (160, NAMES, PLACES), "held-out": (24, NEW_NAMES, NEW_PLACES)}
    for file, (count, names, places) in files.items():
        lines = [json.dumps(example(rng, names, places)) for _ in range(count)]
        (folder / f"{file}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
