"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without spilling, and uses tensor cores where it should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = Path(__file__).with_name("aot.py")


@pytest.mark.parametrize("options", [(), pytest.param(("--all",), marks=pytest.mark.long)], ids=["some", "all"])
def test_kernels_compile_well_for_every_architecture(tmp_path: Path, options: tuple[str, ...]) -> None:
    """And the check can fail: it finds a fused multiply-add, and a spill, that were put there."""
    pytest.importorskip("triton")
    import fastmkd.kernels

    # One test, one child: starting PyTorch and Triton costs as much as compiling a dozen kernels.
    report = tmp_path / "report.json"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    child = subprocess.run([sys.executable, CHILD, report, *options], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    *records, fused, crowded = json.loads(report.read_text())
    faults = [f"{r['case']} on sm_{r['arch']}: {fault}" for r in records for fault in r["faults"]]
    assert not faults, "\n".join(faults)
    assert any("FFMA" in fault for fault in fused["faults"]), fused
    assert "spills registers to local memory" in crowded["faults"]

    files = {path.stem for path in Path(fastmkd.kernels.__file__).parent.glob("*.py")} - {"__init__", "launch", "taps"}
    for arch in (80, 90, 100):
        assert {r["kernel"] for r in records if r["arch"] == arch} == files, "a kernel file lists no AOT_CASES"
