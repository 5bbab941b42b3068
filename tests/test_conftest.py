"""What the suite does with its own tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

TEST = """
import pytest, torch

def test_of_a_processor(): pass
@pytest.mark.gpu
def test_of_a_gpu(): assert torch.cuda.is_available()
"""


def test_gpu_tests_are_known_by_their_mark_and_not_by_the_name_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "gpu"
    folder.mkdir()
    shutil.copy(Path(__file__).parent / "conftest.py", folder)
    (folder / "test_some.py").write_text(TEST)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    where = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=folder, env=where, capture_output=True, text=True, timeout=120)
    assert "1 passed, 1 skipped" in done.stdout, done.stdout
