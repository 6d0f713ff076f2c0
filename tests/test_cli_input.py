"""What the command line checks and reads before a model is loaded."""

import io

import pytest

import gemlax
from gemlax import cli
from gemlax.cli.commands import read_prompt
from gemlax.cli.parser import make_parser


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--temperature", "-1"], "temperature must be a finite number in [0, inf), got -1.0"),
        (["--top-k", "-2"], "top_k must be an integer >= -1"),
        (["--max-new-tokens", "-1"], "max_new_tokens must be an integer >= 0, got -1"),
        (["--context", "0"], "context must be a positive integer, got 0"),
        (["--speculate", "99"], "speculate must be None or in"),
        (["--seed", "-1"], "seed must be an integer in"),
        (["--stop", ""], "stop must be non-empty strings"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_options_are_refused_before_a_model_is_loaded(monkeypatch, capsys, options, said):
    monkeypatch.setattr(gemlax, "load", lambda *_, **__: pytest.fail("a model is loaded"))
    for command in (["generate", "hello"], ["chat"]):
        assert cli.main([*command, *options]) == 1
        assert capsys.readouterr().err.startswith(f"gemlax: {said}")


@pytest.mark.parametrize(
    ("written", "prompt"),
    [
        (b"The capital is\n", "The capital is"),
        (b"a\r\n", "a"),
        (b"a\n\n", "a\n"),
        (b"\xef\xbb\xbfa\nb", "a\nb"),
        (b"\n", ""),
    ],
    ids=repr,
)
def test_a_byte_order_mark_and_the_last_line_end_are_no_part_of_a_prompt(
    monkeypatch, tmp_path, written, prompt
):
    (tmp_path / "prompt.txt").write_bytes(written)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(written)))
    for arguments in (["-"], ["--file", str(tmp_path / "prompt.txt")]):
        assert read_prompt(make_parser().parse_args(["generate", *arguments])) == prompt
