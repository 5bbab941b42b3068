"""The shell scripts parse, and say in one sentence what they lack."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastmkd.bench.environment import REPOSITORY
from fastmkd.ops import OPS

SCRIPTS = ("gpu.sh", "profile.sh")


def run(
    script: str, *arguments: str, path: str | None = None, python: Path = Path(sys.executable)
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": str(python), **({} if path is None else {"PATH": path})}
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_script_refuses_in_one_sentence_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    done = run("gpu.sh")
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith("bench/gpu.sh needs an NVIDIA GPU")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


FAKE_PYTHON = """#!/bin/bash
case "$*" in
  *device_name*) echo fake-gpu ;;
  *"-m pytest"*) sleep 60 ;;
  *fastmkd.ops.check*) echo 3 of 3 samples right ;;
  *) echo ran "$@" ;;
esac
"""


def test_gpu_script_ends_in_time_and_keeps_what_came_before_a_hung_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, out = tmp_path / "python", tmp_path / "out"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    monkeypatch.setenv("OUT", str(out))
    monkeypatch.setenv("SECONDS_ALL", "7")
    begin = time.monotonic()
    done = run("gpu.sh", python=fake)
    assert time.monotonic() - begin < 20
    assert done.returncode == 1
    summary = (out / "summary.txt").read_text()
    assert summary.startswith("fake-gpu, ")
    assert "build      ok" in summary
    assert "3 of 3 samples right" in summary
    assert re.search(r"^tests +stopped after its \d+ s; see tests.log$", summary, re.MULTILINE)
    assert re.search(r"^bench +left out: no time$", summary, re.MULTILINE)
    assert "pip install --no-build-isolation --no-deps -e ." in (out / "build.log").read_text()
    assert done.stdout.endswith(summary)
    assert len(list(out.rglob("*"))) <= 8


FAST_PYTHON = FAKE_PYTHON.replace("sleep 60", "true")
SANITIZER = """#!/bin/bash
case "$*" in *"racecheck"*) exit 9 ;; esac
"""


def quick_gpu_run(folder: Path, monkeypatch: pytest.MonkeyPatch, sanitizer: str | None) -> tuple[int, str]:
    """Status and summary of a run in which all but the sanitizer is quick and right."""
    tools = {"python": FAST_PYTHON, **({} if sanitizer is None else {"compute-sanitizer": sanitizer})}
    for name, text in tools.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("OUT", str(folder / "out"))
    places = [room for room in os.environ["PATH"].split(":") if not Path(room, "compute-sanitizer").exists()]
    done = run("gpu.sh", python=folder / "python", path=":".join([str(folder), *places]))
    return done.returncode, (folder / "out/summary.txt").read_text()


def test_a_gpu_run_without_the_sanitizer_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, summary = quick_gpu_run(tmp_path, monkeypatch, None)
    assert re.search(r"^bench +ok", summary, re.MULTILINE)
    assert re.search(r"^sanitizer +failed: compute-sanitizer is not on PATH", summary, re.MULTILINE)
    assert status == 1


def test_the_sanitizer_sees_every_op(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, summary = quick_gpu_run(tmp_path, monkeypatch, "#!/bin/bash\n")
    assert status == 0, summary
    script = (REPOSITORY / "bench/gpu.sh").read_text()
    named = {kind: re.search(rf'^{kind}_OPS="([^"]+)"', script, re.MULTILINE)[1].split() for kind in ("CUDA", "TRITON")}
    assert set(named["CUDA"]) == {name for name, op in OPS.items() if "cuda" in op.backends}
    assert sorted(named["CUDA"] + named["TRITON"]) == sorted(OPS)
    for op in named["TRITON"]:
        assert re.search(rf"^memcheck {op} +ok", summary, re.MULTILINE), summary


def test_an_error_of_the_sanitizer_fails_the_run_and_no_time_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECONDS_OP", "9999")
    status, summary = quick_gpu_run(tmp_path, monkeypatch, SANITIZER)
    assert re.search(r"^memcheck +ok", summary, re.MULTILINE)
    assert re.search(r"^racecheck +failed with status 9", summary, re.MULTILINE)
    assert "memcheck   left out for want of time: masked_conv2d_weight" in summary
    assert status == 1


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
