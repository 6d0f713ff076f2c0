"""What joining a running batch is worth: 24 requests of mixed lengths on the real Gemma 3 270M.

Run: python benchmarks/serving.py [--model demo] [--rounds 3] [--uniform] [--write] [--json]
Prompts of 8 to 400 tokens and answers of 8 to 400, from a fixed seed, greedy, without stop ids.
Lengths are log-uniform: most are short, few are long; --uniform draws them evenly.
"joining": one engine of 8 slots; a request joins as soon as a slot is free. "drained": 8 requests
at a time, each batch to its end. "static": a batch of one shape, prompts padded to the longest and
all rows run to the longest answer. "one by one": one slot. The ways take turns after a round of
warm-up; tokens that nobody asked for do not count. Then the host's part of a step at batch 1: a
step less its calls of compiled programs. The last line is JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import report

import gemlax
from gemlax.engine import MAX_STEPS, Engine, Request
from gemlax.sampling import make_sampling

REQUESTS, SLOTS, CAPACITY = 24, 8, 1024
LENGTHS = 8, 400
HOST_STEPS = 200


def make_requests(vocab_size: int, uniform: bool) -> list[Request]:
    """Draw lengths and ids; the most likely token is taken."""
    random = np.random.default_rng(0)
    settings = make_sampling(vocab_size, [0], temperature=0.0).row(0)
    if uniform:
        lengths = random.integers(*LENGTHS, (REQUESTS, 2), endpoint=True)
    else:
        lengths = np.exp(random.uniform(*np.log(LENGTHS), (REQUESTS, 2))).astype(int)
    requests = []
    for prompt_length, answer_length in lengths.tolist():
        prompt = (2, *random.integers(1000, 200_000, prompt_length - 1).tolist())
        requests.append(Request(prompt, prompt_length + answer_length, settings))
    return requests


def drain(engine: Engine, requests: list[Request]) -> int:
    """Run requests to their ends; return how many tokens they got."""
    for request in requests:
        engine.submit(request)
    tokens = 0
    while engine.num_running or engine.num_waiting:
        tokens += sum(len(event.tokens) for event in engine.step(MAX_STEPS))
    return tokens


def joining(programs: Any, requests: list[Request], interleaved: int | None = None) -> None:
    drain(Engine(programs, SLOTS, CAPACITY, interleaved=interleaved), requests)


def drained(programs: Any, requests: list[Request]) -> None:
    for first in range(0, len(requests), SLOTS):
        drain(Engine(programs, SLOTS, CAPACITY), requests[first : first + SLOTS])


def static(programs: Any, requests: list[Request]) -> None:
    for first in range(0, len(requests), SLOTS):
        batch = requests[first : first + SLOTS]
        prompt = max(len(request.prompt) for request in batch)
        answer = max(request.max_length - len(request.prompt) for request in batch)
        padded = [(request.prompt * prompt)[:prompt] for request in batch]
        drain(
            Engine(programs, SLOTS, CAPACITY),
            [Request(ids, prompt + answer, batch[0].settings) for ids in padded],
        )


def one_by_one(programs: Any, requests: list[Request]) -> None:
    engine = Engine(programs, 1, CAPACITY)
    for request in requests:
        drain(engine, [request])


WAYS: dict[str, Callable[..., None]] = {
    "joining": joining, "drained": drained, "static": static, "one by one": one_by_one,
}  # fmt: skip


def measure(
    programs: Any, requests: list[Request], rounds: int, shown: bool
) -> list[dict[str, Any]]:
    wanted = sum(request.max_length - len(request.prompt) for request in requests)
    counters = programs.counters
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for round_ in range(rounds + 1):
        for name, way in WAYS.items():
            old = counters.programs, counters.prefill_s, counters.decode_s, counters.decode_calls
            begin = time.perf_counter()
            way(programs, requests)
            seconds = time.perf_counter() - begin
            new = counters.programs, counters.prefill_s, counters.decode_s, counters.decode_calls
            compiled, prefill_s, decode_s, calls = (b - a for a, b in zip(old, new, strict=True))
            if round_:  # the first round compiles
                runs[name].append({
                    "tok_s": wanted / seconds, "seconds": seconds, "prefill_s": prefill_s,
                    "decode_s": decode_s, "calls": calls, "compiled": compiled,
                })  # fmt: skip
                if shown:
                    print(f"{name}: {runs[name][-1]}", flush=True)
    return [
        {"way": name, "tokens": wanted}
        | {key: round(statistics.median(run[key] for run in measured), 2) for key in measured[0]}
        for name, measured in runs.items()
    ]


def host_ms(programs: Any, requests: list[Request]) -> float:
    """Return the median ms of `Engine.step(1)` of one request, less its compiled programs.

    What a program does is over when its arrays are ready, so each call is waited for.
    """
    inside = 0.0

    def metered(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal inside
            begin = time.perf_counter()
            out = jax.block_until_ready(run(*args))
            inside += time.perf_counter() - begin
            return out

        return call

    engine = Engine(programs, 1, CAPACITY)
    prompt = requests[0].prompt[:8]
    engine.submit(Request(prompt, len(prompt) + HOST_STEPS, requests[0].settings))
    engine.step(1)  # joins, and prefills
    compiled = programs.compiled
    programs.compiled = {key: metered(run) for key, run in compiled.items()}
    taken = []
    while engine.num_running:
        inside, begin = 0.0, time.perf_counter()
        engine.step(1)
        taken.append(time.perf_counter() - begin - inside)
    programs.compiled = compiled
    return 1e3 * statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--uniform", action="store_true", help="lengths drawn evenly")
    parser.add_argument("--json", action="store_true", help="nothing but the JSON line")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    args = parser.parse_args()
    programs = gemlax.load(args.model, implementation="cpu").programs
    requests = make_requests(programs.num_tokens, args.uniform)
    rows = measure(programs, requests, args.rounds, shown=not args.json)
    host = round(host_ms(programs, requests), 3)
    speeds = {row["way"]: row["tok_s"] for row in rows}
    ratios = {name: round(speeds["joining"] / speeds[name], 2) for name in list(speeds)[1:]}
    if args.write:
        head = ("way", "tok/s", "seconds", "prefill s", "decode s", "calls", "compiled")
        text = report.table(head, [(row["way"], *list(row.values())[2:]) for row in rows])
        line = f"{report.machine()}; {host} ms of a step at batch 1 are the host's."
        report.write_section("serving", f"{line}\n\n{text}")
    print(json.dumps({"rows": rows, "ratios": ratios, "host_ms_per_step": host}))


if __name__ == "__main__":
    main()
