"""Where jax has no device, or may not compile, one line says so; what other processes can have."""

import copy
import os
import pickle
import subprocess
import sys

import jax
import pytest
from tuning import ONE, decoder_of
from vocabularies import TOY_MERGES, toy

import gemlax
from gemlax import ops
from gemlax.config import GemmaConfig
from gemlax.sharding import make_mesh


@pytest.fixture(scope="module")
def model():
    return gemlax.Model(GemmaConfig(ONE), decoder_of(ONE))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (AssertionError(), "JAX_PLATFORMS=cuda: it finds no such device; take another"),
        (RuntimeError("Unable to initialize backend 'tpu': no chip (set X)\nmore"),
         "JAX_PLATFORMS=cuda: Unable to initialize backend 'tpu': no chip; take another"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "touch", [lambda: gemlax.load("demo"), lambda: make_mesh("tensor=8"), ops.kernels]
)
def test_a_platform_that_is_not_there_is_one_line(monkeypatch, error, said, touch):
    def fail():
        raise error

    monkeypatch.setattr(jax, "default_backend", fail)
    monkeypatch.setattr(type(jax.config), "jax_platforms", "cuda")
    with pytest.raises(gemlax.Error, match=said) as caught:
        touch()
    assert "\n" not in str(caught.value)


def test_the_command_line_says_that_a_platform_is_not_there():
    command = [sys.executable, "-m", "gemlax.cli", "info", "gemma-3-270m"]
    environment = os.environ | {"JAX_PLATFORMS": "nonsense"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr.startswith("gemlax: jax cannot start with JAX_PLATFORMS=nonsense")
    assert done.stderr.count("\n") == 1


def test_generating_without_compiling_is_refused_before_anything_runs(model):
    with jax.disable_jit(), pytest.raises(gemlax.RequestError, match="JAX_DISABLE_JIT"):
        model.generate([[2, 9, 40]], max_new_tokens=2)
    assert model.programs.counters.programs == 0


@pytest.mark.parametrize("made", ["scores", "merges", "tokenizer.json"])
def test_a_pickled_tokenizer_is_the_same(made, tmp_path):
    tokenizer = toy(merges=TOY_MERGES) if made == "merges" else toy()
    if made == "tokenizer.json":
        tokenizer.save(tmp_path / "a")
        tokenizer = gemlax.load_tokenizer(tmp_path / "a")
    again = pickle.loads(pickle.dumps(tokenizer))
    text = "<bos>hello  world<end_of_turn>\n\n<b>\u00e9\u00e9 \U0001f600"
    for special in (True, False):
        ids = tokenizer.encode(text, parse_special=special)
        assert again.encode(text, parse_special=special) == ids
        assert again.decode(ids) == tokenizer.decode(ids)
    again.save(tmp_path / "b")
    assert gemlax.load_tokenizer(tmp_path / "b").encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("function", [pickle.dumps, copy.deepcopy])
def test_a_model_that_shall_be_pickled_says_what_to_do(model, function):
    with pytest.raises(gemlax.UnsupportedError, match="let the other process load it"):
        function(model)
    assert copy.copy(model).programs is model.programs
