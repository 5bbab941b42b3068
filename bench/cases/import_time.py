"""Time to import fastmkd, against torch and timm alone, in fresh processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

from ..registry import Answer, Case, Setting, Variant, benchmark

PROGRAMS = {
    "import torch, timm": "import torch, timm",
    "import fastmkd": "import fastmkd",
    "from fastmkd import MaskedViT, MaskedKD": "from fastmkd import MaskedViT, MaskedKD",
    "all public names": "from fastmkd import *",
}


def _process(program: str) -> Callable[[], None]:
    command = [sys.executable, "-c", program]
    return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL) and None


def _grid(setting: Setting) -> list[dict[str, Any]]:
    return [{}]


@benchmark(
    "import_time",
    summary="fresh processes: import of fastmkd (asked: under 1.5 times torch + timm)",
    grid=_grid,
    devices=("cpu",),
    dtypes=("fp32",),
)
def import_time(setting: Setting) -> Case:
    """Start of the interpreter included; files are in the page cache after the warm-up."""
    nothing = Answer()
    variants = [Variant(name, _process(program), nothing) for name, program in PROGRAMS.items()]
    return Case("fresh process", "import", variants, baseline="import torch, timm")
