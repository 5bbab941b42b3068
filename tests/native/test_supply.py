"""What is handed out: the wheel's contents, the versions it asks for, the notices of what it holds."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path

import pytest

from fastmkd import _native_loader

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TESTED = PROJECT["tool"]["fastmkd"]["tested"]
NOTICES = (ROOT / "THIRD-PARTY-NOTICES.md").read_text()
LIBRARIES = [*_native_loader.LIB.glob("*.so"), *_native_loader.LIB.parent.glob("_native*.so")]


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def padded(version: str) -> tuple[int, ...]:
    """``2.0`` -> (2, 0, 0), so that it is no other version than 2.0.0."""
    return (*numbers(version), 0, 0)[:3]


def name_of(requirement: str) -> str:
    return re.match(r"[\w-]+", requirement)[0]


def bounds(requirement: str) -> tuple[str, str]:
    """``torch>=2.11,<2.16`` -> ("2.11", "2.16")."""
    found = re.fullmatch(r"[\w-]*(?:\[\w+\])?>=([\d.]+),<([\d.]+)", requirement)
    assert found, f"{requirement} does not say both ends"
    return found[1], found[2]


REQUIRED = {name_of(text): text for text in PROJECT["project"]["dependencies"]}
EXTRAS = PROJECT["project"]["optional-dependencies"]
BOUNDED = [
    *REQUIRED.values(), *EXTRAS["train"], *EXTRAS["bench"], f"python{PROJECT['project']['requires-python']}"
]  # fmt: skip


@pytest.mark.parametrize("requirement", BOUNDED)
def test_bounds_are_those_that_were_tested(requirement):
    name = name_of(requirement)
    low, high = map(padded, bounds(requirement))
    oldest, newest = map(padded, TESTED[name])
    assert low == oldest <= newest < high
    if name in ("torch", "python", "accelerate"):  # every minor version between is claimed, and no later one
        assert high == (newest[0], newest[1] + 1, 0)
    here = ".".join(map(str, sys.version_info[:3])) if name == "python" else metadata.version(name)
    assert low <= padded(here) < high


def test_the_oldest_versions_are_those_that_are_installed_to_test_them():
    lines = [line for line in (ROOT / "oldest.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = dict(line.split("==") for line in lines)
    assert pinned.keys() == {name_of(text) for text in BOUNDED} - {"python"} == TESTED.keys() - {"python"}
    assert {name: padded(pin) for name, pin in pinned.items()} == {name: padded(TESTED[name][0]) for name in pinned}


def test_bounds_are_compared_to_the_last_number():
    assert padded("2") == padded("2.0.0") < padded("2.0.2") < padded("2.4")


def test_build_and_pages_ask_for_the_same_versions():
    build = PROJECT["build-system"]["requires"]
    assert {REQUIRED["torch"], REQUIRED["numpy"]} <= set(build)
    claimed = "Python {} to {}, PyTorch {} to {}".format(*TESTED["python"], *TESTED["torch"])
    for page in ("README.md", "docs/install.md"):
        assert claimed in (ROOT / page).read_text(), page
    assert f"set(FASTMKD_TORCH_ABI {TESTED['torch'][0]})" in (ROOT / "CMakeLists.txt").read_text()
    major, minor = numbers(TESTED["torch"][0])
    assert f"TORCH_TARGET_VERSION=0x{major:02x}{minor:02x}" in (ROOT / "CMakeLists.txt").read_text()


def copy_of_the_sources(folder: Path) -> Path:
    """What a checkout holds, without what was built in it."""
    left_out = shutil.ignore_patterns(
        ".*", "build", "dist", "*.egg-info", "lib", "*.so", "__pycache__", "runs", "results", "figures", "kernels"
    )
    shutil.copytree(ROOT, folder, ignore=left_out)
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def wheel_of(folder: Path, run, **environment: str) -> tuple[set[str], zipfile.ZipFile]:
    sources = copy_of_the_sources(folder / "sources")
    pip = [sys.executable, "-m", "pip", "wheel", sources, "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    run(*pip, "-w", folder / "wheels", FASTMKD_BUILD_CUDA="0", **environment)
    (path,) = (folder / "wheels").glob("fastmkd-*.whl")
    archive = zipfile.ZipFile(path)
    return set(archive.namelist()), archive


def check_python_parts(names: set[str], archive: zipfile.ZipFile) -> None:
    expected = {
        f"fastmkd/{prefix}{path.relative_to(ROOT / room)}"
        for room, prefix in (("fastmkd", ""), ("kernels", "kernels/"), ("bench", "bench/"))
        for pattern in ("*.py", "*.pyi", "py.typed", "tables/*.json")
        for path in (ROOT / room).rglob(pattern)
        if not (room == "fastmkd" and path.relative_to(ROOT / room).parts[0] in ("kernels", "bench", "lib"))
    }
    assert expected <= names, sorted(expected - names)[:5]
    strangers = {name for name in names if not name.startswith(("fastmkd/", "fastmkd-"))}
    assert not strangers, "a wheel must not put tests or tools beside other packages"
    (information,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    fields = HeaderParser().parsestr(archive.read(information).decode())
    assert fields["Requires-Python"].replace(" ", "") in (">=3.11,<3.14", "<3.14,>=3.11")
    asked = {re.match(r"[\w-]+", text)[0] for text in fields.get_all("Requires-Dist") if "extra ==" not in text}
    assert asked == set(REQUIRED)
    for name in ("LICENSE", "THIRD-PARTY-NOTICES.md"):
        assert any(member.endswith(f".dist-info/licenses/{name}") for member in names), name


def test_wheel_without_a_compiler_holds_every_python_part(tmp_path, run):
    names, archive = wheel_of(tmp_path, run, CXX="/nonexistent/c++")
    check_python_parts(names, archive)
    assert "fastmkd/lib/build.json" in names
    assert not [name for name in names if name.endswith(".so")]


@pytest.mark.long
def test_wheel_with_a_compiler_holds_the_libraries_and_runs(tmp_path, run):
    names, archive = wheel_of(tmp_path, run)
    check_python_parts(names, archive)
    built = {Path(name).name.partition(".")[0] for name in names if name.endswith(".so")}
    assert built == {"_native", "libfastmkd_core", "libfastmkd_cpu", "libfastmkd_ops"}
    archive.extractall(tmp_path / "site")
    said = run(
        sys.executable, "-c", "import fastmkd, sys; print(fastmkd.__file__); fastmkd.show_config()",
        PYTHONPATH=str(tmp_path / "site"), PYTHONSAFEPATH="1",
    )  # fmt: skip
    assert said.startswith(str(tmp_path / "site"))


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name.partition(".")[0])
def test_notices_name_what_a_library_loads(library):
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    said = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    for needed in re.findall(r"\(NEEDED\).*\[(.+)\]", said):
        name = needed.partition(".so")[0]
        if not name.startswith("libfastmkd"):
            shown = "ld-linux*.so" if name.startswith("ld-linux") else f"{name}.so"
            assert shown in NOTICES, f"{library.name} loads {needed}"


def test_notices_name_what_is_compiled_in():
    included = set()
    for source in (ROOT / "csrc").rglob("*.*"):
        if source.suffix in (".h", ".cpp", ".cu", ".cuh"):
            included |= set(re.findall(r"#include <([\w.]+)/", source.read_text()))
    owners = {"torch": "PyTorch", "pybind11": "pybind11"}
    assert included <= owners.keys(), f"whose headers are {sorted(included - owners.keys())}? Name them in the notices."
    for owner in owners.values():
        assert f"| {owner} |" in NOTICES
        assert f"\n## {owner}\n" in NOTICES
    assert "cudart_static" in NOTICES  # CUDA_RUNTIME_LIBRARY Static
