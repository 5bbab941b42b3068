import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import fresh
import pytest
import torch

import fastmkd._native_loader as loader


def run_command(*command, **env):
    """Runs a command with `env` on top of this process's; on failure its output is the message."""
    done = subprocess.run(
        list(map(str, command)), env={**os.environ, **env}, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, f"{command} returned {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def run():
    return run_command


@pytest.fixture
def child(tmp_path):
    """Runs Python code in a process of its own, which has no library loaded yet, and returns what it prints."""

    def run(code, **env):
        script = tmp_path / "child.py"
        script.write_text(code)
        done = fresh.run(script, folder=tmp_path, **env)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@pytest.fixture(scope="session")
def root():
    return Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def shim(tmp_path_factory, run, root):
    """Compiles csrc/cuda/<name>.cuh for this CPU and returns its function from <name>_shim.cpp."""
    compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    folder = root / "tests" / "native"
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror"]

    def build(name):
        library = tmp_path_factory.mktemp("shim") / f"{name}.so"
        run(
            compiler, "-std=c++20", "-O1", *warnings, "-shared", "-fPIC", f"-I{folder}", f"-I{root / 'csrc'}",
            folder / f"{name}_shim.cpp", "-o", library,
        )  # fmt: skip
        return getattr(ctypes.CDLL(str(library)), f"{name}_shim")

    return build


@pytest.fixture(scope="session")
def native():
    """The compiled Python module."""
    return pytest.importorskip("fastmkd._native", reason="the compiled libraries were not built")


@pytest.fixture
def restore_isa(native):
    before = native.active_isa()
    yield native
    native.set_isa(before)


def isas():
    try:
        from fastmkd import _native
    except ImportError:
        return []
    return _native.available_isas()


@pytest.fixture(params=isas() or ["not built"])
def ops(request):
    """The compiled operators, on each instruction set in turn."""
    if not loader.load().cpu:
        pytest.skip(str(loader.load().cpu_reason))
    from fastmkd import _native

    before = _native.active_isa()
    _native.set_isa(request.param)
    yield torch.ops.fastmkd_native
    _native.set_isa(before)
