"""bench/gpu.sh with made-up tools: what it runs, in which order, and what is left when the time is over."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastmkd.bench.environment import REPOSITORY
from fastmkd.bench.gpu_status import BEYOND
from fastmkd.bench.registry import benchmarks
from fastmkd.bench.targets import TARGETS
from fastmkd.ops import OPS

SCRIPT = REPOSITORY / "bench/gpu.sh"
# Writes down how it was called, and does what {stage} adds.
PYTHON = """#!/bin/bash
case "$*" in
  *device_name*) echo fake-gpu 90; exit ;;
  *"import xdist"*) echo yes; exit ;;
esac
echo "$FASTMKD_CUDA_ARCHS $PIP_NO_INDEX $*" >>"$CALLS"
case "$*" in
  {stage}
  *fastmkd.ops.check*) echo "$3 3 of 3 samples right" ;;
  *) echo ran "$@" ;;
esac
"""
SANITIZER = """#!/bin/bash
if [ "$1" = --help ]; then echo "  --base-port arg"; exit; fi
echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $FASTMKD_CACHE $*" >>"$CALLS"
{stage}
"""

Run = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture
def gpu_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the script; returns its status, its summary and how it called the tools, in order."""
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("PYTHON", str(tmp_path / "python"))
    places = [place for place in os.environ["PATH"].split(":") if not Path(place, "compute-sanitizer").exists()]
    monkeypatch.setenv("PATH", ":".join([str(tmp_path), *places]))

    def run(*stages: str, python: str = "", sanitizer: str | None = "") -> tuple[int, str, list[str]]:
        tools = {"python": PYTHON.replace("{stage}", python)}
        if sanitizer is not None:
            tools["compute-sanitizer"] = SANITIZER.replace("{stage}", sanitizer)
        for name, text in tools.items():
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        done = subprocess.run(["/bin/bash", str(SCRIPT), *stages], capture_output=True, text=True, timeout=120)
        summary = (tmp_path / "out/summary.txt").read_text()
        assert done.stdout.endswith(summary)
        assert len(list((tmp_path / "out").rglob("*"))) <= 8, "no more files than come back from a lent machine"
        return done.returncode, summary, (tmp_path / "calls").read_text().splitlines()

    return run


def words(name: str) -> list[str]:
    """The words of a list in the script."""
    return re.search(rf'^{name}="([^"]+)"', SCRIPT.read_text(), re.MULTILINE)[1].split()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_refuses_in_one_sentence_and_writes_nothing(tmp_path: Path) -> None:
    env = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
    done = subprocess.run(["/bin/bash", str(SCRIPT)], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith("bench/gpu.sh needs an NVIDIA GPU")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_stage_that_is_not_there_is_named() -> None:
    done = subprocess.run(["/bin/bash", str(SCRIPT), "chekc"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == (
        "bench/gpu.sh has no stage 'chekc'; the stages are check beyond bench tests sanitize ops rest huge \n"
    )


def test_what_only_a_gpu_can_answer_comes_first(gpu_run: Run) -> None:
    status, summary, calls = gpu_run()
    assert status == 0, summary
    kinds = {
        "build": "pip install --no-build-isolation --no-deps -e .",
        "check": "-m fastmkd.ops.check",
        "beyond": "-m gpu ",
        "asked": "--dtype bf16",
        "tests": "-m gpu and not long",
        "sanitize": "--tool memcheck",
        "ops": "-m fastmkd.bench op.*",
        "others": "-m fastmkd.bench packed_attention",
        "fp32": "--dtype fp32",
        "huge": "-m gpu and long",
    }
    first = [next(number for number, call in enumerate(calls) if text in call) for text in kinds.values()]
    assert first == sorted(first), dict(zip(kinds, first, strict=True))
    builds = [call for call in calls if "-m pip" in call]
    assert [call.split(" -m ")[0] for call in builds] == ["90 1"], "code for this GPU alone, and no index is asked"


def test_each_op_is_checked_in_a_process_of_its_own(gpu_run: Run) -> None:
    status, summary, calls = gpu_run("check")
    assert status == 0, summary
    checks = [call.split("fastmkd.ops.check ")[1] for call in calls if "fastmkd.ops.check" in call]
    out = Path(os.environ["OUT"]) / "check.jsonl"
    assert sorted(checks) == sorted(f"{op} --device cuda --json {out}" for op in OPS)
    for op in OPS:
        assert re.search(rf"^check {op} +ok", summary, re.MULTILINE), summary
        assert f"{op} 3 of 3 samples right" in summary


def test_tests_read_only_the_files_of_gpu_tests(gpu_run: Run) -> None:
    status, summary, calls = gpu_run("beyond", "tests")
    assert status == 0, summary
    beyond, rest = (call for call in calls if "-m pytest" in call)
    for call in (beyond, rest):
        assert f"-p fastmkd.bench.outcomes --outcomes {os.environ['OUT']}/tests.jsonl" in call
        assert re.search(r"-m pytest -p xdist.plugin -n \d+ --dist worksteal ", call)
    named = {test.split("::")[0] for test in BEYOND.values()}
    assert set(beyond.split("-m gpu ")[1].split()) == named
    tests = (REPOSITORY / "tests").rglob("test_*.py")
    files = {str(path.relative_to(REPOSITORY)) for path in tests if "pytest.mark" + ".gpu" in path.read_text()}
    assert set(rest.split("-m gpu and not long ")[1].split()) == files - named
    assert len(files) > 20


def test_what_was_asked_of_a_gpu_is_measured_first_and_nothing_is_left_out() -> None:
    asked = [target for target in TARGETS if target.gpu]
    assert set(words("ASKED")) == {target.benchmark for target in asked}
    assert {target.dtype for target in asked} == {"bf16"}
    on_gpu = {name for name, entry in benchmarks().items() if "cuda" in entry.devices}
    assert {name for name in on_gpu if not name.startswith("op.")} == {*words("ASKED"), *words("OTHERS")}


def test_only_the_stages_asked_for_run_and_the_records_of_others_stay(gpu_run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("check.jsonl", "tests.jsonl"):
        (tmp_path / "out" / name).write_text("an earlier run\n")
    status, summary, calls = gpu_run("bench")
    assert status == 0, summary
    assert [call.split("-m ")[1].split()[0] for call in calls if " -c " not in call] == ["pip", "fastmkd.bench"]
    assert (tmp_path / "out/check.jsonl").read_text() == "an earlier run\n"
    gpu_run("check", "beyond", "tests")
    assert not any("earlier" in path.read_text() for path in (tmp_path / "out").glob("*.jsonl"))


HUNG_CHECK = """*fastmkd.ops.check*)
    echo "{\\"op\\": \\"$3\\"}" >>"$7"
    if [ "$3" = masked_conv2d ]; then sleep 60; fi ;;
  *"-m pytest"*) sleep 60 ;;"""


def test_a_hung_stage_costs_itself_and_what_was_found_is_kept(
    gpu_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECONDS_ALL", "12")
    monkeypatch.setenv("SECONDS_LEAST", "2")
    begin = time.monotonic()
    status, summary, _ = gpu_run("beyond", "bench", python=HUNG_CHECK)
    assert time.monotonic() - begin < 14
    assert status == 1
    assert re.search(r"^build +ok", summary, re.MULTILINE)
    assert re.search(r"^beyond +stopped after its \d+ s; see tests.log$", summary, re.MULTILINE)
    assert re.search(r"^bench +left out: no time$", summary, re.MULTILINE)
    status, summary, _ = gpu_run("check", "bench", python=HUNG_CHECK)
    assert status == 1
    assert re.search(r"^check masked_conv2d +stopped after its \d+ s; see summary.txt$", summary, re.MULTILINE)
    rows = [json.loads(line)["op"] for line in (tmp_path / "out/check.jsonl").read_text().splitlines()]
    assert sorted(rows) == sorted(OPS), "of the op that hung, what it had found"


def test_the_sanitizer_sees_every_op(gpu_run: Run) -> None:
    status, summary, calls = gpu_run("sanitize")
    assert status == 0, summary
    assert set(words("CUDA_OPS")) == {name for name, op in OPS.items() if "cuda" in op.backends}
    assert sorted(words("CUDA_OPS") + words("TRITON_OPS")) == sorted(OPS)
    watched = [call for call in calls if "--tool" in call]
    for tool, ops in {"memcheck": OPS, "racecheck": words("CUDA_OPS")}.items():
        for op in ops:
            assert re.search(rf"^{tool} {op} +ok", summary, re.MULTILINE), summary
            assert any(f"--tool {tool} " in c and c.endswith(f"fastmkd.ops.check {op} --device cuda") for c in watched)
    # Every tensor is an allocation then, whose end the tool knows; and the verdicts are kept apart.
    assert all(re.match(r"1 /\S+/cache --tool", call) for call in watched), watched
    assert len({re.search(r"--base-port (\d+)", call)[1] for call in watched}) == len(watched)


def test_a_gpu_run_without_the_sanitizer_has_failed(gpu_run: Run) -> None:
    status, summary, _ = gpu_run("sanitize", "ops", sanitizer=None)
    assert re.search(r"^sanitizer +failed: compute-sanitizer is not on PATH", summary, re.MULTILINE)
    assert re.search(r"^ops +ok", summary, re.MULTILINE)
    assert status == 1


def test_an_error_of_the_sanitizer_fails_the_run(gpu_run: Run) -> None:
    status, summary, _ = gpu_run("sanitize", sanitizer='case "$*" in *racecheck*tap_table*) exit 9 ;; esac')
    assert re.search(r"^racecheck tap_table +failed with status 9", summary, re.MULTILINE)
    assert summary.count("failed") == 1
    assert status == 1
