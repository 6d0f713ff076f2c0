"""gemlax serve and llama-server on the real Gemma 3 270M, in turn, over HTTP, on two processors.

Run: python benchmarks/race.py [--llama-server FILE] [--cases load,long,chat,prefix,schema,engine]
         [--servers gemlax,llama-server] [--at-once 1,4,16,64] [--scale X] [--write] [--json]
FILE is what benchmarks/llama_server.py builds, unless it is given. Each case starts each server
anew, with the slots and the context that the case needs, on the same Q4_K_M file. Cases:
"load": 1, 4, 16 and 64 streams at once in 16 slots; prompts of 16 to 256 tokens, answers of 64.
"long": 7 streams, and a prompt of 8,000 tokens every 10 s, whose prefill the 7 should not feel.
"chat": three chats of 20 turns; how long the first text of a late turn takes beside an early one.
"prefix": 16 requests that share 20,000 tokens. "schema": 4 chats at once, with a JSON schema and
without. "engine": 8 requests in this process, without HTTP, beside the same over HTTP.
--scale 0.1 takes a tenth of the requests and of long prompts, to try the script. Processor time is
that of the server and its children, both processors added. The last line is JSON.
"""

import argparse
import asyncio
import contextlib
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import report

from gemlax.bench import server
from gemlax.bench.client import Target, request_json
from gemlax.bench.server import Goals, Lengths, Workload
from gemlax.errors import RequestError

CACHE = report.README.parent / ".cache"
PROCESSORS = 2
GOALS = Goals(ttft=1000, tpot=100)
PATH = "/v1/completions"
SCHEMA = {
    "type": "object", "required": ["name", "age", "languages"], "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "maxLength": 40}, "age": {"type": "integer"},
        "languages": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 4},
    },
}  # fmt: skip


class Server:
    """A running server.

    Attributes:
        extra: fields of requests whose prompts are not to be found in a cache.
    """

    def __init__(self, name: str, process: subprocess.Popen, port: int):
        self.name, self.process = name, process
        self.target, self.model = Target("127.0.0.1", port), ""
        self.extra = {"cache_prompt": False} if name == "llama-server" else {}

    def cpu_s(self) -> float:
        """Return the processor time of the process and of the children it has now."""
        ticks = 0
        for process in (self.process.pid, *children(self.process.pid)):
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def peak_mb(self) -> int:
        """Return the most memory that was resident, the mapped file included."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1000


def children(pid: int) -> list[int]:
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for thread in threads for child in thread.read_text().split()]


def command(name: str, args: argparse.Namespace, port: int, slots: int, context: int) -> list[str]:
    """Return the command line; `context` is what one slot has room for."""
    if name == "llama-server":
        return [
            str(args.llama_server), "-m", str(args.model), "--port", str(port),
            "-t", str(PROCESSORS), "-np", str(slots), "-c", str(slots * context),
            "--no-kv-unified",
        ]  # fmt: skip
    return [
        *shlex.split(args.gemlax), "--model", str(args.model), "--port", str(port),
        "--slots", str(slots), "--context", str(context), "--max-queue", "256",
        "--compilation-cache", str(CACHE / "programs"),
    ]  # fmt: skip


@contextlib.asynccontextmanager
async def started(
    name: str, args: argparse.Namespace, slots: int, context: int
) -> AsyncIterator[Server]:
    """Start a server, wait until it is healthy and has answered once; end it afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = dict(os.environ)
    if name == "llama-server":
        environment["LD_LIBRARY_PATH"] = str(args.llama_server.parent)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command(name, args, port, slots, context), stdout=log, stderr=log, env=environment,
            start_new_session=True,
        )  # fmt: skip
        running = Server(name, process, port)
        try:
            await healthy(running, args.patience)
            running.model = await server.find_model(running.target)
            workload = Workload(running.model, ignore_eos=True, seed=-1)
            await server.read_answer(running.target, PATH, *workload.bodies(1))
            yield running
        except RequestError as error:
            log.seek(0)
            tail = log.read()[-800:].decode("utf-8", "replace")
            raise RequestError(f"{name}: {error}\n{tail}") from error
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def healthy(running: Server, patience: float) -> None:
    end = time.monotonic() + patience
    while True:
        if running.process.poll() is not None:
            raise RequestError(f"it ended with status {running.process.returncode}")
        try:
            await request_json(running.target, "GET", "/health", timeout=5)
            return
        except RequestError:
            if time.monotonic() > end:
                raise
        await asyncio.sleep(0.5)


async def measured(running: Server, answers: Any) -> dict[str, Any]:
    """Wait for answers, and return their figures with the server's processor time and memory."""
    cpu_s = running.cpu_s()
    done = await answers
    figures = server.summarise(done, GOALS)
    per_token = 1e3 * (running.cpu_s() - cpu_s) / max(figures["total_output_tokens"], 1)
    return {
        "server": running.name, **figures, "cpu_ms_per_token": round(per_token, 2),
        "peak_mb": running.peak_mb(),
    }  # fmt: skip


async def load(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    runs = []
    async with started(name, args, slots=16, context=1024) as running:
        workload = Workload(
            running.model, Lengths(16, 256), Lengths(64, 64), ignore_eos=True, extra=running.extra
        )
        for at_once in map(int, args.at_once.split(",")):
            count = max(int(min(10 * at_once, 128) * args.scale), at_once)
            bodies = workload.bodies(count, at_once)
            answers = server.closed(running.target, PATH, bodies, at_once)
            runs.append({"at_once": at_once, **await measured(running, answers)})
    return runs


async def long(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Streams of short prompts for 40 s, first alone, then beside a long prompt every 10 s."""
    seconds, length = 40 * args.scale, max(int(8000 * args.scale), 500)
    runs = []
    async with started(name, args, slots=8, context=9216) as running:
        short = Workload(
            running.model, Lengths(16, 64), Lengths(96, 96), ignore_eos=True, extra=running.extra
        )
        prompts = short._replace(prompts=Lengths(length, length), answers=Lengths(16, 16))
        for beside in (False, True):
            ending = time.monotonic() + seconds
            bodies = until(ending, short.bodies(1000, run=beside))
            streams = asyncio.create_task(
                measured(running, server.closed(running.target, PATH, bodies, 7))
            )
            answers = []
            for body in prompts.bodies(4) if beside else ():
                due = time.monotonic() + seconds / 4
                answers.append(await server.read_answer(running.target, PATH, body))
                await asyncio.sleep(max(0, due - time.monotonic()))
            run = {"beside": "8k prompts" if beside else "nothing", **await streams}
            if answers:
                run["long_ttft_s"] = round(statistics.median(a.ttft for a in answers), 2)
            runs.append(run)
    return runs


def until(ending: float, bodies: list[dict]) -> Iterator[dict]:
    for body in bodies:
        if time.monotonic() > ending:
            return
        yield body


async def chat(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    turns = max(int(20 * args.scale), 3)
    ttft: dict[int, list[float]] = {turn: [] for turn in range(1, turns + 1)}
    cached = total = 0
    async with started(name, args, slots=4, context=4096) as running:
        words = Workload(running.model, Lengths(40, 40), Lengths(40, 40), True, ignore_eos=True)
        for seed in range(3):
            messages: list[Any] = []
            for turn, body in enumerate(words._replace(seed=seed).bodies(turns), 1):
                messages += body["messages"]
                body = body | {"messages": messages}
                answer = await server.read_answer(running.target, words.path, body)
                messages.append({"role": "assistant", "content": answer.text})
                ttft[turn].append(1e3 * answer.ttft)
                if turn > 1:
                    cached += answer.cached_tokens or 0
                    total += answer.prompt_tokens
    medians = {turn: round(statistics.median(times), 1) for turn, times in ttft.items()}
    return [{
        "server": name, "turns": turns, "ttft_ms": medians, "second_ms": medians[2],
        "last_ms": medians[turns], "ratio": round(medians[turns] / medians[2], 2),
        "cached_share": round(cached / total, 3),
    }]  # fmt: skip


async def prefix(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    length = max(int(20_000 * args.scale), 1000)
    async with started(name, args, slots=4, context=length + 480) as running:
        workload = Workload(
            running.model, Lengths(64, 64), Lengths(32, 32), prefix_length=length, ignore_eos=True
        )
        bodies = workload.bodies(16)
        answers = server.closed(running.target, PATH, bodies, 4, timeout=3600)
        run = await measured(running, answers)
    prefilled = run["total_input_tokens"] - run.get("total_cached_tokens", 0)
    return [{"shared": length, "prefilled_tokens": prefilled, **run}]


async def schema(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    runs = []
    json_schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    async with started(name, args, slots=4, context=1024) as running:
        workload = Workload(running.model, Lengths(40, 40), Lengths(64, 64), True)
        for how, extra in {
            "free": {"ignore_eos": True},
            "schema": {"response_format": json_schema},
        }.items():
            bodies = workload._replace(extra=extra).bodies(
                max(int(24 * args.scale), 4), how == "free"
            )
            answers = server.closed(running.target, workload.path, bodies, 4)
            runs.append({"answers": how, **await measured(running, answers)})
    return runs


async def engine(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The same requests over HTTP, and given to an engine of this process."""
    if name != "gemlax":
        return []
    count = max(int(24 * args.scale), 8)
    async with started(name, args, slots=8, context=1024) as running:
        workload = Workload(running.model, Lengths(16, 64), Lengths(128, 128), ignore_eos=True)
        runs = []
        for turn in range(3):
            bodies = workload.bodies(count, run=turn)
            answers = server.closed(running.target, PATH, bodies, 8)
            runs.append(await measured(running, answers))
    over_http = min(runs, key=lambda run: run["cpu_ms_per_token"])
    bare = [in_process(args.model, workload.bodies(count, run=turn)) for turn in range(3)]
    alone = min(bare, key=lambda run: run["cpu_ms_per_token"])
    overhead = over_http["cpu_ms_per_token"] / alone["cpu_ms_per_token"] - 1
    return [over_http, {"server": "engine", **alone, "overhead": round(overhead, 3)}]


def in_process(model: Path, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    import gemlax
    from gemlax.engine import Engine, Request
    from gemlax.sampling import make_sampling

    if model not in LOADED:
        LOADED[model] = gemlax.load(model, implementation="cpu").programs
    programs = LOADED[model]
    settings = make_sampling(programs.num_tokens, [0], temperature=0.0).row(0)
    figures: dict[str, Any] = {}
    for _ in range(2):  # the first compiles
        running = Engine(programs, 8, 1024)
        begin, cpu, tokens = time.perf_counter(), time.process_time(), 0
        for body in bodies:
            ids = tuple(body["prompt"])
            running.submit(Request(ids, len(ids) + body["max_tokens"], settings))
        while running.num_running or running.num_waiting:
            tokens += sum(len(event.tokens) for event in running.step(1))
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        figures = {
            "output_throughput": round(tokens / seconds, 2),
            "cpu_ms_per_token": round(1e3 * cpu / tokens, 2),
        }
    return figures


LOADED: dict[Path, Any] = {}
CASES: dict[str, Callable[..., Any]] = {
    "load": load, "long": long, "chat": chat, "prefix": prefix, "schema": schema, "engine": engine,
}  # fmt: skip
# What the table of a case shows: its heading, and the figures of a run.
COLUMNS = {
    "load": "at_once server output_throughput ratio p50_ttft_ms p99_ttft_ms p50_tpot_ms p50_itl_ms "
    "p99_itl_ms request_goodput cpu_ms_per_token peak_mb failed",
    "long": "beside server output_throughput ratio p50_itl_ms p99_itl_ms long_ttft_s failed",
    "chat": "server turns second_ms last_ms ratio cached_share",
    "prefix": "shared server duration total_input_tokens prefilled_tokens p50_ttft_ms p99_ttft_ms "
    "peak_mb failed",
    "schema": "answers server output_throughput ratio p50_tpot_ms cpu_ms_per_token failed",
    "engine": "server output_throughput cpu_ms_per_token overhead",
}
KEYS = {"load": "at_once", "long": "beside", "schema": "answers"}


def add_ratios(name: str, runs: list[dict[str, Any]]) -> None:
    """Give gemlax's runs their tokens a second over those of llama-server."""
    key = KEYS.get(name)
    peers = {run[key]: run for run in runs if run["server"] == "llama-server"} if key else {}
    for run in runs:
        if run["server"] == "gemlax" and key and run[key] in peers:
            peer = peers[run[key]]["output_throughput"]
            run["ratio"] = round(run["output_throughput"] / peer, 2)


def tables(results: dict[str, list[dict[str, Any]]]) -> str:
    parts = [f"{report.machine()}; load {os.getloadavg()[0]:.1f} at the end."]
    for name, runs in results.items():
        columns = COLUMNS[name].split()
        head = [column.replace("_", " ") for column in columns]
        rows = [[run.get(column, "-") for column in columns] for run in runs]
        parts.append(f"{name}:\n\n{report.table(head, rows)}")
    return "\n\n".join(parts)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=CACHE / "gemma-3-270m-q4_k_m.gguf")
    default = CACHE / "llama-server" / "bin" / "llama-server"
    parser.add_argument("--llama-server", type=Path, default=default, metavar="FILE")
    parser.add_argument("--gemlax", default=f"{sys.executable} -m gemlax.cli serve")
    parser.add_argument("--servers", default="gemlax,llama-server")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--at-once", default="1,4,16,64", help="streams of the case load")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--patience", type=float, default=900, help="seconds until it is healthy")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    parser.add_argument("--json", action="store_true", help="nothing but the JSON line")
    return parser.parse_args()


def main() -> None:
    args = parse()
    args.llama_server = args.llama_server.resolve()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # servers are ended in any case
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:PROCESSORS])
    results: dict[str, list[dict[str, Any]]] = {}
    for name in args.cases.split(","):
        runs = []
        for peer in args.servers.split(","):
            try:
                runs += asyncio.run(CASES[name](peer, args))
            except RequestError as error:
                print(f"{name}: {error}", file=sys.stderr, flush=True)
        runs.sort(key=lambda run: run.get(KEYS.get(name, ""), 0) if name == "load" else 0)
        add_ratios(name, runs)
        results[name] = runs
        if not args.json:
            print(tables({name: runs}), flush=True)
    if args.write:
        report.write_section("race", tables(results))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
