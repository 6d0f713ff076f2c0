"""Two servers behind vllm-router: one is killed, and only its own streams are lost.

The servers speak what `gemlax serve` speaks, without a model: what is tested is that the router
takes such servers as they are: it needs their API and an open /health, and passes keys on.
"""

import asyncio
import contextlib
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemlax.bench import server
from gemlax.bench.client import Target
from gemlax.bench.server import Answer, Workload

pytest.importorskip("vllm_router")
pytestmark = pytest.mark.slow

FAKE = Path(__file__).resolve().parent / "fake_server.py"


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def process(*command: str, **how) -> Iterator[subprocess.Popen]:
    running = subprocess.Popen(command, **how)
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


@contextlib.contextmanager
def replicas(count: int) -> Iterator[dict[str, subprocess.Popen]]:
    """Yield the servers by their addresses."""
    with contextlib.ExitStack() as stack:
        python = (sys.executable, str(FAKE))
        how = {"stdout": subprocess.PIPE, "text": True}
        running = [stack.enter_context(process(*python, **how)) for _ in range(count)]
        yield {one.stdout.readline().strip(): one for one in running}


@contextlib.contextmanager
def routed(urls: list[str], log: Path) -> Iterator[Target]:
    port, metrics = free_ports(2)
    with log.open("w") as out, process(
        sys.executable, "-m", "vllm_router.launch_router", "--worker-urls", *urls,
        "--port", str(port), "--prometheus-port", str(metrics), "--policy", "round_robin",
        "--health-check-interval-secs", "1", stdout=out, stderr=out,
    ) as router:  # fmt: skip
        end = time.monotonic() + 60
        while not is_healthy(port):
            assert router.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield Target("127.0.0.1", port, api_key="secret")


def is_healthy(port: int) -> bool:
    with contextlib.suppress(OSError):
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).status == 200
    return False


def ask(router: Target, chat: bool, count: int, at_once: int = 1) -> list[Answer]:
    workload = Workload("fake", chat=chat)
    bodies = workload.bodies(count)
    return asyncio.run(server.closed(router, workload.path, bodies, at_once, timeout=30))


def test_a_killed_server_costs_its_own_streams_and_no_later_request(tmp_path):
    with replicas(2) as servers, routed(list(servers), tmp_path / "router.log") as router:
        for chat in (False, True):
            answers = ask(router, chat, 6, at_once=2)
            assert [answer.error for answer in answers] == [None] * 6
            assert {answer.text for answer in answers} == {"a" * 20}

        async def kill_one() -> list[Answer]:
            workload = Workload("fake")
            streams = server.closed(router, workload.path, workload.bodies(8), 8, timeout=30)
            task = asyncio.create_task(streams)
            await asyncio.sleep(0.2)
            next(iter(servers.values())).kill()
            return await task

        broken = [answer for answer in asyncio.run(kill_one()) if answer.error is not None]
        assert len(broken) == 4  # round robin: half of them were its own
        assert all(re.search("broke off", answer.error) for answer in broken)
        for chat in (False, True):
            assert [answer.error for answer in ask(router, chat, 6)] == [None] * 6
