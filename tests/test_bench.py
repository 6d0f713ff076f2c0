"""`gemlax bench` at toy width: every subcommand reports what it says, of the engine's programs.

No time is asserted: the figures are checked for what they must be made of.
"""

import json
import mmap
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from gemlax import bench, cli, cost, preset, tiny
from gemlax.engine import Programs

pytestmark = pytest.mark.deep

# The pattern of 270M at toy width, in three rounds of two steps.
COMMON = ["--model", "gemma-3-270m", "--tiny", "--layers", "scan", "--rounds", "2", "--json"]
DECODE = ["decode", *COMMON, "--steps", "2"]
TEXT = tiny(preset("gemma-3-270m")).text
FORMS = {
    "float32": DECODE,
    "bfloat16": [*DECODE, "--dtype", "bfloat16"],
    "batch": [*DECODE, "--batch", "2"],
}
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
BAD = {
    "--steps 0": "steps must be at least 1, got 0",
    "--rounds 0": "rounds must be at least 1, got 0",
    "--batch 0": "batch must be at least 1, got 0",
    "--depth 0": "depth must be at least 1, got 0",
    "--capacity 100": "capacity must be at least 131 tokens, got 100",
    "--depth 40000": "40003 tokens are more than the context of 32768",
    "--model gemma-3-2b": "no model at 'gemma-3-2b'",
}


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    """Measure the machine on less than a processor's cache: the figure means nothing here."""
    monkeypatch.setattr(bench, "_READ_BYTES", 2**20)


def run(capsys, *arguments: str) -> tuple[str, dict]:
    """Return what was printed before the last line, and that line's JSON."""
    assert cli.main(["bench", *arguments, "--quiet"]) == 0
    done = capsys.readouterr()
    assert done.err == ""
    shown, _, last = done.out.rstrip("\n").rpartition("\n")
    return shown, json.loads(last)


def check_common(report: dict, what: str) -> None:
    assert report["benchmark"] == what
    assert report["model"] == "tiny gemma-3-270m"
    assert set(report["versions"]) == {"python", "gemlax", "jax", "flax"}
    assert report["versions"]["jax"] == jax.__version__
    assert report["device"].endswith(f"({jax.default_backend()})")
    assert (report["layers"], report["rounds"]) == ("scan", 2)


def check_aliased(aliased: int, report: dict) -> None:
    """The state is written in place: the caches, and little else."""
    assert report["cache_bytes"] < aliased < report["cache_bytes"] + 10_000 * report["batch"]


@pytest.mark.parametrize(
    "name", ["float32", "batch", pytest.param("bfloat16", marks=pytest.mark.slow)]
)
def test_decode_reports_times_bytes_and_their_share_of_the_machine(capsys, name):
    shown, report = run(capsys, *FORMS[name])
    assert shown == ""
    check_common(report, "decode")
    itemsize, batch = (2 if name == "bfloat16" else 4), (2 if name == "batch" else 1)
    assert report["batch"] == batch
    assert (report["depth"], report["steps"], report["capacity"]) == (128, 2, 256)
    assert report["step_ms_min"] <= report["step_ms"] <= report["step_ms_max"]
    assert report["tok_s"] == pytest.approx(1e3 * batch / report["step_ms"], rel=0.02)
    assert report["weight_bytes"] == itemsize * cost.parameters(TEXT)
    assert report["read_bytes"] == cost.decode_bytes(TEXT, 129, batch, itemsize, itemsize)
    gb_s = report["read_bytes"] / report["step_ms"] / 1e6
    assert report["gb_s"] == pytest.approx(gb_s, rel=0.02)
    share = report["gb_s"] / report["machine_gb_s"]
    assert report["bandwidth_share"] == pytest.approx(share, rel=0.02)
    assert report["cache_bytes"] == batch * cost.kv_bytes(TEXT, 256, itemsize)
    check_aliased(report["alias_bytes"], report)
    assert report["argument_bytes"] >= report["weight_bytes"] + report["cache_bytes"]
    assert report["temporary_bytes"] > 0
    assert report["compile_s"] > 0


def test_prefill_measures_the_prompt_after_what_the_cache_has(capsys, monkeypatch):
    sizes, prefill = [], Programs.prefill

    def note(self, state, tokens, positions, rows):
        sizes.append(int((positions >= 0).sum()))
        return prefill(self, state, tokens, positions, rows)

    monkeypatch.setattr(Programs, "prefill", note)
    prompt = ["--prompt-length", "600", "--depth", "10"]
    _, report = run(capsys, "prefill", *COMMON, *prompt)
    check_common(report, "prefill")
    assert (report["prompt_length"], report["capacity"]) == (600, 1024)
    assert report["tok_s"] == pytest.approx(600e3 / report["prompt_ms"], rel=0.02)
    assert report["cache_bytes"] == cost.kv_bytes(TEXT, 1024, 4)
    check_aliased(report["alias_bytes"], report)
    assert sizes == 3 * [9, 512, 88]


def test_compile_reports_both_programs(capsys):
    _, report = run(capsys, "compile", *COMMON, "--prompt-length", "20")
    check_common(report, "compile")
    for name in ("decode", "prefill"):
        for key in ("trace_s", "compile_s"):
            least, most = (report[f"{name}_{key}_{end}"] for end in ("min", "max"))
            assert 0 < least <= report[f"{name}_{key}"] <= most
        check_aliased(report[f"{name}_alias_bytes"], report)
        assert report[f"{name}_temporary_bytes"] > 0


def test_without_json_a_table_stands_before_the_last_line(capsys):
    shown, report = run(capsys, *(part for part in DECODE if part != "--json"))
    lines = (re.split(r" {2,}", line.strip()) for line in shown.splitlines())
    table = {name.replace(" ", "_"): value for name, value in lines}
    assert list(table) == [key for key in report if key != "versions"]
    assert table["weight_bytes"] == f"{report['weight_bytes']:,}"
    assert table["batch"] == "1"


@pytest.mark.parametrize("name", BAD)
def test_a_bad_option_is_one_line_of_error(capsys, name):
    assert cli.main(["bench", *DECODE, *name.split()]) == 1
    done = capsys.readouterr()
    assert done.out == ""
    assert done.err.count("\n") == 1
    assert BAD[name] in done.err


@pytest.mark.parametrize("wrong", ["decode --prompt-length 3", "prefill --steps 3", "run", ""])
def test_an_option_of_another_benchmark_is_refused(capsys, wrong):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *wrong.split()])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("gemlax: ")


def test_decode_steps_follow_the_depth_that_was_asked_for(monkeypatch):
    starts, decode = [], Programs.decode

    def note(self, state, rows, running, **how):
        starts.append((np.asarray(state.lengths).tolist(), how["steps"]))
        return decode(self, state, rows, running, **how)

    monkeypatch.setattr(Programs, "decode", note)
    config = tiny(preset("gemma-3-270m"))
    bench.decode(
        lambda: bench.random_model(config, layers="scan"), depth=5, steps=3, rounds=1, batch=2
    )
    assert [lengths for lengths, _ in starts] == 2 * [[5, 5], [6, 6]]


def test_every_form_of_cache_holds_the_same_after_the_same_run(monkeypatch):
    """Two rows, and a prompt that ends inside a chunk: rows and padding are told apart."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from cases import Case

    decoder = bench.random_decoder(TEXT, layers="scan")
    keys = {}
    for cache in ("stacked", "list", "paged"):
        case = Case(decoder, batch=2, capacity=64, cache=cache)
        case.prefill(case.compile_prefill(16), 16, 0, 21)
        held = case.decode(21, 3)
        if cache == "list":
            keys[cache] = np.stack([held[i].k for i in (5, 11, 17)])
        elif cache == "paged":
            pages = held["full_attention"].pages
            keys[cache] = pages.reshape(3, 2, 64, *pages.shape[3:])[..., 0::2, :]
        else:
            keys[cache] = held["full_attention"].k
    for found in keys.values():
        np.testing.assert_allclose(found, keys["stacked"], rtol=1e-5, atol=1e-5)
        assert np.abs(found[:, :, :24]).max(axis=(-1, -2)).min() > 0.1
        assert not np.any(found[:, :, 24:])


def test_the_machine_is_read_by_a_product_over_the_whole_buffer(monkeypatch):
    """Twice the bytes at the same speed take about twice as long: GB/s counts bytes read."""
    seen = []

    def fixed(works, rounds):
        (work,) = works.values()
        seen.append(work().shape)
        return {"read": bench.Times(0.5, 0.5, 0.5)}

    monkeypatch.setattr(bench, "timed", fixed)
    monkeypatch.setattr(bench, "_READ_BYTES", 2**22)
    assert bench.streaming_read() == pytest.approx(2**22 / 0.5 / 1e9)
    assert seen == [(1024,)]


def test_the_increase_of_memory_counts_what_was_written():
    before = bench._anonymous_bytes()
    # A mapping of its own: the allocator may hand out memory that was touched before.
    with mmap.mmap(-1, 2**26, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as written:
        written.write(b"x" * len(written))
        grown = bench._anonymous_bytes() - before
    assert 0.9 * 2**26 < grown < 3 * 2**26
