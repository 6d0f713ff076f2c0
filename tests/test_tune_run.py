"""Whole runs: killed and resumed to the same bits; what goes wrong leaves what was good."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from disk import CONFIG as FAMILY
from flax import nnx
from tuning import ONE, decoder_of, trainer
from vocabularies import chat_tokenizer

import gemlax
from gemlax import adapters
from gemlax.config import edit
from gemlax.errors import CheckpointError, Error, RequestError
from gemlax.sharding import make_mesh
from gemlax.tune import TuneSettings, run, state, train
from gemlax.tune.state import Checkpoints
from gemlax.tune.train import Measured, Trainer

pytestmark = pytest.mark.deep

HOW = TuneSettings(rules=4, steps=6, batch_size=2, max_length=48, learning_rate=1e-2, save_every=3)


def model() -> gemlax.Model:
    config = gemlax.GemmaConfig(text=ONE, bos_token_id=FAMILY.bos_token_id)
    return gemlax.Model(config, decoder_of(ONE), chat_tokenizer("gemma3"))


def write_data(folder: Path) -> Path:
    rng = random.Random(4)
    path = folder / "data.jsonl"
    with path.open("w") as file:
        for _ in range(12):
            word = "".join(rng.choice("abcdefgh") for _ in range(6))
            said = [{"role": "user", "content": word}, {"role": "assistant", "content": word[::-1]}]
            file.write(json.dumps({"messages": said}) + "\n")
    return path


def losses(output: Path) -> list[tuple[int, float, float]]:
    lines = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["gradient_norm"]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tune")


@pytest.fixture(scope="module")
def data(folder):
    return write_data(folder)


@pytest.fixture(scope="module")
def whole(folder, data):
    """A run of six steps, straight."""
    given = model()
    result = train(given, data, folder / "whole", HOW, eval_data=data)
    return given, result, folder / "whole"


def test_a_run_learns_and_leaves_what_it_says(whole):
    given, result, output = whole
    found = losses(output)
    assert [step for step, *_ in found] == [1, 2, 3, 4, 5, 6]
    assert result.eval_after < result.eval_before
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3, 6]
    assert all(line["tok_s"] > 0 and line["memory_bytes"] > 0 for line in lines if "loss" in line)
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert given.decoder.adapter is None
    again = nnx.merge(*nnx.split(given.decoder))
    adapters.restore(again, output / "adapter")
    ids = [[2, 300, 301, 302]]
    expected = result.model.logits(ids)
    np.testing.assert_array_equal(gemlax.Model(given.config, again).logits(ids), expected)
    assert np.abs(expected - given.logits(ids)).max() > 0.01


CHILD = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
from test_tune_run import HOW, model, train
output, data, die, steps, every = sys.argv[2], sys.argv[3], *map(int, sys.argv[4:7])

def progress(line, steps):
    if line["step"] == die:
        os.kill(os.getpid(), signal.SIGKILL)

resume = os.path.exists(os.path.join(output, "run.json"))
train(model(), data, output, HOW, steps=steps, save_every=every, resume=resume, progress=progress)
"""


def child(output: Path, data: Path, die: int, steps: int = 6, every: int = 3):
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", CHILD, here, str(output), str(data)]
    return subprocess.Popen(
        [*command, str(die), str(steps), str(every)], stderr=subprocess.PIPE, text=True
    )


def test_a_killed_run_goes_on_to_the_same_bits(folder, data, whole):
    """Killed after step 5; the checkpoint is of step 3.

    XLA may compile one program to other sums in another process, rarely: jax 0.12 did. So the run
    that is killed must take its programs from the cache of this process.
    """
    output, compiled = folder / "killed", steps_compiled()
    killed = child(output, data, die=5)
    _, errors = killed.communicate(timeout=600)
    assert killed.returncode == -signal.SIGKILL, errors
    assert losses(output)[-1][0] == 5
    assert steps_compiled() == compiled != set()
    result = train(model(), data, output, HOW, resume=True)
    assert losses(output) == losses(whole[2])
    for a, b in zip(*(leaves(one.decoder) for one in (result.model, whole[1].model)), strict=True):
        np.testing.assert_array_equal(a, b)


def steps_compiled() -> set[str]:
    """Return the programs of a step in the cache that processes share (conftest.py)."""
    return {path.name for path in Path(jax.config.jax_compilation_cache_dir).glob("jit__step-*")}


def leaves(decoder):
    return jax.tree.leaves(nnx.state(decoder, nnx.LoRAParam))


@pytest.fixture
def ctrl_c():
    """Let Ctrl-C interrupt, as in a terminal: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupted_run_keeps_its_steps_and_goes_on(folder, data, whole, caplog):
    """Stopped after step 2, between two checkpoints."""
    output = folder / "stopped"

    def stop(line, steps):
        if line["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(model(), data, output, HOW, progress=stop)
    assert Checkpoints(output / "checkpoints").steps() == [2]
    assert "stopped; step 2 of 6 is kept: run the same command with --resume" in caplog.text
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(model(), data, output, HOW, resume=True)
    assert losses(output) == losses(whole[2])


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_in_the_middle_of_a_step_keeps_nothing_of_it(data, tmp_path, monkeypatch):
    def step(*_):
        os.kill(os.getpid(), signal.SIGINT)  # noted
        os.kill(os.getpid(), signal.SIGINT)  # at once

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(KeyboardInterrupt):
        train(model(), data, tmp_path / "out", HOW)
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.slow
def test_a_run_killed_at_twenty_moments_has_the_losses_of_one_that_was_not(folder, data):
    """A checkpoint after each step, so that most moments are in the middle of a write."""
    steps, output, rng = 400, folder / "often", random.Random(8)
    expected = folder / "straight"
    straight = child(expected, data, die=-1, steps=steps, every=steps)
    _, errors = straight.communicate(timeout=900)
    assert straight.returncode == 0, errors
    cut_off, kills = 0, 0
    while True:
        running = child(output, data, die=-1, steps=steps, every=1)
        before = len(log_of(output))
        while running.poll() is None and len(log_of(output)) <= before:
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 1.5))
        if kills < 20 and running.poll() is None:
            running.kill()
            running.communicate()
            kills += 1
            names = [p.name for p in (output / "checkpoints").iterdir()]
            cut_off += any(not name.isdecimal() for name in names)
            continue
        _, errors = running.communicate(timeout=900)
        assert running.returncode == 0, errors
        break
    assert kills == 20 and cut_off > 0
    assert losses(output) == losses(expected)


def log_of(output: Path) -> str:
    path = output / "log.jsonl"
    return path.read_text() if path.exists() else ""


def test_a_run_in_a_folder_that_holds_one_is_refused(whole, data):
    with pytest.raises(Error, match="holds a run already: go on with it by --resume"):
        train(model(), data, whole[2], HOW)


@pytest.mark.parametrize(("change", "key"), [({"rules": 2}, "rules"), ({"seed": 1}, "seed")])
def test_another_run_is_not_gone_on_with(whole, data, change, key):
    with pytest.raises(Error, match=f"holds another run: {key} is"):
        train(model(), data, whole[2], HOW, resume=True, **change)


def test_nothing_is_resumed_where_nothing_is(tmp_path, data):
    with pytest.raises(Error, match=r"holds no run to go on with: run\.json is missing"):
        train(model(), data, tmp_path, HOW, resume=True)


def test_other_data_are_not_gone_on_with(whole, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "abc"}) + "\n")
    with pytest.raises(Error, match="holds another run: data is"):
        train(model(), other, whole[2], HOW, resume=True)


def test_a_loss_that_is_no_number_stops_with_its_step(tmp_path, data):
    """A rate so high that float32 overflows after the first change."""
    output = tmp_path / "out"
    with pytest.raises(Error, match=r"step 2: the loss is nan.*checkpoint of step 1 is kept"):
        train(model(), data, output, HOW, save_every=1, learning_rate=1e30)
    assert Checkpoints(output / "checkpoints").steps() == [1]
    assert losses(output)[-1][0] == 1
    assert not (output / "adapter").exists()


FULL_DISK = """
import json, os, pathlib, resource, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from test_tune_run import ONE, Checkpoints, decoder_of, trainer
from gemlax.errors import Error

training, checkpoints = trainer(decoder_of(ONE)), Checkpoints(pathlib.Path(sys.argv[2]))
checkpoints.save(1, training.values, training.optimizer_state)
for size in (10, 3000):
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        checkpoints.save(2, training.values, training.optimizer_state)
    except Error as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        values, _ = checkpoints.restore(1, training.values, training.optimizer_state)
        same = all((np.asarray(values[n]) == np.asarray(a)).all()
                   for n, a in training.values.items())
        print(json.dumps([str(error), os.listdir(sys.argv[2]), same]))
"""


def test_a_full_disk_is_one_error_and_the_last_checkpoint_stays(tmp_path):
    """In a process of its own: Orbax's other writes go on to complain of a closed event loop."""
    folder = tmp_path / "checkpoints"
    command = [sys.executable, "-c", FULL_DISK, str(Path(__file__).parent), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 2, done.stderr[-2000:]
    for message, held, same in found:
        assert message.startswith("cannot write the checkpoint of step 2 in ")
        assert message.endswith("; the last good one is of step 1") and "\n" not in message
        assert held == ["1"] and same


def test_all_weights_are_written_where_the_base_is_gone(tmp_path, data, monkeypatch, caplog):
    tokenizer = chat_tokenizer("gemma3")
    toy = gemlax.tiny(gemlax.preset("gemma-3-270m"), num_hidden_layers=1)
    config = edit(toy, vocab_size=tokenizer.num_tokens)
    base = gemlax.Model(config, decoder_of(config.text), tokenizer)
    gemlax.save(base, tmp_path / "base")
    given = gemlax.load(tmp_path / "base", quantize="dense")
    shutil.rmtree(tmp_path / "base")
    monkeypatch.setattr(Trainer, "step", lambda *_: Measured(1.0, 1, 1.0, None))
    train(given, data, tmp_path / "out", full=True, steps=1, max_length=48)
    again = gemlax.load(tmp_path / "out" / "model")
    np.testing.assert_array_equal(again.logits([[2, 5]]), given.logits([[2, 5]]))


class _Stepped(Exception):
    pass


@pytest.fixture
def no_step(monkeypatch):
    """Nothing may be trained."""

    def step(*_):
        raise _Stepped

    monkeypatch.setattr(Trainer, "step", step)


def test_without_matplotlib_a_run_warns_first_and_ends_well(tmp_path, data, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    seen = []
    train(model(), data, tmp_path / "out", HOW, steps=1,
          progress=lambda line, _: seen.append(caplog.text))  # fmt: skip
    assert "no loss.png will be drawn" in seen[0]
    held = {path.name for path in (tmp_path / "out").iterdir()}
    assert held == {"adapter", "checkpoints", "log.jsonl", "run.json"}


def test_a_plot_that_fails_is_a_warning_after_the_adapter(tmp_path, data, monkeypatch, caplog):
    def fail(lines, path):
        assert (path.parent / "adapter" / "adapter_model.safetensors").exists()
        raise RuntimeError("no font\nat all")

    monkeypatch.setattr(run, "plot", fail)
    result = train(model(), data, tmp_path / "out", HOW, steps=1)
    assert result.steps == 1 and "was not drawn: no font" in caplog.text


def test_an_evaluation_that_fails_at_the_end_costs_no_adapter(tmp_path, data, monkeypatch):
    evaluate = run._Run._evaluate

    def fail(self, log, step):
        if step:
            raise Error("out of memory")
        evaluate(self, log, step)

    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(run._Run, "_evaluate", fail)
        with pytest.raises(Error, match="out of memory"):
            train(model(), data, output, HOW, steps=1, eval_data=data)
    assert (output / "adapter" / "adapter_model.safetensors").exists()
    result = train(model(), data, output, HOW, steps=1, eval_data=data, resume=True)
    assert result.eval_after is not None


@pytest.mark.parametrize("name", ["adapter", "log.jsonl", "checkpoints"])
def test_what_is_in_the_way_is_seen_first(tmp_path, data, name, no_step):
    (tmp_path / name).mkdir()
    with pytest.raises(Error, match=f"{name} is there already, of no run that is known"):
        train(model(), data, tmp_path, HOW)
    assert os.listdir(tmp_path) == [name]


def test_a_place_that_cannot_be_written_is_seen_first(tmp_path, data, monkeypatch, no_step):
    (tmp_path / "file").write_text("")
    with pytest.raises(Error, match=r"file cannot be a folder: it is a file"):
        train(model(), data, tmp_path / "file" / "out", HOW)
    monkeypatch.setattr(run.os, "access", lambda path, mode: False)
    with pytest.raises(Error, match=r"out cannot be made: .* cannot be written to"):
        train(model(), data, tmp_path / "out", HOW)
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_is_seen_first(tmp_path, data, monkeypatch, no_step):
    usage = state.shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(state.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(Error, match=r"cannot write in .*out: the disk is full"):
        train(model(), data, tmp_path / "out", HOW)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["optax", "orbax.checkpoint"])
def test_what_training_needs_is_looked_for_first(tmp_path, data, monkeypatch, missing, no_step):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(Error, match=r'install it with: pip install "gemlax\[tune\]"'):
        train(model(), data, tmp_path / "out", HOW)
    assert not (tmp_path / "out").exists()


def test_held_out_data_are_read_first(tmp_path, data, no_step):
    (tmp_path / "bad.jsonl").write_text("[]")
    with pytest.raises(Error, match="is empty"):
        train(model(), data, tmp_path / "out", HOW, eval_data=tmp_path / "bad.jsonl")
    assert not (tmp_path / "out").exists()


def test_too_little_room_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    usage = state.shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(state.shutil, "disk_usage", lambda path: usage)
    training = trainer(decoder_of(ONE))
    with pytest.raises(Error, match=r"the disk is full: .* and 100 are free; there is none before"):
        Checkpoints(tmp_path / "c").save(1, training.values, training.optimizer_state)


def test_only_the_last_two_checkpoints_are_kept_and_leftovers_go(tmp_path):
    training = trainer(decoder_of(ONE))
    checkpoints = Checkpoints(tmp_path)
    (tmp_path / "7.orbax-checkpoint-tmp").mkdir()
    for step in (1, 2, 3):
        checkpoints.save(step, training.values, training.optimizer_state)
    assert sorted(os.listdir(tmp_path)) == ["2", "3"]
    assert checkpoints.steps() == [2, 3]


def test_a_damaged_checkpoint_or_one_of_another_shape_is_named(tmp_path):
    training = trainer(decoder_of(ONE))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, training.values, training.optimizer_state)
    other = trainer(decoder_of(ONE), rank=2)
    with pytest.raises(CheckpointError, match=r"is of another run: .*lora\.a is \[.*4, .* there"):
        checkpoints.restore(1, other.values, other.optimizer_state)
    for path in (tmp_path / "1").rglob("*"):
        if path.is_file() and path.stat().st_size > 400:
            path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoints.restore(1, training.values, training.optimizer_state)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("data=2,fsdp=2,tensor=2", "fsdp=8"),
        pytest.param(None, "fsdp=8", marks=pytest.mark.slow),
        pytest.param("fsdp=8", None, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_is_put_back_over_another_mesh(tmp_path, first, then):
    def training_on(axes, seed):
        mesh = None if axes is None else make_mesh(axes)
        made = trainer(decoder_of(ONE, mesh=mesh), mesh=mesh)
        rng = np.random.default_rng(seed)
        made.values = {
            name: jax.device_put(rng.normal(size=a.shape).astype(np.float32), a.sharding)
            for name, a in made.values.items()
        }
        return made

    source, target = training_on(first, 1), training_on(then, 2)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, source.values, source.optimizer_state)
    values, state = checkpoints.restore(4, target.values, target.optimizer_state)
    for name, value in values.items():
        np.testing.assert_array_equal(value, source.values[name])
        assert value.sharding == target.values[name].sharding
    for a, b in zip(*map(jax.tree.leaves, (state, target.optimizer_state)), strict=True):
        assert a.sharding == b.sharding and a.dtype == b.dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"accumulate": 3}, "no multiple of accumulate"),
        ({"full": True}, "neither rules nor preferences"),
        ({"rules": 0}, "rank of an adapter must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, data, change, message):
    with pytest.raises(RequestError, match=message):
        train(model(), data, tmp_path / "out", HOW, **change)
