"""What drafts from the text so far are worth: Gemma 3 270M, Q4_K_M, on native kernels.

Run: python benchmarks/speculation.py [--drafts 3 7] [--tokens 96] [--rounds 7] [--write]
The same prompt without drafts and with each number of them takes turns; a ratio is the median over
rounds, so that neighbours on the machine count on both sides. Tokens must be the same. The hostile
prompts are sampled (temperature 1, top_k 64), for this small model repeats itself otherwise. The
last line is JSON.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import report

import gemlax

TEXT = (Path(__file__).resolve().parent.parent / "tests/golden/text.txt").read_text("utf-8")
VERSE = "The quick brown fox jumps over the lazy dog and then runs through the green forest.\n"
SAMPLED = {"temperature": 1.0, "top_k": 64, "seed": 3}
PROMPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "repeat a sentence": (3 * VERSE, {}),
    "continue a list": (", ".join(3 * ["one, two, three, four, five, six, seven"]) + ",", {}),
    "a story, greedy": ("The history of the Roman Empire is", {}),
    "a short text, sampled (hostile)": ("Dear Sir or Madam,\n\nI am writing to", SAMPLED),
    "a long text, sampled (hostile)": (TEXT[:3000], SAMPLED),
}


def timed(model: gemlax.Model, prompt: str, tokens: int, settings: Any) -> tuple[Any, float]:
    """Return what was generated, and the tokens a second of its decode steps."""
    counters = model.programs.counters
    before = counters.decode_s, counters.decode_tokens
    done = model.generate(prompt, max_new_tokens=tokens, **settings)
    return done, (counters.decode_tokens - before[1]) / (counters.decode_s - before[0])


def measure(model: gemlax.Model, name: str, drafts: list[int], args: Any) -> list[dict[str, Any]]:
    prompt, settings = PROMPTS[name]
    speeds: dict[int, list[float]] = {count: [] for count in (0, *drafts)}
    done: dict[int, Any] = {}
    for round_ in range(args.rounds + 1):
        for count in speeds:
            how = {**settings, "speculate": count}
            done[count], speed = timed(model, prompt, args.tokens, how)
            if round_:  # the first round compiles
                speeds[count].append(speed)
    rows = []
    for count in drafts:
        ratios = [a / b for a, b in zip(speeds[count], speeds[0], strict=True)]
        rows.append({
            "prompt": name,
            "drafts": count,
            "accepted_per_step": round(done[count].accepted_per_step, 2),
            "plain_tok_s": round(statistics.median(speeds[0]), 1),
            "tok_s": round(statistics.median(speeds[count]), 1),
            "ratio": round(statistics.median(ratios), 2),
            "same_tokens": done[count].tokens == done[0].tokens,
        })  # fmt: skip
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--drafts", type=int, nargs="+", default=[3, 7])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    args = parser.parse_args()
    model = gemlax.load("demo", implementation="cpu")
    rows = [row for name in PROMPTS for row in measure(model, name, args.drafts, args)]
    if args.write:
        head = ("prompt", "drafts", "accepted a step", "tok/s without", "tok/s", "ratio")
        text = report.table(head, [tuple(row.values())[:-1] for row in rows])
        report.write_section("speculation", f"{report.machine()}.\n\n{text}")
    print(json.dumps({"model": "gemma-3-270m Q4_K_M", "tokens": args.tokens, "rows": rows}))


if __name__ == "__main__":
    main()
