"""The C++ build without Python or torch, what its objects export, and what setup.py does without a compiler."""

import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from fastmkd import _native_loader

LIBRARIES = sorted(_native_loader.LIB.glob("*.so"))


def find_tools():
    """CMake and Ninja where setup.py looks for them."""
    setup = load_setup()
    try:
        return setup.tool("cmake", "CMAKE_BIN_DIR"), setup.tool("ninja", "BIN_DIR")
    except setup.UnavailableError as reason:
        pytest.skip(str(reason))


def load_setup():
    spec = importlib.util.spec_from_file_location("fastmkd_setup", Path(__file__).parents[2] / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def configure(run, root, folder, *options):
    cmake, ninja = find_tools()
    run(cmake, "-S", root, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *options)
    return json.loads((folder / "build.json").read_text())


@pytest.fixture(scope="module")
def core(tmp_path_factory, run, root):
    """Build folder of the core and its C++ tests."""
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler here")
    folder = tmp_path_factory.mktemp("core")
    configure(run, root, folder)
    run(find_tools()[0], "--build", folder)
    return folder


def test_ctest(core, run):
    cmake = find_tools()[0]
    report = run(Path(cmake).with_name("ctest"), "--test-dir", core, "--output-on-failure")
    assert "100% tests passed" in report


def test_metadata_of_the_core_build_says_what_was_skipped(core):
    build = json.loads((core / "build.json").read_text())
    assert build["isas"][0] == "generic"
    assert set(build["skipped"]) >= {"ops", "cuda", "python"}


def test_kernel_objects_export_their_entries_and_nothing_else(core, run):
    """An AVX-512 copy of an inline function must never be the one that the linker keeps for everybody."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    objects = sorted(core.glob("CMakeFiles/fastmkd_kernels_*.dir/**/*.o"))
    assert len(objects) >= 6
    for path in objects:
        isa = re.search(r"fastmkd_kernels_(\w+)\.dir", str(path))[1]
        for line in run("nm", "-C", "--defined-only", path).splitlines():
            kind, name = line.split(maxsplit=2)[1:]
            assert kind not in "WwVvu", f"{path.name} of {isa} exports the weak symbol {name}"
            if kind == "T":
                assert name.startswith(f"fastmkd::{isa}::")


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)
def test_libraries_use_the_stable_abi_only(library, run):
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    needed = run("nm", "-D", "-C", "--undefined-only", library)
    assert re.findall(r"\b(?:c10|at|torch)::\S+", needed) == []


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)
def test_libraries_hold_no_path_of_the_machine_that_built_them(library, root):
    text = library.read_bytes()
    assert str(root).encode() not in text
    assert str(Path(sys.prefix)).encode() not in text


def build_into(tmp_path, run, root, **env):
    """Runs setup.py's build step into `tmp_path` and returns what it wrote down."""
    command = [sys.executable, root / "setup.py", "-q", "build_ext", "-b", tmp_path / "lib", "-t", tmp_path / "temp"]
    old = Path.cwd()
    os.chdir(root)
    try:
        run(*command, **env)
    finally:
        os.chdir(old)
    return json.loads((tmp_path / "lib" / "fastmkd" / "lib" / "build.json").read_text())


def test_no_compiler_is_a_reason_not_a_failure(tmp_path, run, root):
    find_tools()
    build = build_into(tmp_path, run, root, CXX="/nonexistent/c++")
    assert "/nonexistent/c++" in build["skipped"]["native"]
    assert list((tmp_path / "lib").glob("**/*.so")) == []


def test_empty_path_is_a_reason_not_a_failure(tmp_path, run, root):
    (tmp_path / "bin").mkdir()
    build = build_into(tmp_path, run, root, PATH=str(tmp_path / "bin"), CXX="")
    assert re.search("compiler|CMAKE_CXX_COMPILER|not installed", build["skipped"]["native"], re.IGNORECASE)


def test_cuda_can_be_refused(tmp_path, run, root):
    variables = load_setup().cmake_variables("ninja", tmp_path)
    build = configure(
        run, root, tmp_path, f"-DFASTMKD_TORCH_ROOT={variables['FASTMKD_TORCH_ROOT']}", "-DFASTMKD_BUILD_CUDA=0"
    )
    assert build["skipped"]["cuda"] == "FASTMKD_BUILD_CUDA=0"
    assert build["cuda_archs"] == []


def test_warnings_are_errors_for_developers_and_not_for_an_install(tmp_path, run, root):
    """Of both compilers: a library that a newer nvcc warns about must not take the CPU's library with it."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc here")
    variables = load_setup().cmake_variables("ninja", tmp_path)
    torch_root = f"-DFASTMKD_TORCH_ROOT={variables['FASTMKD_TORCH_ROOT']}"
    options = [torch_root, "-DFASTMKD_BUILD_CUDA=1", "-DFASTMKD_CUDA_ARCHS=90"]
    found = []
    for setting in (variables["FASTMKD_WERROR"], "ON"):
        configure(run, root, tmp_path, *options, f"-DFASTMKD_WERROR={setting}")
        rules = (tmp_path / "build.ninja").read_text()
        assert "-Xcompiler=-Wall,-Wextra,-Wshadow" in rules
        found.append(("--Werror=all-warnings" in rules, " -Werror " in rules))
    assert found == [(False, False), (True, True)]


def test_asking_for_cuda_without_nvcc_fails_in_one_sentence(tmp_path, root):
    import subprocess

    cmake, ninja = find_tools()
    variables = load_setup().cmake_variables(ninja, tmp_path)
    options = [f"-D{name}={variables[name]}" for name in ("CMAKE_MAKE_PROGRAM", "FASTMKD_TORCH_ROOT")]
    done = subprocess.run(
        [cmake, "-S", root, "-B", tmp_path, "-G", "Ninja", *options, "-DFASTMKD_BUILD_CUDA=1"],
        env={**os.environ, "CUDACXX": "/nonexistent/nvcc"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert "FASTMKD_BUILD_CUDA=1, but" in " ".join(done.stderr.split())


def test_every_folder_with_code_is_a_package(root, monkeypatch):
    monkeypatch.chdir(root)
    packages = set(load_setup().packages())
    for top, name in (("fastmkd", "fastmkd"), ("kernels", "fastmkd.kernels"), ("bench", "fastmkd.bench")):
        for file in (root / top).rglob("*.py"):
            inner = file.parent.relative_to(root / top).parts
            assert ".".join((name, *inner)) in packages, f"{file} is not installed; its folder lacks __init__.py"
