"""A server that runs: toys behind it, a real socket before it."""

import contextlib
import copy
import threading
import time

from adapters import build
from golden.conditioned import conditioned_weights
from vocabularies import FIRST_CHAT_WORD, chat_tokenizer

from gemlax import Model, preset, tiny
from gemlax.names import text_weights
from gemlax.serve.command import Server
from gemlax.serve.kitchen import ModelKitchen
from gemlax.serve.options import ServeOptions
from gemlax.serve.security import Gate

CONFIG = tiny(preset("gemma-3-1b"), num_hidden_layers=6)
SECONDS = 20.0  # the most that a test waits
COMPILING = 300.0  # likewise, for programs
OPTIONS = {"name": "toy", "slots": 4, "context": 128, "max_queue": 8}


def toy_model(family="gemma3"):
    """A model that never ends by itself: markers and bytes have a logit of 0."""
    weights = conditioned_weights("test_session", text_weights(CONFIG.text))
    weights["embed_tokens.weight"][2 + 1 : FIRST_CHAT_WORD + 1] *= 1e-3
    return Model(CONFIG, build(CONFIG, weights, "index"), chat_tokenizer(family))


def of_family(model, family):
    """The same weights behind another vocabulary."""
    other = copy.copy(model)
    other.__dict__.pop("chat_format", None)
    other.tokenizer = chat_tokenizer(family)
    return other


def wait_until(condition, what="it", seconds=SECONDS):
    """Wait for something that comes soon."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited {seconds} s for {what}"
        time.sleep(0.005)


def make_kitchen(model, **options):
    """A kitchen that is ready."""
    kitchen = ModelKitchen(model, ServeOptions(**{**OPTIONS, **options}))
    kitchen.start()
    wait_until(lambda: kitchen.worker.admission.state != "loading", "compilation", COMPILING)
    return kitchen


@contextlib.contextmanager
def serving(kitchen, gate=None):
    """Serve a kitchen on a free port of this machine; yields the address."""
    server = Server(kitchen, gate or Gate())
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started, "the server")
    try:
        yield server.address
    finally:
        server.should_exit = server.force_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive()


def stop(kitchen):
    """End the engine's thread."""
    kitchen.worker.drain(0)
    assert kitchen.worker.join(SECONDS)
    kitchen.close()


def idle(kitchen):
    """Whether nothing runs, waits or holds a place."""
    worker = kitchen.worker
    nothing = not (worker.num_running or worker.num_waiting or worker.admission.num_places)
    return nothing and worker.engine.num_free_slots >= kitchen.options.slots
