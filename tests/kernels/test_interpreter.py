"""Runs the numerics tests under Triton's interpreter, in a session of its own, since Triton decides at import."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

AT_LEAST = {
    "test_numerics": 71,
    "test_masked_numerics": 60,
    "test_gram_numerics": 14,
    "test_attention_numerics": 18,
    "test_stitch_numerics": 6,
    "test_mae_numerics": 24,
    "test_recovered_numerics": 6,
    "test_cell_numerics": 11,
    "test_tile_numerics": 32,
}


@pytest.mark.parametrize("which", ["not long", pytest.param("long", marks=pytest.mark.long)])
def test_numerics_under_the_interpreter(tmp_path: Path, which: str) -> None:
    pytest.importorskip("triton")
    files = [Path(__file__).with_name(f"{name}.py") for name in AT_LEAST]
    options = [
        "-q",
        "--tb=short",
        "-m",
        f"not gpu and {which}",
        "-p",
        "no:cacheprovider",
        "--junitxml",
        tmp_path / "report.xml",
    ]
    # One thread: NumPy and PyTorch work on tiny blocks here, more threads would only wait for each other.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-m", "pytest", *files, *options], env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, f"\n{child.stdout}\n{child.stderr}"
    cases = ElementTree.parse(tmp_path / "report.xml").iter("testcase")
    passed = Counter(case.attrib["classname"].rpartition(".")[2] for case in cases if not len(case))
    least = AT_LEAST if which == "not long" else dict.fromkeys(AT_LEAST, 1)
    assert {name: passed[name] for name in least if passed[name] < least[name]} == {}
