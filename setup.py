"""Thin driver: lists the packages and hands the native build to CMake + Ninja.

What is built, and why something is not, is decided in CMakeLists.txt. Read from the environment:

    FASTMKD_BUILD_CUDA  1 (must succeed) or 0 (never); unset: when nvcc works
    FASTMKD_CUDA_ARCHS  such as "80;90"; unset: those of 80, 90, 100 that nvcc knows
    MAX_JOBS            parallel compile jobs
"""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# `kernels` and `bench` live beside `fastmkd` in the repository and are installed below it.
ROOMS = {"fastmkd.kernels": "kernels", "fastmkd.bench": "bench"}


class UnavailableError(Exception):
    """A tool that the native build needs is missing: the install goes on without it."""


class BuildNative(build_ext):
    """Builds the compiled libraries, or writes down why it could not."""

    def run(self) -> None:
        inplace = self.inplace or getattr(self, "editable_mode", False)
        package = (ROOT if inplace else Path(self.build_lib).resolve()) / "fastmkd"
        # setuptools gives an editable install a fresh temporary folder; this one makes the next build incremental.
        folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}" if inplace else Path(self.build_temp)
        try:
            build(folder.resolve(), package)
        except UnavailableError as reason:
            say(f"the compiled libraries are not built: {reason}. fastmkd works without them, on plain PyTorch.")
            clear(package)
            (package / "lib").mkdir(parents=True, exist_ok=True)
            (package / "lib" / "build.json").write_text(json.dumps({"skipped": {"native": str(reason)}}) + "\n")


def clear(package: Path) -> None:
    """Removes an earlier build: what lies there afterwards is from this one, and running processes keep theirs."""
    shutil.rmtree(package / "lib", ignore_errors=True)
    for module in package.glob("_native*.so"):
        module.unlink()


def build(folder: Path, package: Path) -> None:
    cmake, ninja = tool("cmake", "CMAKE_BIN_DIR"), tool("ninja", "BIN_DIR")
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
    configure += [f"-D{name}={value}" for name, value in cmake_variables(ninja, package).items()]
    result = subprocess.run(configure, stderr=subprocess.PIPE, text=True)
    if result.returncode != 0 and (folder / "CMakeCache.txt").exists():
        # The cache may name a compiler or an isolated build's environment that is gone.
        shutil.rmtree(folder)
        result = subprocess.run(configure, stderr=subprocess.PIPE, text=True)
    sys.stderr.write(result.stderr)
    if result.returncode != 0:
        if os.environ.get("FASTMKD_BUILD_CUDA") == "1":
            raise SystemExit("fastmkd: FASTMKD_BUILD_CUDA=1 asks for a CUDA build, and it cannot be configured.")
        raise UnavailableError(first_error(result.stderr))
    jobs = os.environ.get("MAX_JOBS")
    subprocess.run([cmake, "--build", str(folder), *(["--parallel", jobs] if jobs else [])], check=True)
    clear(package)
    subprocess.run([cmake, "--install", str(folder)], check=True, stdout=subprocess.DEVNULL)


def cmake_variables(ninja: str, package: Path) -> dict[str, str]:
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise UnavailableError("torch is not installed beside setuptools, and its headers are needed")
    return {
        "CMAKE_MAKE_PROGRAM": ninja,
        "CMAKE_INSTALL_PREFIX": str(package),
        "FASTMKD_TORCH_ROOT": str(Path(torch.origin).parent),
        "FASTMKD_TORCH_VERSION": importlib.metadata.version("torch"),
        "FASTMKD_PYTHON": sys.executable,
        "FASTMKD_BUILD_CUDA": os.environ.get("FASTMKD_BUILD_CUDA", "AUTO"),
        "FASTMKD_CUDA_ARCHS": os.environ.get("FASTMKD_CUDA_ARCHS", ""),
        "FASTMKD_BUILD_TESTS": "OFF",
        # A warning that a newer compiler invents must not stop an install; developers and the tests keep the errors.
        "FASTMKD_WERROR": "OFF",
    }


def tool(name: str, folder: str) -> str:
    """Path of a build tool: from its Python package (pip does not put that on PATH), else from PATH."""
    if importlib.util.find_spec(name) is not None:
        path = Path(getattr(importlib.import_module(name), folder, "")) / name
        if path.is_file():
            return str(path)
    found = shutil.which(name)
    if found is None:
        raise UnavailableError(f"{name} is not installed")
    return found


def first_error(log: str) -> str:
    """What CMake says below its first "CMake Error", on one line."""
    words: list[str] = []
    for line in log.split("CMake Error", 1)[-1].splitlines()[1:]:
        if line and not line.startswith(" "):  # the call stack, or the next message
            break
        words += line.split()
    return " ".join(words).rstrip(".:") or "CMake could not configure the build"


def say(message: str) -> None:
    sys.stderr.write(f"fastmkd: {message}\n")


def packages() -> list[str]:
    found = find_packages(include=["fastmkd", "fastmkd.*"])
    for name, folder in ROOMS.items():
        found += [name, *(f"{name}.{sub}" for sub in find_packages(folder))]
    return found


if __name__ == "__main__":
    setup(
        packages=packages(),
        package_dir=ROOMS,
        package_data={"fastmkd": ["py.typed", "*.pyi", "ops/tables/*.json"]},
        # A name without sources: it marks the wheel as one for this platform; CMake makes the file.
        ext_modules=[Extension("fastmkd._native", sources=[])],
        cmdclass={"build_ext": BuildNative},
    )
