"""The house rules that a machine can check.

A rule is a function of a file's path and its text that returns the problems found, so that each is
also run against a bad twin: a few wrong lines that it must flag.
"""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src"

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60
MAX_PUBLIC_NAMES = 25

# (file below src/gemlax, enclosing function) -> why hasattr or getattr is right there.
ATTRIBUTE_LOOKUPS: dict[tuple[str, str], str] = {}

# What still stands against a rule, by file below src/gemlax. Take names out; put none in.
USES_VARS = {
    "model.py", "workers/__init__.py",
}  # fmt: skip
HAS_BANNERS: set[str] = set()
# Names `Any` in src: the number may only fall.
MAX_ANY = 901

# Import contract of pyproject.toml -> the rooms it holds for, built or not.
CONTRACTS = {
    "The arithmetic knows no flax": "cache config cost formats ops qtensor",
    "Text and config know no jax": "chat config grammar media names tokenizer workers",
}

# Hosts that files of the project may name.
HOSTS = {
    "ai.google.dev",
    "arxiv.org",
    "docs.jax.dev",
    "example.org",  # reserved for documentation
    "flax.readthedocs.io",
    "git-lfs.github.com",  # the first line of every pointer of Git LFS
    "github.com",
    "huggingface.co",
    "keepachangelog.com",
    "localhost",
    "semver.org",
    "www.apache.org",
    "127.0.0.1",
}

Rule = Callable[[str, str], list[str]]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


# Rules.


def rule_file_length(path: str, text: str) -> list[str]:
    count = len(text.splitlines())
    return [f"{path}: {count} lines"] if count > MAX_FILE_LINES else []


def rule_function_length(path: str, text: str) -> list[str]:
    return [
        f"{path}:{node.lineno}: {node.name} has {count} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, FUNCTIONS)
        and (count := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES
    ]


def rule_native_function_length(path: str, text: str) -> list[str]:
    return [
        f"{path}:{first}: a function of {last - first + 1} lines"
        for first, last in native_functions(text)
        if last - first + 1 > MAX_FUNCTION_LINES
    ]


def rule_no_banner(path: str, text: str) -> list[str]:
    """A file that needs headings is two files."""
    found = re.finditer(r"^[ \t]*(?:#|//)[ \t]*[-=*#~]{3,}.*$", text, re.MULTILINE)
    return [f"{path}: the banner {match[0].strip()[:40]}" for match in found]


def rule_no_vars(path: str, text: str) -> list[str]:
    """They are getattr by another name."""
    return [
        f"{path}:{call.lineno}: {name} in {where}"
        for call, name, where in calls(text)
        if name in ("vars", "locals")
    ]


def rule_docstring(path: str, text: str) -> list[str]:
    return [] if ast.get_docstring(ast.parse(text)) else [f"{path}: no module docstring"]


def rule_all(path: str, text: str) -> list[str]:
    """Each module lists its public names, and each listed name is bound in it."""
    tree = ast.parse(text)
    names = public_names(tree)
    if names is None:
        return [f"{path}: no __all__"]
    return [f"{path}: __all__ lists {n}, not defined" for n in names if n not in bound_names(tree)]


def rule_public_names(path: str, text: str) -> list[str]:
    count = len(public_names(ast.parse(text)) or [])
    return [f"{path}: {count} public names"] if count > MAX_PUBLIC_NAMES else []


def rule_no_print(path: str, text: str) -> list[str]:
    if path.startswith("cli/"):
        return []
    return [f"{path}:{call.lineno}: print" for call, name, _ in calls(text) if name == "print"]


def rule_no_attribute_lookup(path: str, text: str) -> list[str]:
    """Configs are typed: a name that may be missing is a bug, not a case."""
    return [
        f"{path}:{call.lineno}: {name} in {where}"
        for call, name, where in calls(text)
        if name in ("hasattr", "getattr") and (path, where) not in ATTRIBUTE_LOOKUPS
    ]


def rule_no_torch(path: str, text: str) -> list[str]:
    problems = []
    for node in ast.walk(ast.parse(text)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        problems += [
            f"{path}:{node.lineno}: imports {module}"
            for module in modules
            if module.split(".")[0] in ("torch", "transformers")
        ]
    return problems


def rule_tests_assert(path: str, text: str) -> list[str]:
    """A test asserts, expects an exception, or calls a helper assert_* or check_*."""
    return [
        f"{path}:{node.lineno}: {node.name} asserts nothing"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, FUNCTIONS) and node.name.startswith("test_") and not asserts(node)
    ]


def rule_hosts(path: str, text: str) -> list[str]:
    found = re.findall(r"\b[a-z]+://([\w.-]+)", text)
    return [f"{path}: names the host {host}" for host in sorted(set(found) - HOSTS)]


def rule_paths(path: str, text: str) -> list[str]:
    """No absolute path, but for the two that every system has."""
    text = re.sub(r"/usr/bin/env\b|/dev/null\b", "", text)
    roots = "work|tmp|home|root|opt|etc|usr|var|mnt|Users"
    found = re.findall(rf"(?<![\w.~<}}/-])/(?:{roots})/[\w./-]*", text)
    return [f"{path}: names the path {name}" for name in sorted(set(found))]


# What the rules are made of.


def public_names(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if ast.unparse(target) == "__all__":
                return ast.literal_eval(node.value)
    return None


def bound_names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        elif isinstance(node, ast.TypeAlias if sys.version_info >= (3, 12) else ()):
            names.add(node.name.id)
    return names


def calls(text: str) -> Iterator[tuple[ast.Call, str, str]]:
    """Yield (call, name called, enclosing function or "module") for calls of a plain name."""

    def visit(node: ast.AST, where: str) -> Iterator[tuple[ast.Call, str, str]]:
        if isinstance(node, FUNCTIONS):
            where = node.name
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node, node.func.id, where
        for child in ast.iter_child_nodes(node):
            yield from visit(child, where)

    return visit(ast.parse(text), "module")


def native_functions(text: str) -> Iterator[tuple[int, int]]:
    """Yield the first and the last line of each function of a C++ file, lambdas within theirs."""
    text = re.sub(r"//.*|\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])'", "", text)
    text = re.sub(r"^#(?:.*\\\n)*.*", lambda m: "\n" * m[0].count("\n"), text, flags=re.MULTILINE)
    container = re.compile(r"\b(?:namespace|struct|class|enum|union)\b[^()]*$|\bextern\s*$")
    stack: list[tuple[int, str]] = []  # line and kind of each open block
    start = 0
    for match in re.finditer(r"[{};]", text):
        head, start = text[start : match.start()], match.end()
        if match[0] == "{":
            first = text.count("\n", 0, match.start() - len(head.lstrip())) + 1
            outside = all(kind == "container" for _, kind in stack)
            is_function = outside and "(" in head and not head.rstrip().endswith("=")
            kind = "function" if is_function else "block"
            stack.append((first, "container" if container.search(head) else kind))
        elif match[0] == "}" and stack:
            first, kind = stack.pop()
            if kind == "function":
                yield first, text.count("\n", 0, match.start()) + 1


def asserts(function: ast.AST) -> bool:
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            last = name.split(".")[-1]
            if last.startswith(("assert_", "check_")) or name in ("pytest.raises", "pytest.warns"):
                return True
    return False


# The project against the rules.


def texts(*patterns: str, base: Path = ROOT) -> dict[str, str]:
    return {
        path.relative_to(base).as_posix(): path.read_text("utf-8")
        for pattern in patterns
        for path in sorted(base.glob(pattern))
        if path.is_file()
    }


def library() -> dict[str, str]:
    return texts("**/*.py", base=SRC / "gemlax")


def code() -> dict[str, str]:
    folders = ("src", "tests", "scripts", "examples", "benchmarks")
    return texts(*(f"{folder}/**/*.py" for folder in folders))


def everything() -> dict[str, str]:
    native = texts("csrc/**/*.cpp", "csrc/**/*.h")
    prose = texts("*.md", "*.toml", "docs/**/*.md", ".ci/*", ".gitignore", "LICENSE")
    scripts = texts("scripts/*", "setup.py", "MANIFEST.in", "tests/**/*.md")
    return {**code(), **native, **prose, **scripts}


def count_any(text: str) -> int:
    return sum(isinstance(n, ast.Name) and n.id == "Any" for n in ast.walk(ast.parse(text)))


def check_rules(rules: list[Rule], files: dict[str, str]) -> None:
    found = [p for path, text in files.items() for rule in rules for p in rule(path, text)]
    assert not found, "\n".join(found)


def test_files_and_functions_are_short():
    native = {path: text for path, text in everything().items() if path.startswith("csrc/")}
    check_rules([rule_file_length, rule_function_length], code())
    assert native
    check_rules([rule_file_length, rule_native_function_length], native)


def test_no_file_has_banners():
    known = {f"src/gemlax/{path}" for path in HAS_BANNERS}
    files = {p: t for p, t in everything().items() if p.endswith((".py", ".cpp", ".h"))}
    check_rules([rule_no_banner], {p: t for p, t in files.items() if p not in known})
    assert all(rule_no_banner(path, files.get(path, "")) for path in known), "a needless exception"


def test_the_library_asks_for_no_names_of_objects_and_frames():
    files = library()
    check_rules([rule_no_vars], {p: t for p, t in files.items() if p not in USES_VARS})
    assert all(rule_no_vars(p, files.get(p, "")) for p in USES_VARS), "a needless exception"


def test_the_library_has_no_more_of_any_than_before():
    count = sum(map(count_any, library().values()))
    assert count <= MAX_ANY, f"{count} times Any: give types"
    assert count > MAX_ANY - 25, f"{count} times Any: let MAX_ANY follow"


def test_each_module_says_what_it_is_and_what_it_offers():
    check_rules([rule_docstring, rule_all], library())


def test_the_public_api_is_small():
    check_rules([rule_public_names], texts("__init__.py", base=SRC / "gemlax"))


def test_the_library_does_not_print_or_import_torch():
    check_rules([rule_no_print, rule_no_torch], library())


def test_nothing_is_looked_up_by_a_name_that_may_be_missing():
    check_rules([rule_no_attribute_lookup], library())
    used = {
        (path, where)
        for path, text in library().items()
        for _, name, where in calls(text)
        if name in ("hasattr", "getattr")
    }
    assert set(ATTRIBUTE_LOOKUPS) <= used, "a listed exception that nothing needs"


def test_every_test_asserts():
    tests = {path: text for path, text in code().items() if path.startswith("tests/")}
    check_rules([rule_tests_assert], tests)


def test_no_file_names_a_path_outside_the_project_or_an_unlisted_host():
    files = {path: text for path, text in everything().items() if path != "tests/test_house.py"}
    check_rules([rule_hosts, rule_paths], files)


@pytest.mark.parametrize("name", CONTRACTS)
def test_an_import_contract_lists_each_room_that_exists(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    (contract,) = (c for c in project["tool"]["importlinter"]["contracts"] if c["name"] == name)
    built = {path.stem for path in (SRC / "gemlax").iterdir()}
    rooms = [room for room in CONTRACTS[name].split() if room in built]
    assert contract["source_modules"] == [f"gemlax.{room}" for room in rooms]


# Importing the package.

# jax and flax set environment variables of their own when imported, so they come first.
IMPORT_PROBE = """
import importlib, json, os, sys
import flax.linen, flax.nnx, jax
from jax._src import xla_bridge
sys.path.insert(0, sys.argv[1])
environment, flags = dict(os.environ), dict(jax.config.values)
importlib.import_module(sys.argv[2])
found = []
if xla_bridge.backends_are_initialized():
    found.append("initialises a jax backend")
if dict(os.environ) != environment:
    found.append("changes the environment")
if dict(jax.config.values) != flags:
    found.append("changes a jax flag")
found += [f"imports {name}" for name in ("torch", "transformers") if name in sys.modules]
print(json.dumps(found))
"""


def import_effects(folder: Path, module: str) -> list[str]:
    command = [sys.executable, "-c", IMPORT_PROBE, str(folder), module]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_gemlax_has_no_side_effects():
    assert import_effects(SRC, "gemlax") == []


def test_the_import_probe_sees_side_effects(tmp_path):
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "bad.py").write_text(
        "import os, jax, torch\n"
        "os.environ['GEMLAX_BAD'] = '1'\n"
        "jax.config.update('jax_enable_x64', True)\n"
        "jax.devices()\n"
    )
    assert import_effects(tmp_path, "bad") == [
        "initialises a jax backend",
        "changes the environment",
        "changes a jax flag",
        "imports torch",
    ]


def test_a_wrong_shape_is_caught_by_its_annotation():
    from gemlax.ops import rms_norm

    ones = np.ones((2, 3), np.float32)
    assert rms_norm(jnp.array(ones), jnp.array(ones[0]), eps=0.0, offset=0.0).shape == (2, 3)
    with pytest.raises(TypeCheckError):
        rms_norm(jnp.array(ones), jnp.array(ones[:, 0]), eps=0.0, offset=0.0)


# The rules against bad twins.

LONG = "    x = 1\n"
TWINS: list[tuple[Rule, str, str]] = [
    (rule_file_length, "x = 1\n" * (MAX_FILE_LINES + 1), "x = 1\n" * MAX_FILE_LINES),
    (
        rule_function_length,
        "def f():\n" + LONG * MAX_FUNCTION_LINES,
        "def f():\n" + LONG * (MAX_FUNCTION_LINES - 1),
    ),
    (
        rule_function_length,
        "class A:\n  async def f(self):\n" + LONG * MAX_FUNCTION_LINES,
        "class A:\n" + LONG * 100,
    ),
    (
        rule_native_function_length,
        "namespace a {\nvoid f(int x) {\n" + "  if (x) { --x; }\n" * MAX_FUNCTION_LINES + "}\n}\n",
        "namespace a {\n" + "void f() {\n  g();\n}\n" * MAX_FUNCTION_LINES + "}\n",
    ),
    (
        rule_native_function_length,
        "struct A {\n  A(int x)\n      : x_(x) {\n"
        + '    f("}");\n' * MAX_FUNCTION_LINES
        + "  }\n};\n",
        "struct A {\n" + "  int f() const { return 1; }\n" * MAX_FUNCTION_LINES + "};\n",
    ),
    (rule_no_banner, "# ---- Loading ----\n", "# Loads a - b, or --all of it.\n"),
    (rule_no_banner, "  // =====\n", "int a = 1;  // two\n"),
    (rule_no_vars, "def f(self):\n    return vars(self)\n", "self.vars(1)\n"),
    (rule_no_vars, "x = {**locals()}\n", "locals = 1\n"),
    (rule_docstring, "x = 1\n# 'no docstring'\n", '"""A module."""\n'),
    (rule_all, "def f(): ...\n", "__all__ = ['f']\ndef f(): ...\n"),
    (rule_all, "__all__ = ['f', 'g']\ndef f(): ...\n", "__all__ = ['g']\nfrom a import f as g\n"),
    (
        rule_public_names,
        f"__all__ = {[f'n{i}' for i in range(MAX_PUBLIC_NAMES + 1)]}",
        "__all__ = ['a']",
    ),
    (rule_no_print, "def f():\n    print('x')\n", "pprint('x')\nlog.print('x')\n"),
    (rule_no_attribute_lookup, "def f(c):\n    return hasattr(c, 'moe')\n", "c.moe\n"),
    (rule_no_attribute_lookup, "x = getattr(c, 'moe', None)\n", "my_getattr(c)\n"),
    (rule_no_torch, "def f():\n    import torch.nn as nn\n", "import torchless\n"),
    (rule_no_torch, "from transformers import Gemma3Model\n", "from . import transformers\n"),
    (rule_tests_assert, "def test_a():\n    f()\n", "def test_a():\n    assert f()\n"),
    (
        rule_tests_assert,
        "class TestA:\n    def test_a(self):\n        x = raises(1)\n",
        "def test_a():\n    with pytest.raises(ValueError):\n        f()\n",
    ),
    (
        rule_tests_assert,
        "def assert_x(): ...\ndef test_a():\n    x\n",
        "def test_a():\n    np.testing.assert_allclose(1, 1)\n",
    ),
    (rule_hosts, "see https://example.com/a", "see https://github.com/google-deepmind/gemma"),
    (rule_paths, "open('/home/me/model.gguf')", "#!/usr/bin/env bash\nx > /dev/null\n"),
    (rule_paths, "cd /" + "tmp/x\n", "tests/tmp/x, a/home/b, https://github.com/etc/x\n"),
]


def test_any_is_counted_where_it_is_used_and_not_where_it_is_imported():
    text = "from typing import Any\ndef f(x: Any) -> list[Any]: ...\ny = 'Any'\n"
    assert count_any(text) == 2


@pytest.mark.parametrize(("rule", "bad", "good"), TWINS, ids=[twin[0].__name__ for twin in TWINS])
def test_each_rule_flags_its_bad_twin_and_passes_the_good_one(rule, bad, good):
    assert rule("file.py", bad)
    assert not rule("file.py", good)
