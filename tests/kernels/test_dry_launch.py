"""Every Triton launcher can be launched on a GPU with the samples of the registry, whichever of its integers are 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastmkd.ops import OPS

CHILD = Path(__file__).with_name("dry_launch.py")


@pytest.mark.parametrize("options", [(), pytest.param(("--all",), marks=pytest.mark.long)], ids=["some", "all"])
def test_launches_are_specialised_as_on_a_gpu(tmp_path: Path, options: tuple[str, ...]) -> None:
    """And the check can fail: it finds a kernel that cannot be launched with an integer that is 1."""
    pytest.importorskip("triton")
    report = tmp_path / "report.json"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    child = subprocess.run([sys.executable, CHILD, report, *options], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    found = json.loads(report.read_text())
    assert not found["faults"], "\n\n".join(found["faults"])
    (spoilt,) = found["spoilt"]
    assert spoilt.startswith("spoilt_kernel, size 1: CompilationError")

    assert {name.split()[0] for name in found["launches"]} == {
        op.name for op in OPS.values() if "triton" in op.backends
    }
    launched = {kernel for kernels in found["launches"].values() for kernel in kernels}
    assert launched == found["ones"].keys(), "a kernel that no sample launches, or that has no AOT_CASES"
    assert found["ones"]["centred_gram._sum_splits_kernel"] == ["n", "tiles", "split"]
