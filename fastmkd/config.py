"""What was built, what works here, and why something does not: `show_config` and ``fastmkd env``."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path

import torch

from . import __version__, _native_loader
from .ops import OPS, cache, choice
from .ops.registry import Op

__all__ = ["config_text", "show_config"]

PACKAGES = ("torch", "triton", "timm", "numpy", "accelerate", "jsonargparse", "safetensors", "nvtx")


def show_config() -> None:
    """Prints versions, processor features, and per op which backends are built, active and on record, with reasons.

    Example:
        >>> show_config()  # doctest: +ELLIPSIS
        fastmkd ...
    """
    print(config_text())


def config_text() -> str:
    """Returns what `show_config` prints, without a final newline.

    Example:
        >>> "cls_saliency" in config_text()
        True
    """
    return "\n".join([*_versions(), *_machine(), *_native(), "", *_ops()])


def _versions() -> list[str]:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    python = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    return [f"fastmkd {__version__}", f"  {python}", "  " + ", ".join(found)]


def _machine() -> list[str]:
    status = _native_loader.load()
    features = " ".join(status.cpu_features) or "unknown, since the compiled library is missing"
    lines = [f"  processor: {torch.get_num_threads()} threads; features: {features}"]
    if status.isa:
        lines.append(f"  instruction set in use: {status.isa} (FASTMKD_ISA chooses another)")
    if not torch.cuda.is_available():
        return [*lines, "  GPU: none visible to PyTorch"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        lines.append(f"  GPU {index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm {capability}")
    return lines


def _native() -> list[str]:
    status = _native_loader.load()
    build = ", ".join(f"{key} {value}" for key, value in status.build.items() if isinstance(value, str))
    return [
        "  compiled CPU library: " + ("loaded" if status.cpu else f"not loaded: {status.cpu_reason}"),
        "  compiled CUDA library: " + ("loaded" if status.cuda else f"not loaded: {status.cuda_reason}"),
        *([f"  build: {build}"] if build else []),
    ]


def _ops() -> list[str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    width = 2 + max(map(len, OPS))
    lines = [f"{'op':<{width}}{'auto takes':<12}{'usable':<24}on record as right (GPU)"]
    reasons: dict[str, list[str]] = {}
    for op in OPS.values():
        usable = [b.name for b in op.backends.values() if b.reason() is None]
        takes = op.backends["eager"].dtypes
        first = choice.candidates(op, device, torch.float32 if torch.float32 in takes else takes[0])[0].name
        lines.append(f"{op.name:<{width}}{first:<12}{' '.join(usable):<24}{_on_record(op)}")
        for backend in op.backends.values():
            reason = backend.reason()
            if reason is not None:
                reasons.setdefault(f"{backend.name}: {reason}", []).append(op.name)
    if reasons:
        lines += ["", "not usable here:"]
        lines += [f"  {why} ({', '.join(names)})" for why, names in reasons.items()]
    return lines


def _on_record(op: Op) -> str:
    """The GPU models for which a committed table vouches for a backend of `op`."""
    found = []
    for path in sorted(Path(cache.__file__).parent.glob("tables/*.json")):
        verified = json.loads(path.read_text()).get("verified", [])
        found += [f"{name} on {path.stem}" for name in op.backends if f"{op.name}/{name}" in verified]
    return ", ".join(found) or "none yet"


if __name__ == "__main__":
    show_config()
