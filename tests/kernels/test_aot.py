"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without spilling, and uses tensor cores where it should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = Path(__file__).with_name("aot.py")


def test_kernels_compile_well_for_every_architecture(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    import fastmkd.kernels

    # One test, one child: starting PyTorch and Triton costs as much as compiling a dozen kernels.
    report = tmp_path / "report.json"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    child = subprocess.run([sys.executable, CHILD, report], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    records = json.loads(report.read_text())
    faults = [f"{r['case']} on sm_{r['arch']}: {fault}" for r in records for fault in r["faults"]]
    assert not faults, "\n".join(faults)

    files = {path.stem for path in Path(fastmkd.kernels.__file__).parent.glob("*.py")} - {"__init__", "launch", "taps"}
    for arch in (80, 90, 100):
        assert {r["kernel"] for r in records if r["arch"] == arch} == files, "a kernel file lists no AOT_CASES"


def test_a_fused_multiply_add_and_a_spill_are_found(tmp_path: Path) -> None:
    """The check itself can fail: the resize with fusion allowed, and 64 values a thread in the selection."""
    pytest.importorskip("triton")
    script = tmp_path / "bad.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(CHILD.parent)!r})\n"
        "import aot, dataclasses\n"
        "from fastmkd.kernels.select_tokens import AOT_CASES\n"
        "fused = dataclasses.replace(AOT_CASES[0], options={'enable_fp_fusion': True})\n"
        "crowded = dataclasses.replace(AOT_CASES[-1], constexprs={'BLOCK': 2048}, options={'num_warps': 1})\n"
        "for case in (fused, crowded):\n"
        "    print(aot.inspect(case, 90, aot.compile_case(case, 90))['faults'])\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    child = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "FFMA" in child.stdout
    assert "spills registers to local memory" in child.stdout
