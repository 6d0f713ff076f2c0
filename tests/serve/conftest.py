"""What all tests of protocols have."""

import pytest
from page_browser import Browser, start_chromium
from page_server import PageServer
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


@pytest.fixture(scope="module")
def driver():
    driver = start_chromium()
    yield driver
    driver.quit()


@pytest.fixture
def server():
    with PageServer() as server:
        yield server


@pytest.fixture
def tab(driver, server):
    """The page of a new server, which is a new origin: nothing of an earlier test is stored."""
    tab = Browser(driver)
    tab.size(1280, 860)
    tab.system_theme("light")
    tab.open(server)
    yield tab
    tab.check_quiet()
    driver.get("about:blank")
