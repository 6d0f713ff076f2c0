"""`gemlax bench`: the engine in this process, or a server; a table, and one line of JSON."""

import argparse
import asyncio
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from gemlax.bench import client, server
from gemlax.cli import output
from gemlax.cli.loading import load, model_name
from gemlax.errors import Error

__all__ = ["run"]

_CONCURRENCY = "1,4,16,64"
_COLUMNS = {
    "failed": "failed", "tok/s": "output_throughput", "req/s": "request_throughput",
    "good/s": "request_goodput", "ttft p50": "p50_ttft_ms", "ttft p99": "p99_ttft_ms",
    "tpot p50": "p50_tpot_ms", "itl p99": "p99_itl_ms",
}  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measure what the arguments name."""
    if (args.what is None) == (args.server is None):
        args.usage_error("give one of decode, prefill, compile and --server URL")
    return _engine(args) if args.server is None else asyncio.run(_server(args))


def _engine(args: argparse.Namespace) -> int:
    from gemlax import bench

    name, build = _model(args)
    common = {"rounds": args.rounds, "batch": args.batch, "capacity": args.capacity}
    with output.status(args, "measuring"):
        if args.what == "decode":
            figures = bench.decode(build, depth=args.depth, steps=args.steps, **common)
        elif args.what == "prefill":
            length = args.prompt_length
            figures = bench.prefill(build, prompt_length=length, depth=args.depth, **common)
        else:
            figures = bench.compilation(build, prompt_length=args.prompt_length, **common)
    report = {"benchmark": args.what, "model": name, **bench.machine(), **figures}
    if not args.json:
        output.write_table((key, value) for key, value in report.items() if key != "versions")
    output.write(json.dumps(report))
    return 0


def _model(args: argparse.Namespace) -> tuple[str, Callable[[], Any]]:
    """Return the name of the model and what builds it."""
    from gemlax import bench, checkpoints
    from gemlax.presets import PRESETS, preset, tiny

    name = model_name(args)
    if name in PRESETS and not os.path.exists(name):
        config = preset(name)
    elif not args.tiny:
        return name, lambda: load(args)
    else:
        with checkpoints.open_checkpoint(checkpoints.find(name)) as source:
            config = source.config
    config = tiny(config) if args.tiny else config
    return f"tiny {name}" if args.tiny else name, lambda: bench.random_model(
        config, dtype=args.dtype, layers=args.layers
    )


async def _server(args: argparse.Namespace) -> int:
    """Send every run's requests; the options are checked before the first."""
    if args.rate is not None and args.concurrency is not None:
        raise Error("give --concurrency or --rate, not both")
    name = "concurrency" if args.rate is None else "rate"
    levels = _numbers(f"--{name}", args.rate or args.concurrency or _CONCURRENCY, name == "rate")
    if args.num_requests < 1 or args.prefix_length < 0 or args.timeout <= 0:
        raise Error("--num-requests and --timeout are positive, --prefix-length is not negative")
    goals = None if args.goodput is None else server.Goals.parse(args.goodput)
    target = client.Target.parse(args.server, args.api_key or os.environ.get("GEMLAX_API_KEY"))
    workload = server.Workload(
        "", server.Lengths.parse(args.prompt_length), server.Lengths.parse(args.answer_length),
        args.chat, args.prefix_length, args.ignore_eos, args.seed, _extra(args.extra_body),
    )  # fmt: skip
    workload = workload._replace(model=args.model or await server.find_model(target))
    runs = []
    with _bar(args, len(levels) * args.num_requests) as done:
        (first,) = workload.bodies(1, run=-1)
        await server.read_answer(target, workload.path, first, args.timeout)
        for index, level in enumerate(levels):
            bodies = workload.bodies(args.num_requests, index)
            send = (
                partial(server.closed, concurrency=int(level))
                if name == "concurrency"
                else partial(server.poisson, rate=level, seed=args.seed)
            )
            answers = await send(target, workload.path, bodies, timeout=args.timeout, done=done)
            runs.append({name: level, **server.summarise(answers, goals)})
    if not args.json:
        _write_runs(runs, name)
    settings = workload._asdict() | {"endpoint": workload.path, "goodput": args.goodput}
    report = {"benchmark": "server", "server": str(target), **settings, "runs": runs}
    output.write(json.dumps(report))
    return 0


def _numbers(option: str, text: str, fractions: bool) -> list[float]:
    """Read "1,4,16"."""
    try:
        numbers = [float(part) if fractions else int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if not all(0 < number < float("inf") for number in numbers):
        kind = "numbers" if fractions else "whole numbers"
        raise Error(f"{option} takes positive {kind} as 1,4,16, got {text!r}")
    return numbers


def _extra(text: str | None) -> dict[str, object]:
    try:
        extra = json.loads(text or "{}")
    except ValueError:
        extra = None
    if not isinstance(extra, dict):
        raise Error(f"--extra-body takes a JSON object, got {text!r}")
    return extra


def _write_runs(runs: Sequence[Mapping[str, object]], name: str) -> None:
    columns = {label: key for label, key in _COLUMNS.items() if runs[0][key] is not None}
    rows = [[run[name], *(_cell(run[key]) for key in columns.values())] for run in runs]
    output.write_table(rows, ["at once" if name == "concurrency" else "rate", *columns])
    output.write("tok/s of answers; ttft, tpot and itl in ms")
    for run in runs:
        errors = run.get("errors")
        for text, count in errors.items() if isinstance(errors, dict) else ():
            output.write(f"{count} failed at {name} {run[name]}: {text}")


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


@contextmanager
def _bar(args: argparse.Namespace, total: int) -> Iterator[Callable[[server.Answer], object]]:
    """Show how many requests have ended."""
    if not output.shows_progress(args):
        yield lambda answer: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda answer: progress.advance(task)
