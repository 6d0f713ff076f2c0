"""`gemlax tune`: what it writes and says, and arguments that exclude one another."""

import dataclasses
import json
from pathlib import Path

import pytest
from adapters import build
from golden.conditioned import conditioned_weights
from test_tune_run import write_data
from vocabularies import chat_tokenizer

import gemlax
from gemlax import cli
from gemlax.adapters import Rule
from gemlax.cli.parser import make_parser
from gemlax.cli.tune import settings_of
from gemlax.config import edit
from gemlax.names import text_weights
from gemlax.tune import TuneSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune-command")
    tokenizer = chat_tokenizer("gemma3")
    config = edit(
        gemlax.tiny(gemlax.preset("gemma-3-270m"), num_hidden_layers=1),
        vocab_size=tokenizer.num_tokens,
        hidden_size=96,
    )
    decoder = build(config, conditioned_weights("tune", text_weights(config.text)))
    gemlax.save(gemlax.Model(config, decoder, tokenizer), folder / "model")
    write_data(folder)
    pairs = [{"prompt": "abc", "chosen": "cba", "rejected": "abc"}] * 4
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (folder / "bad.jsonl").write_text('{"text": "abc"}\n{"text": \n')
    (folder / "rules.json").write_text(json.dumps({"*.q_proj": {"rank": 2}, "*.v_proj": 4}))
    return folder


def tune(folder, *arguments, data="data.jsonl", output="out"):
    given = ["tune", str(folder / data), "--output", str(folder / output)]
    short = ["--model", str(folder / "model"), "--max-length", "48", "--steps", "2", "--quiet"]
    return cli.main([*given, *short, "--batch-size", "2", *arguments])


def test_an_adapter_on_codes_is_tuned_and_described(folder, capsys):
    held_out = ["--eval-data", str(folder / "data.jsonl")]
    assert tune(folder, "--quantize", "int8", "--json", "--learning-rate", "0.01", *held_out) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 2 and found["eval_loss"] < found["eval_loss_before"]
    config = json.loads((folder / "out/adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert tune(folder) == 1
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.slow
def test_all_weights_and_preferences_are_tuned(folder, capsys):
    assert tune(folder, "--full", output="full") == 0
    assert "full: 2 steps, loss " in capsys.readouterr().out
    before, after = (gemlax.load(folder / name) for name in ("model", "full/model"))
    assert abs(before.logits([[2, 5]]) - after.logits([[2, 5]])).max() > 1e-5
    assert tune(folder, "--dpo", "--json", data="pairs.jsonl", output="preferred") == 0
    line = (folder / "preferred/log.jsonl").read_text().splitlines()[0]
    assert json.loads(line)["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_a_file_of_another_kind_is_told_before_a_model_is_loaded(folder, capsys, monkeypatch):
    monkeypatch.setattr(gemlax, "load", None)
    (folder / "table.csv").write_text("text\na\n")
    assert tune(folder, data="table.csv", output="none") == 1
    assert "is a table: expected one JSON object per line" in capsys.readouterr().err
    assert tune(folder, "--eval-data", str(folder / "no.jsonl"), output="none") == 1
    assert "there is no file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "held", "message"),
    [
        ([], {"run.json": "{}"}, "holds a run already"),
        ([], {"log.jsonl": ""}, "log.jsonl is there already, of no run that is known"),
        (["--resume"], {}, "holds no run to go on with"),
        (["--resume"], {"run.json": '{"seed": 7}'}, "holds another run: "),
        (["--adapter", "some"], {}, "the model has adapters beside its weights"),
    ],
)
def test_a_run_that_cannot_be_is_told_before_a_model_is_loaded(
    folder, tmp_path, capsys, monkeypatch, arguments, held, message
):
    monkeypatch.setattr(gemlax, "load", None)
    for name, text in held.items():
        (tmp_path / name).write_text(text)
    assert tune(folder, *arguments, output=tmp_path) == 1
    assert message in capsys.readouterr().err


def test_markers_in_texts_are_an_option():
    given = make_parser().parse_args(["tune", "d", "--output", "o", "--no-parse-special"])
    assert not settings_of(given).parse_special
    assert settings_of(make_parser().parse_args(["tune", "d", "--output", "o"])).parse_special


def test_a_broken_line_is_one_line_of_error(folder, capsys):
    assert tune(folder, data="bad.jsonl", output="none") == 1
    told = capsys.readouterr().err
    assert told.startswith("gemlax: ") and "bad.jsonl, line 2: not JSON" in told
    assert told.count("\n") == 1
    assert not (folder / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--full", "--rank", "4"], "--full trains all weights"),
        (["--beta", "0.1"], "--beta is for --dpo"),
        (["--rules", "rules.json", "--rank", "4"], "--rules gives rank"),
        (["--rank", "0"], "rank of an adapter must be at least 1"),
    ],
)
def test_arguments_that_exclude_one_another_are_named(folder, capsys, arguments, message):
    assert tune(folder, *arguments, output="none") == 1
    assert message in capsys.readouterr().err


def test_arguments_become_settings(folder):
    parse = make_parser().parse_args
    start = ["tune", "data.jsonl", "--output", "out"]
    assert settings_of(parse(start)).rules == Rule(rank=8, alpha=16.0)
    assert settings_of(parse([*start, "--dpo"])).beta == 0.1
    by_name = settings_of(parse([*start, "--rules", str(folder / "rules.json")]))
    assert by_name.rules == {"*.q_proj": Rule(rank=2), "*.v_proj": 4}
    other = settings_of(parse([*start, "--no-remat", "--no-packing", "--accumulate", "2"]))
    assert (other.remat, other.pack, other.accumulate) == (False, False, 2)


def test_the_docs_have_the_table_of_settings():
    """If this fails, put the table that it shows into docs/tune.md."""
    lines = ["| setting | default | what it does |", "|---|---|---|"]
    for field in dataclasses.fields(TuneSettings):
        default = field.metadata["unset"] if field.default is None else f"{field.default}"
        lines.append(f"| `{field.name}` | {default} | {field.metadata['help']} |")
    table = "\n".join(lines)
    page = Path(__file__).resolve().parent.parent / "docs" / "tune.md"
    assert table in page.read_text(), table


def test_each_setting_has_an_option_whose_help_has_its_default(capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args(["tune", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    settings_without = {"rules", "beta", "warmup", "floor"}
    for field in dataclasses.fields(TuneSettings):
        if field.name in settings_without or isinstance(field.default, bool):
            continue
        default = field.metadata["unset"] if field.default is None else field.default
        assert f"{field.metadata['help']} (default: {default})" in text, field.name
