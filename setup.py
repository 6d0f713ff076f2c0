"""Compiles the native CPU kernels of csrc/, where there is a compiler; all else is pyproject.toml.

Without a compiler, or with GEMLAX_NATIVE=0, the package is built without them and runs on XLA.
GEMLAX_NATIVE=1 makes a failed compilation an error.
"""

import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

WANTED = os.environ.get("GEMLAX_NATIVE", "")


class BuildNative(build_ext):
    """A plain shared library that is opened by name: it holds no Python module."""

    def build_extension(self, ext):
        """Compile against the headers that jax carries."""
        import jax.ffi

        ext.include_dirs.append(jax.ffi.include_dir())
        super().build_extension(ext)

    def get_export_symbols(self, ext):
        """Return none: a module's init function, which Windows would look for, is not there."""
        return []


native = Extension(
    "gemlax._native",
    sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
    depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
    extra_compile_args=["-std=c++20", "-O3", "-g0", "-fno-math-errno"],
    language="c++",
    optional=WANTED != "1",
)

setup(
    ext_modules=[] if WANTED == "0" else [native],
    cmdclass={"build_ext": BuildNative},
)
