"""The fuzzer of the index code builds and runs for a moment; docs/reliability.md says how to let it run for long."""

from __future__ import annotations

import re
import shutil

import pytest


@pytest.mark.long
def test_the_fuzzer_finds_nothing(tmp_path, run, root):
    if not shutil.which("g++"):
        pytest.skip("no GCC here")
    options = ["-DFASTMKD_FUZZ=ON", "-DFASTMKD_SANITIZE=address;undefined", "-DCMAKE_CXX_COMPILER=g++"]
    run("cmake", "-S", root, "-B", tmp_path, "-G", "Ninja", *options)
    run("cmake", "--build", tmp_path, "--target", "index_fuzz")
    said = run(tmp_path / "index_fuzz", "-runs=3000", "-seed=1")
    found = re.search(r"3000 executions .* (\d+) inputs kept, (\d+) places reached", said)
    assert found, said
    assert int(found[1]) > 20
    assert int(found[2]) > 500
