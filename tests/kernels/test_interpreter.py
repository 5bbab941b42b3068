"""Runs the numerics tests under Triton's interpreter, in a session of its own, since Triton decides at import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("file", "at_least"),
    [
        ("test_numerics.py", 100),
        ("test_masked_numerics.py", 60),
        ("test_gram_numerics.py", 24),
        ("test_attention_numerics.py", 30),
        ("test_stitch_numerics.py", 16),
        ("test_mae_numerics.py", 68),
        ("test_recovered_numerics.py", 16),
    ],
)
def test_numerics_under_the_interpreter(file: str, at_least: int) -> None:
    pytest.importorskip("triton")
    numerics = Path(__file__).with_name(file)
    options = ["-q", "--tb=short", "-m", "not gpu", "-p", "no:cacheprovider"]
    # One thread: NumPy and PyTorch work on tiny blocks here, more threads would only wait for each other.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-m", "pytest", numerics, *options], env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, f"\n{child.stdout}\n{child.stderr}"
    passed = re.search(r"(\d+) passed", child.stdout)
    assert passed, child.stdout
    assert int(passed[1]) >= at_least, child.stdout
