"""Chromium with a tab that shows the page, and what the tests of the page do with it."""

import json
import os
import shutil
import time

import pytest
from page_server import PageServer

WAIT_S = 10

# Keys as WebDriver sends them.
ENTER = "\ue007"
ESCAPE = "\ue00c"
CONTROL = "\ue009"
UP = "\ue013"
LEFT = "\ue012"
RIGHT = "\ue014"
SHIFT = "\ue008"
TAB = "\ue004"
ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--lang=en")


class Browser:
    """A tab with the page, and what a test does with it."""

    def __init__(self, driver):
        self.driver = driver
        self.expected_errors: tuple[str, ...] = ()

    def open(self, server: PageServer) -> None:
        self.origin = server.url
        self.driver.get(server.url)
        self.until(lambda: self.all("#model option"), "the models")

    def all(self, selector: str):
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str):
        found = self.all(selector)
        assert len(found) == 1, f"{selector}: {len(found)}"
        return found[0]

    def text(self, selector: str) -> str:
        return self.one(selector).text

    def texts(self, selector: str) -> list[str]:
        return [node.text for node in self.all(selector)]

    def answers(self) -> list[str]:
        return self.texts(".assistant .body")

    def until(self, condition, what: str):
        """Wait until the condition holds; an element that was just replaced counts as no."""
        from selenium.common.exceptions import (
            NoSuchElementException,
            StaleElementReferenceException,
        )

        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            try:
                if value := condition():
                    return value
            except (AssertionError, NoSuchElementException, StaleElementReferenceException):
                pass
            time.sleep(0.02)
        raise AssertionError(f"waited in vain for {what}: {self.texts('main')}")

    def until_text(self, selector: str, part: str):
        return self.until(lambda: part in self.text(selector), f"{part!r} in {selector}")

    def idle(self) -> None:
        self.until(lambda: self.one("#send").is_displayed(), "the end of the answer")

    def type(self, *keys: str) -> None:
        """Press keys where the focus is."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def press(self, *keys: str) -> None:
        """Press keys together."""
        from selenium.webdriver import ActionChains

        chain = ActionChains(self.driver)
        for key in keys[:-1]:
            chain.key_down(key)
        chain.send_keys(keys[-1])
        for key in keys[:-1]:
            chain.key_up(key)
        chain.perform()

    def hover(self, element) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).move_to_element(element).perform()

    def click(self, selector: str) -> None:
        element = self.one(selector)
        self.hover(element)
        element.click()

    def say(self, text: str, *, wait: bool = True) -> None:
        before = len(self.all("#log article"))
        self.one("#input").send_keys(text, ENTER)
        self.until(lambda: len(self.all("#log article")) == before + 2, "the new messages")
        if wait:
            self.idle()

    def run(self, code: str, *arguments):
        return self.driver.execute_script(code, *arguments)

    def size(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def system_theme(self, theme: str) -> None:
        feature = {"name": "prefers-color-scheme", "value": theme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def background(self) -> list[int]:
        colour = self.run("return getComputedStyle(document.body).backgroundColor")
        return [int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]

    def check_quiet(self) -> None:
        """No request left the origin, and the console holds no error that was not expected."""
        console = [entry["message"] for entry in self.driver.get_log("browser")]
        unexpected = [m for m in console if not any(part in m for part in self.expected_errors)]
        assert not unexpected
        events = (
            json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")
        )
        urls = [
            e["params"]["request"]["url"]
            for e in events
            if e["method"] == "Network.requestWillBeSent"
        ]
        allowed = (self.origin, f"blob:{self.origin}", "data:")
        assert urls
        assert not [url for url in urls if not url.startswith(allowed)]


def start_chromium():
    """Start it, or skip the test where it is not installed."""
    from selenium import webdriver

    program, controller = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not controller:
        assert os.environ.get("GEMLAX_REQUIRE_BROWSER") != "1", "no chromium or no chromedriver"
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    for argument in ARGUMENTS:
        options.add_argument(argument)
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(controller))
