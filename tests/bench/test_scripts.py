"""The shell scripts parse, and say in one sentence what they lack."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastmkd.bench.environment import REPOSITORY

SCRIPTS = ("gpu.sh", "profile.sh")


def run(script: str, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": sys.executable, **({} if path is None else {"PATH": path})}
    return subprocess.run(
        ["/bin/bash", str(REPOSITORY / "bench" / script), *arguments],
        capture_output=True,
        text=True,
        env=env,
        timeout=120,
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_parses_and_is_executable(script: str) -> None:
    file = REPOSITORY / "bench" / script
    assert subprocess.run(["/bin/bash", "-n", str(file)]).returncode == 0
    assert os.access(file, os.X_OK)


def test_profile_script_explains_itself() -> None:
    done = run("profile.sh")
    assert done.returncode == 2
    assert "bench/profile.sh ncu  NAME VARIANT" in done.stderr
    assert run("profile.sh", "perf", "a", "b").returncode == 2


def test_profile_script_names_the_missing_tool(tmp_path: Path) -> None:
    for tool in ("dirname", "sed"):
        (tmp_path / tool).symlink_to(Path("/usr/bin") / tool)
    done = run("profile.sh", "ncu", "patch_embed", "eager", path=str(tmp_path))
    assert done.returncode == 3
    assert done.stderr == "bench/profile.sh: ncu is not on PATH; it comes with NVIDIA's Nsight tools.\n"
