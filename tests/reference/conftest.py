"""Parity with transformers: collected only where torch and transformers are installed.

With GEMLAX_REQUIRE_REFERENCE=1 their absence, or a run in which no test passed, is an error.
"""

import importlib.util
import os

import pytest

REQUIRED = os.environ.get("GEMLAX_REQUIRE_REFERENCE") == "1"
MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]

if MISSING and REQUIRED:
    raise pytest.UsageError(f"GEMLAX_REQUIRE_REFERENCE=1, but {MISSING} cannot be imported")
if MISSING:
    collect_ignore_glob = ["test_*.py"]
elif importlib.util.find_spec("tunix") is None:  # optional: see there
    collect_ignore = ["test_tunix.py"]

if not MISSING and "PYTEST_XDIST_WORKER" in os.environ:
    import torch

    torch.set_num_threads(1)  # the processes share the cores: threads would wait for each other

_passed: list[str] = []


def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed:
        _passed.append(report.nodeid)


def pytest_sessionfinish(session, exitstatus):
    if REQUIRED and exitstatus == 0 and not _passed:
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
