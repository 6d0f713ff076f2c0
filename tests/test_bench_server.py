"""`gemlax bench --server` against a server whose answers are known, and come at known times."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable

import pytest
from fake_server import FakeServer, running

from gemlax import cli
from gemlax.bench import server
from gemlax.bench.client import Target
from gemlax.bench.server import Answer, Goals, Lengths, Workload
from gemlax.errors import RequestError

PLAIN = Workload("fake")
LATE = 0.04  # what an event may be late on a busy machine, in seconds


def load(fake: FakeServer, work: Callable[[Target], Awaitable[list[Answer]]]) -> list[Answer]:
    """Run the server and the load in one loop, so that what delays one delays both."""

    async def both() -> list[Answer]:
        await fake.start()
        async with fake.server:
            return await work(Target.parse(fake.url))

    return asyncio.run(both())


def closed(
    fake: FakeServer, count: int, concurrency: int, workload: Workload = PLAIN
) -> list[Answer]:
    bodies = workload.bodies(count)
    return load(fake, lambda at: server.closed(at, workload.path, bodies, concurrency))


def run(capsys, fake: FakeServer, *options: str) -> tuple[int, str, str]:
    """Return the exit status of the command, and what it printed."""
    with running(fake):
        url = ("--server", fake.url)
        status = cli.main(["bench", *url, "--num-requests", "4", "--quiet", *options])
    done = capsys.readouterr()
    return status, done.out, done.err


@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "until it closes"])
def test_times_are_those_at_which_text_came(chat, chunked):
    fake = FakeServer((0.08, 0.02, 0.05), chunked=chunked)
    (answer,) = closed(fake, 1, 1, Workload("fake", chat=chat))
    assert answer.error is None
    assert answer.text == "aaa"
    assert (answer.prompt_tokens, answer.tokens, answer.cached_tokens) == (10, 3, 4)
    assert 0.08 <= answer.ttft <= fake.sent[0][0] - answer.start + LATE
    for came, sent in zip(answer.times, fake.sent[0], strict=True):
        assert sent <= came <= sent + LATE
    assert answer.tpot == pytest.approx((answer.times[2] - answer.times[0]) / 2)


def test_figures_are_those_of_the_answers():
    answers = [
        Answer(10.0, (10.1, 10.2, 10.4), 10.4, prompt_tokens=5, tokens=3, cached_tokens=2),
        Answer(10.0, (10.3,), 10.3, prompt_tokens=7, tokens=1),
        Answer(11.0, (), 12.0, error="broke off"),
    ]
    report = server.summarise(answers, Goals(ttft=200))
    assert (report["completed"], report["failed"], report["duration"]) == (2, 1, 2.0)
    assert report["errors"] == {"broke off": 1}
    assert (report["total_input_tokens"], report["total_output_tokens"]) == (12, 4)
    assert (report["output_throughput"], report["total_token_throughput"]) == (2.0, 8.0)
    assert (report["request_throughput"], report["request_goodput"]) == (1.0, 0.5)
    assert report["total_cached_tokens"] == 2
    assert (report["mean_ttft_ms"], report["p50_ttft_ms"]) == (200.0, 200.0)
    assert report["p99_ttft_ms"] == pytest.approx(298.0)
    assert (report["mean_itl_ms"], report["p99_itl_ms"]) == (150.0, pytest.approx(199.0))
    assert report["mean_tpot_ms"] == pytest.approx(150.0)
    assert report["mean_e2el_ms"] == pytest.approx(350.0)
    with pytest.raises(RequestError, match="every request failed: broke off"):
        server.summarise(answers[2:])


@pytest.mark.parametrize("concurrency", [1, 3, 20])
def test_a_closed_loop_keeps_so_many_requests_running(concurrency):
    fake = FakeServer((0.01, 0.01))
    answers = closed(fake, 9, concurrency)
    assert len(answers) == 9
    assert all(answer.error is None for answer in answers)
    assert fake.most_running == min(concurrency, 9)


def test_poisson_arrivals_follow_the_seed_and_wait_for_no_answer():
    fake, bodies = FakeServer((0.15, 0.0)), Workload("fake").bodies(5)
    answers = load(fake, lambda at: server.poisson(at, "/v1/completions", bodies, 50, seed=3))
    assert len(answers) == 5
    assert fake.most_running > 1
    generator, due = random.Random(3), fake.arrivals[0]
    for arrival in fake.arrivals:
        assert due - LATE <= arrival <= due + LATE
        due += generator.expovariate(50)


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ("break", "the answer broke off"),
        ("error", "out of luck"),
        ("garbage", "an event is malformed"),
        (429, "answered 429: as it was told"),
    ],
)
def test_a_request_that_fails_is_counted_and_the_others_go_on(failure, reason):
    answers = closed(FakeServer(failures=[failure]), 3, 1)
    assert [answer.error is None for answer in answers] == [False, True, True]
    assert reason in answers[0].error
    report = server.summarise(answers)
    assert (report["completed"], report["failed"]) == (2, 1)
    assert report["total_output_tokens"] == 4


def test_a_stream_that_ends_before_its_finish_reason_has_failed():
    (answer,) = closed(FakeServer(failures=["break"], chunked=False), 1, 1)
    assert answer.error == "the stream broke off before its end"


def test_a_server_that_is_silent_too_long_has_failed():
    fake, bodies = FakeServer((5.0,)), Workload("fake").bodies(1)
    path = "/v1/completions"
    (answer,) = load(fake, lambda at: server.closed(at, path, bodies, 1, timeout=0.05))
    assert answer.error.endswith("did not end its answer within 0.05 s")


def test_requests_follow_their_seed_and_share_a_prefix():
    lengths = Workload("m", Lengths(8, 400), Lengths(2, 9), prefix_length=20, ignore_eos=True)
    bodies = lengths.bodies(200)
    assert bodies == lengths.bodies(200)
    assert bodies != lengths._replace(seed=1).bodies(200)
    other = lengths.bodies(200, run=1)
    assert [len(body["prompt"]) for body in other] == [len(body["prompt"]) for body in bodies]
    assert all(a["prompt"][20:] != b["prompt"][20:] for a, b in zip(other, bodies, strict=True))
    sizes = [len(body["prompt"]) - 20 for body in bodies]
    assert (min(sizes), max(sizes)) >= (8, 300)
    assert max(sizes) <= 400
    assert sum(size < 57 for size in sizes) in range(80, 120)  # the middle of the logarithms
    assert len({tuple(body["prompt"][:20]) for body in bodies}) == 1
    assert {body["max_tokens"] for body in bodies} == set(range(2, 10))
    assert bodies[0]["ignore_eos"] is True
    assert "ignore_eos" not in Workload("m").bodies(1)[0]


def test_the_command_prints_a_table_and_one_line_of_json(capsys):
    fake = FakeServer()
    extra = ("--extra-body", '{"cache_prompt": false}', "--goodput", "ttft:60000")
    status, out, err = run(capsys, fake, "--concurrency", "1,2", "--seed", "5", *extra)
    assert (status, err) == (0, "")
    *table, last = out.splitlines()
    report = json.loads(last)
    assert table[0].split()[:4] == ["at", "once", "failed", "tok/s"]
    assert [line.split()[0] for line in table[1:3]] == ["1", "2"]
    assert [run["concurrency"] for run in report["runs"]] == [1, 2]
    assert all(run["completed"] == 4 for run in report["runs"])
    assert all(run["request_goodput"] == run["request_throughput"] for run in report["runs"])
    assert (report["benchmark"], report["model"], report["server"]) == ("server", "fake", fake.url)
    assert len(fake.bodies) == 9  # one to begin with
    assert all(body["cache_prompt"] is False for body in fake.bodies)
    assert fake.paths[0] == "/v1/models"


def test_with_json_there_is_one_line_and_rates_take_the_place_of_concurrency(capsys):
    fake = FakeServer()
    status, out, _ = run(capsys, fake, "--rate", "200", "--chat", "--json", "--model", "other")
    assert status == 0
    (only,) = out.splitlines()
    report = json.loads(only)
    assert [run["rate"] for run in report["runs"]] == [200]
    assert set(fake.paths) == {"/v1/chat/completions"}
    assert {body["model"] for body in fake.bodies} == {"other"}


def test_a_key_is_taken_from_the_option_or_the_environment(capsys, monkeypatch):
    options = ("--concurrency", "1", "--json")
    status, _, err = run(capsys, FakeServer(key="secret"), *options)
    assert status == 1
    assert "answered 401: wrong key; give the key with --api-key or in GEMLAX_API_KEY" in err
    assert run(capsys, FakeServer(key="secret"), *options, "--api-key", "secret")[0] == 0
    monkeypatch.setenv("GEMLAX_API_KEY", "secret")
    assert run(capsys, FakeServer(key="secret"), *options)[0] == 0


def test_where_nothing_listens_is_one_line_of_error(capsys):
    with running(FakeServer()) as fake:
        url = fake.url
    assert cli.main(["bench", "--server", url]) == 1
    assert capsys.readouterr().err == f"gemlax: {url}/v1/models: nothing listens there\n"


BAD = {
    "--concurrency 0": "--concurrency takes positive whole numbers as 1,4,16, got '0'",
    "--concurrency 1,x": "got '1,x'",
    "--rate nan": "--rate takes positive numbers",
    "--rate 1 --concurrency 1": "give --concurrency or --rate, not both",
    "--num-requests 0": "--num-requests and --timeout are positive",
    "--prompt-length 9-3": "a range of lengths begins at 1 or more and rises, got '9-3'",
    "--answer-length many": "a length is a number or a range as 32-512, got 'many'",
    "--goodput speed:3": "goals are given as ttft:1000,tpot:100,e2el:5000, got 'speed:3'",
    "--extra-body [1]": "--extra-body takes a JSON object, got '[1]'",
    "--server ftp://localhost": "--server takes an address as http://localhost:8000",
    "--server http://localhost:port": "--server takes an address as http://localhost:8000",
}


@pytest.mark.parametrize("options", BAD)
def test_a_bad_option_is_refused_before_a_request_is_sent(capsys, options):
    assert cli.main(["bench", "--server", "localhost:1", *options.split()]) == 1
    error = capsys.readouterr().err
    assert BAD[options] in error
    assert error.count("\n") == 1


def test_a_server_and_a_case_exclude_each_other(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--server", "localhost:1", "decode"])
    assert stop.value.code == 2
    assert "give one of decode, prefill, compile and --server URL" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000"),
        ("https://localhost/models/v1", "https://localhost:443/models"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_addresses_are_read_as_people_write_them(url, shown):
    assert str(Target.parse(url)) == shown
