"""What all tests of protocols have."""

import sys
import types

import pytest


@pytest.fixture
def grammar(monkeypatch):
    """A stand-in for the room of grammars: a schema is a tuple of what it was made of."""
    room = types.ModuleType("gemlax.grammar")
    room.JsonSchema = lambda schema, strict: ("schema", schema, strict)
    monkeypatch.setitem(sys.modules, "gemlax.grammar", room)
