"""The arguments of the command line, and what its help says. Nothing is run here."""

import argparse
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from gemlax.tune.command import add_arguments

__all__ = ["CHAT_TOKENS", "make_parser"]

# The most tokens of an answer, where neither the user nor the checkpoint says how many.
CHAT_TOKENS = 1024

_EXAMPLES = {
    "generate": """examples:
  gemlax generate "The capital of France is"
  gemlax generate --model gemma-3-1b-pt/ --temperature 0.8 --top-k 64 --seed 7 "Once upon a time"
  cat story.txt | gemlax generate - --max-new-tokens 64 --json
  gemlax generate --model gemma-3-27b-it/ --mesh data=2,tensor=4 "Once upon a time"

On several hosts, run the same command on each with --coordinator HOST:PORT --num-processes N
--process-id I; the first prints. To try a mesh on one CPU, set
XLA_FLAGS=--xla_force_host_platform_device_count=8 before.
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
    "quantize": """examples:
  gemlax quantize gemma-3-1b-pt/ gemma-3-1b-int8/ --format int8
  gemlax quantize gemma-3-1b-pt/ gemma-3-1b-int4/ --format int4 --calibration text.txt
  gemlax quantize model.gguf smaller/ --rules rules.json --json

Rules are a JSON object: a format (int8, int4, nf4 or dense) by pattern of weight names, as in
{"embed_tokens.weight": "int8", "*.mlp.*": "int4"}; the first pattern that fits counts, and what
none fits stays dense. --format is for every matrix but routers. gemlax alone reads the target;
gemlax convert makes floats of it again. A source that is quantised already is decoded first.
""",
    "tune": """examples:
  gemlax tune train.jsonl --output tuned --eval-data held-out.jsonl --epochs 3
  gemlax tune train.jsonl --output tuned --epochs 3 --resume
  gemlax tune train.jsonl --model gemma-3-1b-it/ --quantize nf4 --rank 16 --output tuned
  gemlax tune pairs.jsonl --dpo --beta 0.1 --output preferred

A line of the data is an object with "messages" (or ShareGPT's "conversations"), "prompt" and
"completion", "instruction" and "output", or "text"; for --dpo with "prompt", "chosen" and
"rejected" (docs/tune.md has all forms). What the model says is learnt, no prompt. Markers such as
<end_of_turn> in texts are read as such, in messages never.
The folder gets the adapter as peft writes it (with --full a model), log.jsonl, loss.png and
checkpoints, from the last of which --resume goes on to the same losses.
""",
    "info": """examples:
  gemlax info gemma-3-4b --context 32768
  gemlax info model.gguf --json
  gemlax info --all
""",
    "perplexity": """examples:
  gemlax perplexity book.txt --model gemma-3-1b-pt/
""",
    "bench": """examples:
  gemlax bench decode --depth 4096
  gemlax bench prefill --model gemma-3-1b --dtype bfloat16 --prompt-length 2048
  gemlax bench compile --model gemma-3-27b --tiny --layers unroll

A preset gets random weights. What is read per step is compared with what this machine reads at
best, measured in the same run. The last line is JSON. gemlax bench decode --help lists options.
""",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"gemlax: {message}; see {self.prog} --help\n")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser; `command` of what it parses names the command."""
    parser = _Parser(prog="gemlax", description="Google's Gemma in JAX.")
    parser.add_argument("--version", action="version", version=f"gemlax {version('gemlax')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(_command(commands, "generate", "continue a text"))
    _add_chat(_command(commands, "chat", "talk to a model"))
    _add_convert(_command(commands, "convert", "write a model as a Hugging Face folder"))
    _add_quantize(_command(commands, "quantize", "write a model with its matrices quantised"))
    _add_tune(_command(commands, "tune", "train an adapter, or all weights"))
    _add_info(_command(commands, "info", "what a model is and costs, without loading it"))
    _add_perplexity(_command(commands, "perplexity", "score a text file"))
    _add_bench(_command(commands, "bench", "measure speed and memory on this machine"))
    return parser


def _command(commands: Any, name: str, text: str) -> Any:
    return commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=_EXAMPLES[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="M", help="folder, .gguf file or name; default: demo")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of weights and maths")
    parser.add_argument("--layers", choices=["scan", "unroll"], help="default: the faster one")
    parser.add_argument("--kv-cache", choices=["int8"], help="hold keys and values in 8 bits")
    parser.add_argument(
        "--quantize",
        choices=["stored", "dense", "int8", "int4", "nf4"],
        help="how matrices are held; default: as the file has them where native kernels run",
    )
    parser.add_argument(
        "--implementation",
        choices=["xla", "cpu"],
        help="cpu: the native kernels, or an error; default: the kernels where they were built",
    )
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter, as peft writes it")
    parser.add_argument(
        "--compilation-cache",
        metavar="DIR",
        help="keep compiled programs there; the next run starts faster",
    )
    parser.add_argument(
        "--mesh",
        metavar="AXES",
        help="spread over all devices: sizes of data, fsdp, tensor, expert, as data=2,tensor=4",
    )
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of process 0, for several hosts"
    )
    parser.add_argument("--num-processes", type=int, metavar="N", help="how many hosts there are")
    parser.add_argument("--process-id", type=int, metavar="I", help="0 to N - 1: which one this is")
    parser.add_argument("--json", action="store_true", help="end with one JSON line on stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompt", nargs="?", help="the text; '-' or nothing: read stdin, but for its last line end"
    )
    parser.add_argument("--file", type=Path, metavar="F", help="read the prompt from a file")
    _add_model(parser)
    _add_sampling(parser, new_tokens=256)
    _add_parse_special(parser)


def _add_parse_special(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--parse-special",
        action="store_true",
        help="read markers in the text, as <start_of_turn>, as control tokens",
    )


def _add_sampling(parser: argparse.ArgumentParser, new_tokens: int) -> None:
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"default: as the checkpoint says, else {new_tokens}",
    )
    parser.add_argument("--min-new-tokens", type=int, metavar="N", help="no end before so many")
    parser.add_argument("--context", type=int, metavar="N", help="most tokens, prompt included")
    parser.add_argument("--temperature", type=float, metavar="T", help="0: take the likeliest")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--min-p", type=float, metavar="P")
    parser.add_argument("--repetition-penalty", type=float, metavar="X")
    parser.add_argument("--presence-penalty", type=float, default=0.0, metavar="X")
    parser.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X")
    parser.add_argument(
        "--no-repeat-ngram-size", type=int, metavar="N", help="N tokens in a row come once"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument(
        "--stop",
        action="append",
        type=_unescaped,
        default=[],
        metavar="TEXT",
        help=r"end before this text; may repeat; \n, \t and \\ stand for newline, tab, backslash",
    )
    parser.add_argument(
        "--speculate",
        type=int,
        metavar="N",
        help="draft N tokens from the text so far; the same answer, sooner where a text repeats",
    )


def _unescaped(text: str) -> str:
    """Read the escapes of newline, tab and backslash; any other backslash is one."""
    meant = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
    return re.sub(r"\\[nt\\]", lambda escape: meant[escape[0]], text)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    parser.add_argument("--thinking", action="store_true", help="let it reason first (Gemma 4)")
    _add_sampling(parser, new_tokens=CHAT_TOKENS)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    _add_source_and_target(parser)
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of the weights; default: as stored, and float32 for float16 and quantised ones",
    )


def _add_quantize(parser: argparse.ArgumentParser) -> None:
    _add_source_and_target(parser)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--format", choices=["int8", "int4", "nf4"], help="of every matrix")
    how.add_argument("--rules", type=Path, metavar="F", help="a JSON file: formats by name")
    text = "a text that int4 shall suit, some thousand tokens; default: a page of ours"
    parser.add_argument("--calibration", type=Path, metavar="F", help=text)


def _add_tune(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    _add_model(parser)


def _add_source_and_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="folder, .gguf file or name")
    parser.add_argument("target", type=Path, help="a new folder, in one that exists")
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter, added to the weights")
    parser.add_argument("--overwrite", action="store_true", help="replace the model at the target")
    parser.add_argument("--json", action="store_true", help="one JSON line on stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="folder, .gguf file, name or preset")
    parser.add_argument("--all", action="store_true", help="the KV memory of every preset")
    parser.add_argument("--context", type=int, metavar="N", help="KV bytes at this many tokens")
    parser.add_argument("--json", action="store_true", help="one JSON line on stdout")


def _add_perplexity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a UTF-8 text file; '-': stdin")
    _add_model(parser)
    parser.add_argument("--window", type=int, default=2048, metavar="N", help="tokens at a time")
    _add_parse_special(parser)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="what", required=True, metavar="decode|prefill|compile")
    decode = _add_case(kinds.add_parser("decode", help="tokens one by one"))
    decode.add_argument("--depth", type=int, default=128, metavar="N", help="tokens before them")
    decode.add_argument("--steps", type=int, default=16, metavar="N", help="tokens in a round")
    prefill = _add_case(kinds.add_parser("prefill", help="a prompt"))
    prefill.add_argument("--depth", type=int, default=0, metavar="N", help="tokens before it")
    compilation = _add_case(kinds.add_parser("compile", help="the programs of both"))
    for each in (prefill, compilation):
        each.add_argument("--prompt-length", type=int, default=512, metavar="N", help="tokens")


def _add_case(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument(
        "--model", metavar="M", help="preset (random weights), folder, .gguf file or name"
    )
    parser.add_argument("--tiny", action="store_true", help="its layers at toy width, random")
    parser.set_defaults(compilation_cache=None, mesh=None, coordinator=None)
    parser.set_defaults(num_processes=None, process_id=None, kv_cache=None)
    parser.set_defaults(quantize=None, implementation=None, adapter=None)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--layers", choices=["scan", "unroll"], help="default: the faster one")
    parser.add_argument("--cache", choices=["stacked", "list", "paged"], default="stacked")
    parser.add_argument("--linen", action="store_true", help="the Linen decoder")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="rows")
    parser.add_argument(
        "--capacity", type=int, metavar="N", help="tokens that the cache has room for"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="after one of warm-up")
    parser.add_argument("--json", action="store_true", help="nothing but the JSON line on stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return parser
