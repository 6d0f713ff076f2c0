import re
import tomllib
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from gemlax.serve import page

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "src" / "gemlax" / "serve" / "page"
FILES = sorted(path.name for path in FOLDER.iterdir())
SCRIPTS = [name for name in FILES if name.endswith(".js")]


@pytest.fixture(scope="module")
def client():
    return TestClient(Starlette(routes=page.routes()))


def text(name: str) -> str:
    return (FOLDER / name).read_text("utf-8")


def test_every_file_of_the_page_is_served_as_it_is_in_the_package(client):
    assert {"index.html", "style.css", "app.js"} <= set(FILES)
    for name in FILES:
        answer = client.get(f"/page/{name}")
        assert answer.status_code == 200, name
        assert answer.content == (FOLDER / name).read_bytes()
    assert client.get("/").content == client.get("/page/index.html").content


def test_wheels_carry_the_page():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    assert "serve/page/*" in data["package-data"]["gemlax"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("index.html", "text/html; charset=utf-8"),
        ("style.css", "text/css; charset=utf-8"),
        ("app.js", "text/javascript; charset=utf-8"),
        ("icon.svg", "image/svg+xml"),
    ],
)
def test_a_file_says_what_it_is_and_what_it_may_do(client, name, kind):
    headers = client.get(f"/page/{name}").headers
    assert headers["content-type"] == kind
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["cache-control"] == "no-cache"
    policy = dict(
        part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert "unsafe" not in headers["content-security-policy"]


def test_a_file_that_did_not_change_is_not_sent_again(client):
    first = client.get("/")
    etag = first.headers["etag"]
    assert re.fullmatch(r'"[0-9a-f]{32}"', etag)
    for condition in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        again = client.get("/", headers={"if-none-match": condition})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == etag
        assert again.headers["content-security-policy"] == page.HEADERS["content-security-policy"]
    assert client.get("/", headers={"if-none-match": '"other"'}).status_code == 200
    assert client.get("/page/app.js").headers["etag"] != etag


def test_head_is_answered_and_writing_is_not(client):
    answer = client.head("/")
    assert (answer.status_code, answer.content) == (200, b"")
    assert client.post("/").status_code == 405


@pytest.mark.parametrize(
    "path", ["/page/", "/page/nothing.js", "/page/../page.py", "/page/%2e%2e/work.py"]
)
def test_nothing_but_the_files_is_served(client, path):
    assert client.get(path).status_code == 404


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_make_nodes_and_never_parse_markup_or_code(name):
    banned = (
        r"(?:inner|outer)HTML|insertAdjacentHTML|document\.write|\beval\b|new Function|"
        r"javascript:|\bimport\("
    )
    assert not re.findall(banned, text(name))
    assert len(text(name).splitlines()) < 600


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_another_host(name):
    # The name of SVG's vocabulary is no address that is asked.
    mine = re.sub(r'xmlns="[^"]*"', "", text(name))
    assert not re.findall(r"https?://(?!\[\^)|[\"'(]//", mine.replace(r"https?:\/\/", ""))


def test_the_markup_holds_no_script_or_style_of_its_own():
    markup = text("index.html")
    assert not re.findall(r"\sstyle=|<style|\son\w+=|<script(?! [^>]*src=\"page/)", markup)
    for path in re.findall(r'(?:src|href)="([^"#][^"]*)"', markup):
        assert path.removeprefix("page/") in FILES


def test_every_id_and_icon_that_a_script_asks_for_is_in_the_markup():
    markup = text("index.html")
    ids = set(re.findall(r'\bid="([^"]+)"', markup))
    code = "\n".join(map(text, SCRIPTS))
    assert set(re.findall(r'byId\("([\w-]+)"\)', code)) <= ids
    icons = set(re.findall(r'\b(?:icon|iconButton)\("([\w-]+)"', code)) | set(
        re.findall(r'data-icon="([\w-]+)"', markup)
    )
    assert icons
    assert {f"icon-{name}" for name in icons} <= ids


def test_every_control_has_a_name_that_can_be_read_aloud():
    for tag in re.findall(r"<(?:button|input|textarea|select)\b[^>]*>[^<]*", text("index.html")):
        spoken = "aria-label=" in tag or not tag.endswith(">")
        # The theme's label is written by its script; a hidden field is not spoken.
        assert spoken or " hidden" in tag or 'id="theme"' in tag, tag
