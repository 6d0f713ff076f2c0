"""`gemlax serve` as a process: from its first line to its exit status."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

pytestmark = pytest.mark.deep

ROOT = Path(__file__).resolve().parents[2]
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 400, "stream": True}


@pytest.fixture
def process(gguf_path):
    """A server of the real model on a free port, and its address."""
    command = [
        sys.executable,
        "-m",
        "gemlax.cli",
        "serve",
        "--model",
        str(gguf_path),
        "--port",
        "0",
    ]
    command += ["--slots", "1", "--context", "512", "--drain", "60"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "JAX_NUM_CPU_DEVICES": "1"}
    piped = {"stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **piped) as started:
        try:
            line = started.stdout.readline()
            yield started, re.search(r"http://[\d.:]+", line)[0]
        finally:
            started.kill()


@pytest.mark.slow
def test_sigterm_lets_an_answer_end_and_the_status_is_0(process):
    started, address = process
    with httpx2.stream("POST", f"{address}/v1/chat/completions", json=HELLO, timeout=60) as stream:
        lines = stream.iter_lines()
        first = next(lines)
        started.send_signal(signal.SIGTERM)
        refused = httpx2.get(f"{address}/health")
        rest = list(lines)
    assert "chat.completion.chunk" in first
    assert refused.status_code == 503
    assert rest[-2:] == ["data: [DONE]", ""] or "data: [DONE]" in rest[-3:]
    assert started.wait(60) == 0


@pytest.mark.slow
def test_a_second_signal_ends_at_once(process):
    started, address = process
    with httpx2.stream("POST", f"{address}/v1/chat/completions", json=HELLO, timeout=60) as stream:
        next(stream.iter_lines())
        started.send_signal(signal.SIGTERM)
        httpx2.get(f"{address}/health")
        started.send_signal(signal.SIGTERM)
        assert started.wait(20) != 0


def test_without_a_key_no_other_host_is_taken():
    command = [sys.executable, "-m", "gemlax.cli", "serve", "--model", "none", "--host", "0.0.0.0"]
    environment = {name: value for name, value in os.environ.items() if name != "GEMLAX_API_KEY"}
    environment["PYTHONPATH"] = str(ROOT / "src")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "--no-auth" in done.stderr
