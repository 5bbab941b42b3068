"""docs/install.md says of the backends what the registry says."""

from __future__ import annotations

import re
from pathlib import Path

from fastmkd.ops import OPS

PAGE = (Path(__file__).parents[2] / "docs" / "install.md").read_text()


def row(part: str) -> tuple[str, ...]:
    """The cells of the row of the first table that begins with `part`."""
    found = next(line for line in PAGE.splitlines() if line.startswith(f"| {part}"))
    return tuple(cell.strip() for cell in found.strip("|").split("|"))


def test_the_cuda_kernels_are_named_and_what_takes_them_is_said():
    cuda = {op.name: op.backends["cuda"] for op in OPS.values() if "cuda" in op.backends}
    what, when, otherwise = row("CUDA kernels")
    assert set(re.findall(r"`(\w+)`", what)) == cuda.keys()
    assert not any(backend.default for backend in cuda.values()), "auto takes one: say so on the page"
    assert 'used only inside `fastmkd.backend("cuda")`' in when
    assert otherwise == "nothing changes"


def test_without_triton_plain_pytorch_runs():
    assert row("Triton kernels")[2] == "plain PyTorch"
