"""What all tests of protocols have."""

import pytest
from serve.running import make_kitchen, stop, toy_model


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
