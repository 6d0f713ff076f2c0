"""The page in a real browser, against a server without a model."""

import json

import pytest
from page_browser import (
    CONTROL,
    ENTER,
    ESCAPE,
    LEFT,
    RIGHT,
    SHIFT,
    TAB,
    UP,
    Browser,
)
from page_server import KEY, PageServer

pytestmark = pytest.mark.browser


def test_a_message_is_answered_in_a_stream(tab, server):
    tab.say("hello" + SHIFT + ENTER + SHIFT + "there")  # Shift and Enter break the line
    assert tab.answers() == ["Answer 1 to: hello\nthere"]
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "hello\nthere"}]
    assert server.bodies[0]["stream"] is True
    assert server.bodies[0]["model"] == "gemma-3-270m-it"
    assert "logprobs" not in server.bodies[0]
    assert "1,024 of 1,240 cached" in tab.text(".assistant .stats")
    assert tab.text("#context-text") == "1,242 of 4,096 tokens"
    assert tab.text("#title") == "hello"
    tab.say("more")
    roles = [message["role"] for message in server.bodies[1]["messages"]]
    assert roles == ["user", "assistant", "user"]


def test_markdown_becomes_nodes_and_only_safe_links(tab):
    tab.say("ring")
    assert tab.text(".code figcaption > span") == "python"
    assert "self.next += 1" in tab.text(".code code")
    assert tab.texts(".markdown ol > li > ul > li") == ["no element moves", "nothing is allocated"]
    assert len(tab.all(".markdown tbody tr")) == 2
    assert tab.text(".markdown h4") == "In Python"
    links = tab.all(".markdown a")
    assert [link.text for link in links] == ["the docs", "a"]
    for link in links:
        assert link.get_attribute("href").startswith("https://")
        assert link.get_attribute("rel") == "noopener noreferrer"
    assert not tab.all(".markdown img")
    tab.click(".code .copy")
    tab.until_text(".code .copy", "Copied")


def test_stop_reaches_the_server_and_keeps_what_came(tab, server):
    tab.say("slow", wait=False)
    tab.until_text(".assistant .body", "word10 ")
    assert tab.one("#stop").is_displayed()
    tab.click("#stop")
    tab.idle()
    tab.until(lambda: server.gone, "the server to see that nobody listens")
    assert 10 < server.gone[0] < 1500
    assert "stopped" in tab.text(".assistant .stats")
    assert "word10" in tab.text(".assistant .body")
    # What was stopped can go on: the server is asked to continue the last message.
    tab.click(".go-on")
    tab.until(lambda: len(server.bodies) == 2, "the second request")
    assert server.bodies[1]["continue_final_message"] is True
    assert server.bodies[1]["messages"][-1]["content"].startswith("word0 ")
    tab.idle()


def test_editing_and_answering_again_make_branches(tab, server):
    tab.say("one")
    tab.say("two")
    tab.click(".assistant:last-of-type .regenerate")
    tab.until(lambda: tab.answers()[-1:] == ["Answer 3 to: two"], "the second answer")
    tab.idle()
    assert tab.text(".assistant:last-of-type .branches") == "2/2"
    assert server.bodies[2]["messages"] == server.bodies[1]["messages"]
    tab.click(".assistant:last-of-type .branches button:first-child")
    assert tab.answers()[-1] == "Answer 2 to: two"
    # The first message is edited: what hung below its old text is still there.
    tab.click("article:first-of-type .edit")
    tab.one(".editor textarea").clear()
    tab.one(".editor textarea").send_keys("uno", ENTER)
    tab.until(lambda: tab.answers() == ["Answer 4 to: uno"], "the answer to the new text")
    tab.idle()
    assert [m["content"] for m in server.bodies[3]["messages"]] == ["uno"]
    assert tab.text("article:first-of-type .branches") == "2/2"
    tab.click("article:first-of-type .branches button:first-child")
    assert tab.answers() == ["Answer 1 to: one", "Answer 2 to: two"]
    # It is all still there after the page was loaded again.
    tab.driver.refresh()
    tab.until(lambda: tab.all("#list .open"), "the list")
    tab.click("#list .open")
    tab.until(lambda: tab.answers() == ["Answer 1 to: one", "Answer 2 to: two"], "the same branch")


def test_an_edited_answer_is_a_branch_that_asks_nothing(tab, server):
    tab.say("one")
    tab.click(".assistant .edit")
    tab.one(".editor textarea").send_keys(" indeed", ENTER)
    tab.until(lambda: tab.answers() == ["Answer 1 to: one indeed"], "the new text")
    assert tab.text(".assistant .branches") == "2/2"
    assert len(server.bodies) == 1


def test_thoughts_are_folded(tab):
    tab.say("think")
    assert tab.answers() == ["Forty-two."]
    assert tab.one("details.thinking").get_attribute("open") is None
    assert not tab.one(".thought").is_displayed()
    tab.click("details.thinking summary")
    assert tab.text(".thought") == "First, the question. Then, the answer."


def test_calls_of_tools_are_folded_and_answered_in_a_box(tab, server):
    tab.say("weather, both")
    assert tab.texts("details.call summary") == ["Called get_weather", "Called get_time"]
    assert not tab.one("details.call:first-of-type pre").is_displayed()
    tab.click("details.call:first-of-type summary")
    assert json.loads(tab.text("details.call:first-of-type pre")) == {"city": "Paris", "unit": "C"}
    areas = tab.all(".answers textarea")
    areas[0].send_keys("21 degrees")
    areas[1].send_keys("noon")
    tab.click(".answers button")
    tab.until(lambda: tab.answers()[-1] == "The tool said noon.", "the last answer")
    tab.idle()
    assert not tab.all(".answers")
    question, calls, first, second = server.bodies[1]["messages"]
    assert question["content"] == "weather, both"
    assert [call["function"]["name"] for call in calls["tool_calls"]] == ["get_weather", "get_time"]
    assert json.loads(calls["tool_calls"][0]["function"]["arguments"])["city"] == "Paris"
    assert calls["reasoning_content"]
    assert first == {
        "role": "tool",
        "content": "21 degrees",
        "tool_call_id": "call_0",
        "name": "get_weather",
    }
    assert (second["content"], second["tool_call_id"]) == ("noon", "call_1")


def test_tokens_show_their_probabilities(tab, server):
    tab.click("#probabilities")
    tab.say("capital?")
    assert server.bodies[0]["logprobs"] is True
    assert server.bodies[0]["top_logprobs"] == 5
    tokens = tab.all(".token")
    assert "".join(token.get_attribute("textContent") for token in tokens) == (
        "The capital of France is lovely Paris."
    )
    assert "p0" in tokens[0].get_attribute("class")
    assert "p4" in tokens[5].get_attribute("class")
    tab.hover(tokens[5])
    tab.until(lambda: tab.one("#tip").is_displayed(), "the probabilities")
    assert tab.texts("#tip td:first-child") == ["␣Paris", "␣the", "␣lovely", "␣called", "␣a"]
    assert tab.text("#tip .chosen td:last-child") == "8.2 %"
    # The same by keys.
    tokens[0].send_keys(RIGHT)
    assert tab.text("#tip p") == "␣capital has 74.1 %"
    # Off: the same message as text, and nothing more is asked for.
    tab.click("#probabilities")
    assert not tab.all(".token")
    tab.say("and")
    assert "logprobs" not in server.bodies[1]


def test_conversations_are_found_renamed_deleted_and_brought_back(tab):
    for text in ("about cats", "about dogs"):
        tab.click("#new")
        tab.say(text)
    tab.until(lambda: tab.texts("#list .open") == ["about dogs", "about cats"], "both")
    tab.one("#find").send_keys("to: about CATS")
    tab.until(lambda: tab.texts("#list .open") == ["about cats"], "what holds the words")
    tab.hover(tab.one("#list .row"))
    tab.click("#list .rename")
    tab.one("#list .row input").send_keys("Felines", ENTER)
    tab.one("#find").clear()
    tab.one("#find").send_keys("elines")
    tab.until(lambda: tab.texts("#list .open") == ["Felines"], "the new title")
    tab.hover(tab.one("#list .row"))
    tab.click("#list .delete")
    tab.until_text("#list", "Nothing found")
    tab.click(".toast button")
    tab.until(lambda: tab.all("#list .open"), "what was deleted")
    assert tab.texts("#list .open") == ["Felines"]


def test_what_is_exported_can_be_imported(tab, server, tmp_path):
    folder = {"behavior": "allow", "downloadPath": str(tmp_path)}
    tab.driver.execute_cdp_cmd("Browser.setDownloadBehavior", folder)
    tab.say("one")
    tab.click(".assistant .regenerate")
    tab.until(lambda: len(server.bodies) == 2, "the second request")
    tab.idle()
    tab.click("#export")
    path = tab.until(lambda: list(tmp_path.glob("*.json")), "the file")[0]
    value = json.loads(path.read_text("utf-8"))
    assert [node["role"] for node in value["conversations"][0]["nodes"]] == ["user"] + [
        "assistant"
    ] * 2
    tab.hover(tab.one("#list .row"))
    tab.click("#list .delete")
    tab.until_text("#list", "No conversations")
    tab.one("#import-file").send_keys(str(path))
    tab.until(lambda: tab.answers() == ["Answer 2 to: one"], "the conversation")
    assert tab.text(".assistant .branches") == "2/2"
    # Twice: as a second one.
    tab.one("#import-file").send_keys(str(path))
    tab.until(lambda: tab.texts("#list .open") == ["one", "one"], "both")
    path.write_text(
        '{"format": "gemlax-conversations", "conversations": [{"nodes": [{"parent": 5}]}]}'
    )
    tab.one("#import-file").send_keys(str(path))
    tab.until(lambda: any("Not imported" in text for text in tab.texts(".toast")), "a refusal")


def test_the_theme_follows_the_system_until_it_is_chosen(tab):
    assert min(tab.background()) > 200
    tab.system_theme("dark")
    assert max(tab.background()) < 60
    tab.click("#theme")
    assert tab.one("#theme").get_attribute("aria-label") == "Theme: light"
    assert min(tab.background()) > 200
    tab.click("#theme")
    tab.system_theme("light")
    assert max(tab.background()) < 60
    tab.driver.refresh()
    assert max(tab.background()) < 60


@pytest.mark.parametrize("width", [360, 800, 1280])
def test_nothing_is_cut_off_at_any_width(tab, width):
    tab.size(width, 740)
    tab.say("ring")
    assert tab.run("return document.documentElement.scrollWidth") <= width
    for selector in (
        "#input",
        "#send",
        "#model",
        "#settings-open",
        "#probabilities",
        ".assistant .stats",
    ):
        box = tab.one(selector).rect
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    tab.click("#settings-open")
    box = tab.one("#settings").rect
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    tab.press(ESCAPE)
    if width < 860:
        assert not tab.one("#side").is_displayed()
        tab.click("#side-open")
        assert tab.one("#find").is_displayed()
        tab.until(lambda: tab.texts("#list .open") == ["ring"], "the list")
        tab.click("#list .open")
        assert not tab.one("#side").is_displayed()


def test_everything_works_by_keys_alone(tab, server):
    tab.type("slow", ENTER)
    tab.until_text(".assistant .body", "word3 ")
    tab.press(ESCAPE)
    tab.idle()
    assert "stopped" in tab.text(".assistant .stats")
    tab.press(CONTROL, "k")
    assert not tab.all("#log article")
    tab.type("one", ENTER)
    tab.until(lambda: tab.answers() == ["Answer 2 to: one"], "the answer")
    tab.idle()
    tab.run("document.querySelector('.assistant').focus()")
    tab.press("r")
    tab.until(lambda: tab.answers() == ["Answer 3 to: one"], "another answer")
    tab.idle()
    tab.run("document.querySelector('.assistant').focus()")
    tab.press(LEFT)
    assert tab.answers() == ["Answer 2 to: one"]
    tab.press(RIGHT)
    assert tab.answers() == ["Answer 3 to: one"]
    tab.press(UP)
    tab.press("e")
    tab.type(" more", ENTER)
    tab.until(lambda: tab.answers() == ["Answer 4 to: one more"], "the answer to the edited text")
    tab.idle()
    # Each control is reached by Tab and shows that it is.
    reached = set()
    for _ in range(60):
        tab.press(TAB)
        name, outline, shown = tab.run(
            "const e = document.activeElement, lines = getComputedStyle(e).outlineStyle !== 'none';"
            "const marked = lines || e.id === 'input' || e === document.body;"
            "return [e.id || e.outerHTML, marked, e.getClientRects().length > 0]"
        )
        reached.add(name)
        assert outline, f"no outline: {name}"
        assert shown, f"hidden: {name}"
    assert reached >= {
        "input",
        "send",
        "new",
        "find",
        "settings-open",
        "probabilities",
        "theme",
        "model",
    }
    tab.run("document.querySelector('.assistant').focus()")
    tab.press("?")
    assert tab.one("#help").is_displayed()
    tab.press(ESCAPE)
    assert not tab.one("#help").is_displayed()


def test_what_happens_is_said_aloud(tab):
    tab.say("one")
    tab.until(
        lambda: tab.one("#live").get_attribute("textContent") == "Answer: Answer 1 to: one",
        "the answer",
    )
    assert tab.one("#live").get_attribute("aria-live") == "polite"


def test_settings_are_sent_and_reset_to_the_servers_defaults(tab, server):
    tab.click("#settings-open")
    assert tab.one("#set-temperature").get_attribute("placeholder") == "1"
    assert tab.one("#set-top_k").get_attribute("placeholder") == "64"
    values = {
        "temperature": "0.5",
        "top_k": "20",
        "max_tokens": "50",
        "seed": "7",
        "system": "Be brief.",
    }
    values["stop"] = "END" + SHIFT + ENTER + SHIFT + r"\n\n"
    values["tools"] = '[{"name": "get_time"}]'
    for name, value in values.items():
        tab.one(f"#set-{name}").send_keys(value)
    tab.one("#set-thinking").send_keys("Think")
    tab.press(ESCAPE)
    tab.say("one")
    body = server.bodies[0]
    assert [body[name] for name in ("temperature", "top_k", "max_tokens", "seed")] == [
        0.5,
        20,
        50,
        7,
    ]
    assert body["stop"] == ["END", "\n\n"]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body["chat_template_kwargs"] == {"enable_thinking": True}
    assert body["tools"] == [{"type": "function", "function": {"name": "get_time"}}]
    assert "top_p" not in body
    tab.driver.refresh()
    tab.until(lambda: tab.one("#set-seed").get_attribute("value") == "7", "the stored settings")
    tab.click("#settings-open")
    tab.click("#reset")
    assert tab.one("#set-seed").get_attribute("value") == ""
    tab.press(ESCAPE)
    tab.say("two")
    assert server.bodies[1].keys() == {"model", "messages", "stream", "stream_options"}
    assert [m["role"] for m in server.bodies[1]["messages"]] == ["user"]


def test_an_adapter_is_chosen_by_its_name(tab, server):
    assert tab.texts("#model optgroup option") == ["pirate"]
    tab.one("#model").send_keys("pirate")
    tab.say("one")
    assert server.bodies[0]["model"] == "pirate"
    assert tab.text(".assistant .who") == "pirate"


def test_the_servers_figures_are_shown(tab):
    tab.until(lambda: tab.text("#metric-cache") == "31 %", "the figures")
    assert tab.text("#metric-hits") == "75 %"
    tab.say("slow", wait=False)
    tab.until(lambda: float(tab.text("#metric-rate").replace("\u2013", "0")) > 5, "the rate")
    assert tab.text("#metric-running") == "1"
    tab.press(ESCAPE)
    tab.idle()


def test_a_key_is_asked_for_and_kept_in_this_tab_alone(driver):
    with PageServer(key=KEY) as server:
        tab = Browser(driver)
        tab.expected_errors = ("401 (Unauthorized)",)
        tab.origin = server.url
        driver.get(server.url)
        tab.until(lambda: tab.one("#key-dialog").is_displayed(), "the dialog")
        tab.type("sk-wrong", ENTER)
        tab.until(lambda: server.paths.count("/v1/models") == 2, "the second try")
        tab.until(lambda: tab.one("#key-dialog").is_displayed(), "the dialog again")
        tab.type(KEY, ENTER)
        tab.until(lambda: tab.all("#model option"), "the models")
        tab.say("one")
        assert tab.answers() == ["Answer 1 to: one"]
        assert KEY in tab.run("return sessionStorage.getItem('gemlax.key')")
        assert KEY not in json.dumps(tab.run("return {...localStorage}"))
        # A key that is no longer right is asked for when it is needed.
        server.key = "sk-new"
        tab.say("two")
        tab.until(lambda: tab.one("#key-dialog").is_displayed(), "the dialog once more")
        tab.type("sk-new", ENTER)
        tab.until(lambda: tab.answers()[-1] == "Answer 2 to: two", "the answer")
        tab.idle()
        assert len(tab.all("article")) == 4
        tab.check_quiet()
        driver.get("about:blank")


@pytest.mark.parametrize(
    ("text", "title", "detail"),
    [
        ("too long", "refused", "5000 tokens. Begin a new conversation"),
        ("broken", "failed", "The step failed."),
        ("cut", "broke off", "before the answer was complete"),
    ],
)
def test_errors_are_said_in_words(tab, text, title, detail):
    tab.expected_errors = ("400 (Bad Request)",)
    tab.say(text)
    assert title in tab.text(".error strong")
    assert detail in tab.text(".error p")


def test_a_busy_server_can_be_asked_again(tab, server):
    tab.expected_errors = ("429 (Too Many",)
    server.failures = 1
    tab.say("one")
    assert "busy" in tab.text(".error strong")
    assert "Try again in 2 s" in tab.text(".error p")
    tab.click(".error button")
    tab.until(lambda: tab.answers() == ["Answer 2 to: one"], "the answer")
    tab.idle()
    assert not tab.all(".assistant .branches")  # what failed is no version


def test_a_refused_field_is_shown_in_the_settings(tab):
    tab.expected_errors = ("400 (Bad Request)",)
    tab.click("#settings-open")
    tab.one("#set-temperature").send_keys("1.9")
    tab.say("one")
    assert tab.text(".error code") == "temperature"
    assert tab.run("return document.activeElement.id") == "set-temperature"
    tab.one("#set-temperature").clear()
    tab.one("#set-temperature").send_keys("3")
    tab.say("two")
    assert "from 0 to 2 is expected" in tab.texts(".error p")[-1]


def test_a_server_that_is_gone_is_said_to_be(tab, server):
    tab.expected_errors = ("ERR_CONNECTION", "ERR_EMPTY_RESPONSE", "ERR_INCOMPLETE", "ERR_SOCKET")
    tab.say("one")
    server.server.force_exit = server.server.should_exit = True
    server.thread.join(10)
    tab.say("two")
    assert tab.text(".error strong") == "The server cannot be reached"
    assert tab.answers()[0] == "Answer 1 to: one"


def test_another_conversation_can_be_read_while_one_is_answered(tab, server):
    tab.say("one")
    tab.click("#new")
    tab.say("slow", wait=False)
    tab.until_text(".assistant .body", "word3 ")
    tab.until(lambda: tab.texts("#list .open") == ["slow", "one"], "both")
    tab.all("#list .open")[1].click()
    tab.until(lambda: tab.answers() == ["Answer 1 to: one"], "the other")
    assert tab.one("#send").is_displayed()
    tab.say("two")
    tab.until(lambda: len(tab.all("#list .open")) == 2, "both")
    slow = next(row for row in tab.all("#list .open") if row.text == "slow")
    slow.click()
    tab.until_text(".assistant .body", "word20 ")
    assert tab.one("#stop").is_displayed()
    tab.press(ESCAPE)
    tab.idle()
    assert server.gone


def test_a_conversation_deleted_while_it_is_answered_stays_deleted(tab, server):
    tab.say("slow", wait=False)
    tab.until_text(".assistant .body", "word3 ")
    tab.until(lambda: tab.texts("#list .open") == ["slow"], "the list")
    tab.hover(tab.one("#list .row"))
    tab.click("#list .delete")
    tab.until(lambda: server.gone, "the server to see that nobody listens")
    tab.until_text("#list", "No conversations")
    tab.say("one")
    assert tab.texts("#list .open") == ["one"]


def test_a_server_that_loads_is_waited_for(driver):
    with PageServer(loading=True) as server:
        tab = Browser(driver)
        tab.expected_errors = ("503 (Service",)
        tab.origin = server.url
        driver.get(server.url)
        tab.until_text("#banner", "The model is being loaded: 40 %.")
        server.loading = False
        tab.until(lambda: tab.all("#model option"), "the models")
        assert not tab.one("#banner").is_displayed()
        tab.check_quiet()
        driver.get("about:blank")
