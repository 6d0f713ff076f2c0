"""Two processes of four devices each, joined over loopback, against one device."""

import itertools
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from adapters import build
from golden.conditioned import conditioned_weights
from vocabularies import SPECIAL, toy

import gemlax
from gemlax.cli import main
from gemlax.generation import SamplingSettings
from gemlax.generation.answers import Answer, drive
from gemlax.names import text_weights

pytestmark = pytest.mark.deep

CONFIG = gemlax.tiny(gemlax.preset("gemma-3-4b"), num_hidden_layers=2)
MESH = "data=2,tensor=4"
PROMPT = "hello world"
PROMPTS = [[2, 40, 41, 42, 43], [2, 50], [2, 60, 61]]
TIMEOUT = 240
COMMAND = ["generate", "--layers", "scan", "--max-new-tokens", "5", PROMPT]
WORKER = """
import json, os, sys
folder, mesh, coordinator, process, *command = sys.argv[1:]
out = os.fdopen(os.dup(1), "w")
from gemlax.cli import main
joined = ["--mesh", mesh, "--num-processes", "2"]
assert main([*command, *joined, "--coordinator", coordinator, "--process-id", process]) == 0
print("the command ended", file=out)
import jax
import gemlax
from test_multihost import say
model = gemlax.load(folder, layers="scan", mesh=mesh)
assert (jax.device_count(), len(jax.local_devices())) == (8, 4)
try:
    gemlax.save(model, folder + "-saved")
except gemlax.UnsupportedError as error:
    assert "several processes" in str(error)
else:
    raise SystemExit("a model of two processes was saved")
print(json.dumps(say(model)), file=out, flush=True)
"""


def say(model) -> dict:
    """What a model says to several prompts, to a second turn, and of a text."""
    settings = SamplingSettings(max_new_tokens=5, temperature=0.0, logprobs=2)
    engine = model._engine(len(PROMPTS))

    def say(prompts):
        requests = model._requests(prompts, settings).requests
        answers = [Answer(request, None, 2) for request in requests]
        for _ in drive(engine, answers, itertools.repeat(5)):
            pass
        return [answer.completion() for answer in answers]

    answers = say(PROMPTS)
    told = [[*p, *answer.tokens, 7, 8] for p, answer in zip(PROMPTS, answers, strict=True)]
    second = say(told)
    return {
        "tokens": [answer.tokens for answer in answers],
        "logprobs": [[entry.logprob for entry in answer.logprobs] for answer in answers],
        "second": [answer.tokens for answer in second],
        "prefilled": model.programs.counters.prefill_tokens,
        "score": model.score([list(range(2, 60))])[0].log_likelihood,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    weights = conditioned_weights("test_multihost", text_weights(CONFIG.text))
    weights["embed_tokens.weight"][: len(SPECIAL)] = 0
    path = tmp_path_factory.mktemp("multihost") / "toy"
    gemlax.save(gemlax.Model(CONFIG, build(CONFIG, weights), toy()), path)
    return path


@pytest.fixture(scope="module")
def said(folder) -> list[str]:
    """What each of two processes printed: first the command line, which joins them, then `say`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    tests = os.path.dirname(__file__)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    worker = [sys.executable, "-c", WORKER, str(folder), MESH, coordinator]
    command = [*COMMAND, "--model", str(folder)]
    processes = [
        subprocess.Popen([*worker, str(i), *command], env=environment, **pipes) for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, error) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, error[-2000:]
    return [out for out, _ in outputs]


def test_two_processes_say_what_one_device_does(folder, said):
    first, second = (json.loads(out.splitlines()[-1]) for out in said)
    assert first == second
    expected = say(gemlax.load(folder, layers="scan"))
    for key in ("tokens", "second", "prefilled"):
        assert first[key] == expected[key], key
    np.testing.assert_allclose(first["logprobs"], expected["logprobs"], atol=1e-4)
    np.testing.assert_allclose(first["score"], expected["score"], rtol=1e-5)


def test_the_command_line_joins_two_processes_and_the_first_prints(folder, said, capsys):
    assert main([*COMMAND, "--model", str(folder)]) == 0
    expected = capsys.readouterr().out
    assert expected.strip()
    assert [out.partition("the command ended")[0] for out in said] == [expected, ""]


def test_the_command_line_takes_a_mesh_in_one_process(folder, capsys):
    texts = []
    for mesh in ([], ["--mesh", "fsdp=2,tensor=4"]):
        assert main([*COMMAND, "--model", str(folder), *mesh]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mesh", "tensor=3"], "tensor=3 has 3 places, but there are 8 devices"),
        (["--mesh", "rows=8"], "mesh axis 'rows' is unknown"),
        (["--coordinator", "127.0.0.1:1"], "several processes need all of --mesh, --coordinator"),
        (["--mesh", MESH, "--process-id", "0"], "several processes need all of --mesh"),
        (
            ["--coordinator", "127.0.0.1:1", "--num-processes", "2", "--process-id", "0"],
            "several processes need all of --mesh",
        ),
        (
            ["--mesh", MESH, "--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"],
            "--process-id must be in [0, 1], as there are 2 processes; got 2",
        ),
    ],
)
def test_options_that_do_not_go_together_are_one_line_of_error(folder, capsys, options, said):
    assert main(["generate", "--model", str(folder), *options, PROMPT]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
