"""What all tests of protocols have."""

import sys
import types

import pytest
from serve.running import make_kitchen, stop, toy_model


@pytest.fixture
def grammar(monkeypatch):
    """A stand-in for the room of grammars: a schema is a tuple of what it was made of."""
    room = types.ModuleType("gemlax.grammar")
    room.JsonSchema = lambda schema, strict: ("schema", schema, strict)
    monkeypatch.setitem(sys.modules, "gemlax.grammar", room)


@pytest.fixture(scope="session")
def model():
    """A toy model, compiled once for all tests of the server."""
    return toy_model()


@pytest.fixture(scope="session")
def kitchen(model):
    """A kitchen that is ready. Tests leave it idle."""
    kitchen = make_kitchen(model)
    yield kitchen
    stop(kitchen)
