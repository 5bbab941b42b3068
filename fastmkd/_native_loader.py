"""Loads the compiled libraries once and says why one is missing.

``fastmkd/lib/build.json``, written by the build, says what was compiled and what was skipped. The CPU and the CUDA
library are independent; both stand on ``libfastmkd_ops.so``, which declares the operators ``torch.ops.fastmkd_native``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

__all__ = ["NativeStatus", "load"]

LIB = Path(__file__).parent / "lib"
REBUILD = "run `pip install -e .` again"


@dataclass(frozen=True)
class NativeStatus:
    """What was built and what could be loaded.

    Args:
        cpu: the CPU operators are registered.
        cuda: the CUDA operators are registered (a device may still be missing).
        cpu_reason: why not, a sentence; None when they are.
        cuda_reason: likewise.
        build: what the build wrote down: compiler, torch, instruction sets, CUDA architectures, what was skipped.
        cpu_features: extensions of this processor, empty without the Python module ``fastmkd._native``.
        isa: instruction set in use, empty without that module.

    Example:
        >>> NativeStatus(cpu=False, cuda=False, cpu_reason="no compiler.", cuda_reason="no compiler.").cpu_reason
        'no compiler.'
    """

    cpu: bool
    cuda: bool
    cpu_reason: str | None
    cuda_reason: str | None
    build: dict[str, Any] = field(default_factory=dict)
    cpu_features: list[str] = field(default_factory=list)
    isa: str = ""


@lru_cache(maxsize=1)
def load() -> NativeStatus:
    """Loads what is there, on the first call; never raises.

    Returns:
        The status, the same object each time.

    Example:
        >>> status = load()
        >>> status.cpu or bool(status.cpu_reason)
        True
    """
    build = read_build(LIB)
    skipped = build.get("skipped", {})
    native, isa, isa_reason = find_isa()
    cpu_reason = isa_reason or _load("cpu", skipped)
    if torch.version.cuda is None:
        cuda_reason: str | None = "this PyTorch was built without CUDA."
    else:
        cuda_reason = _load("cuda", skipped)
    features = native.cpu_features() if native is not None else []
    return NativeStatus(cpu_reason is None, cuda_reason is None, cpu_reason, cuda_reason, build, features, isa)


def read_build(lib: Path) -> dict[str, Any]:
    """Returns what the build wrote into the folder `lib`; without it, a ``skipped`` entry that says so."""
    try:
        return json.loads((lib / "build.json").read_text())
    except FileNotFoundError:
        return {"skipped": {"native": f"fastmkd was not installed with its build step; {REBUILD}"}}
    except (OSError, ValueError) as error:
        return {"skipped": {"native": f"{lib / 'build.json'} cannot be read ({error}); {REBUILD}"}}


def find_isa() -> tuple[ModuleType | None, str, str | None]:
    """Returns the Python module, the instruction set, and why no kernel may run (``FASTMKD_ISA`` asks for too much)."""
    try:
        from fastmkd import _native
    except ImportError:
        return None, "", None
    try:
        return _native, _native.active_isa(), None
    except ValueError as error:
        return _native, "", f"{error}."


def _load(name: str, skipped: dict[str, str]) -> str | None:
    """Loads one library; returns why it could not be."""
    path = LIB / f"libfastmkd_{name}.so"
    if not path.is_file():
        why = skipped.get(name) or skipped.get("native") or f"{path.name} is missing from {path.parent}; {REBUILD}"
        return f"not built: {why}."
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return f"{path.name} cannot be loaded: {error}; {REBUILD}."
    return None
