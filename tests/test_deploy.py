"""The files of deploy/ give `gemlax serve` options that it has, and wait longer than it drains."""

import re
import shlex
from pathlib import Path

from gemlax.cli.parser import make_parser

ROOT = Path(__file__).resolve().parent.parent


def read(name: str) -> str:
    return (ROOT / "deploy" / name).read_text("utf-8")


def options(line: str) -> list[str]:
    """Return the words of a list or of a command line, after `serve` where it is named."""
    words = [word.strip("\",'") for word in shlex.split(line.replace("[", " ").replace("]", " "))]
    return words[words.index("serve") + 1 :] if "serve" in words else words


def find(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    assert match, pattern
    return match[1]


def parse(words: list[str]):
    return make_parser().parse_args(["serve", *words])


def test_the_unit_of_systemd_starts_a_server():
    unit = read("gemlax.service")
    args = parse(options(find(r"^ExecStart=(.*)", unit)))
    assert str(args.api_key_file) == "%S/gemlax/api-key"
    assert int(find(r"^TimeoutStopSec=(\d+)", unit)) > args.drain


def test_the_container_starts_a_server():
    args = parse(options(find(r"^ENTRYPOINT (.*)", read("Containerfile").replace("\\\n", ""))))
    assert args.host == "0.0.0.0"
    assert find(r"^EXPOSE (\d+)", read("Containerfile")) == str(args.port)


def test_the_pods_start_servers_and_wait_until_they_have_drained():
    manifest = read("kubernetes.yaml")
    words = options(find(r"args: (.*)", manifest))
    args = parse(words)
    assert words
    grace, pause = find(r"GracePeriodSeconds: (\d+)", manifest), find(r"sleep, \"(\d+)\"", manifest)
    assert int(grace) > args.drain + int(pause)
    assert manifest.count("path: /health") == 3
    assert "GEMLAX_API_KEY" in manifest


def test_the_metrics_that_the_page_names_are_those_of_the_server():
    page = (ROOT / "docs" / "deploy.md").read_text("utf-8")
    names = set(re.findall(r"`vllm:(\w+?)(?:_total)?`", page))
    served = "".join(path.read_text("utf-8") for path in (ROOT / "src/gemlax/serve").glob("*.py"))
    assert len(names) > 8
    assert {name for name in names if f'{name}"' not in served} == set()
