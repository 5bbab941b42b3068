"""What became of a test is on disk at once, on one process and on several, and what was not run is on record too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
PLUGIN = ("-p", "fastmkd.bench.outcomes", "--outcomes", "out.jsonl", "-p", "no:cacheprovider")
TESTS = """
import os, shutil
import pytest

@pytest.fixture
def torn():
    yield
    raise ValueError

def test_right(): pass
def test_wrong(): assert False
def test_set_aside(): pytest.skip("not here")
def test_torn(torn): pass
@pytest.mark.parametrize("number", [1, 2])
def test_last(number): {last}
"""
EXPECTED = {
    "test_right": "passed",
    "test_wrong": "failed",
    "test_set_aside": "skipped",
    "test_torn": "failed",
}


def outcomes(path: Path) -> dict[str, str]:
    """The last outcome of each test."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(record.keys() == {"device", "torch", "test", "outcome"} for record in records)
    assert all(record["test"].startswith("test_some.py::") for record in records)
    return {record["test"].split("::")[1]: record["outcome"] for record in records}


def test_the_last_line_is_what_became_of_a_test_and_is_there_before_the_next_one(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_some=TESTS.replace("{last}", "shutil.copy('out.jsonl', f'before_{number}.jsonl')"))
    assert pytester.runpytest_inprocess(*PLUGIN).ret == 1
    assert outcomes(pytester.path / "out.jsonl") == {**EXPECTED, "test_last[1]": "passed", "test_last[2]": "passed"}
    # What would be there if the run had been killed in the last but one test, and in the last one.
    reached = {**EXPECTED, "test_last[1]": "collected", "test_last[2]": "collected"}
    assert outcomes(pytester.path / "before_1.jsonl") == reached
    assert outcomes(pytester.path / "before_2.jsonl") == {**reached, "test_last[1]": "passed"}


def test_of_several_processes_one_writes_and_one_that_dies_fails_its_test_alone(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS.replace("{last}", "os._exit(3) if number == 1 else None"))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    # No other plugins: each of the processes would load them.
    path = os.pathsep.join(path for path in sys.path if path)
    where = {**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "xdist.plugin", *PLUGIN, "-n", "2", "--dist", "worksteal"]
    done = subprocess.run(command, cwd=tmp_path, env=where, capture_output=True, timeout=120)
    assert done.returncode == 1
    assert outcomes(tmp_path / "out.jsonl") == {**EXPECTED, "test_last[1]": "failed", "test_last[2]": "passed"}
