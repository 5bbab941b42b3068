"""What a record says about the machine and the code that made it."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import re
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastmkd.ops import cache

__all__ = ["REPOSITORY", "describe", "device_slug", "results_folder"]

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = ("fastmkd", "kernels", "csrc")  # what a number depends on


def device_slug(device: torch.device) -> str:
    """Folder name of a device: the GPU's or the processor's model name in lower case.

    Example:
        >>> device_slug(torch.device("cpu")) == device_slug(torch.device("cpu")).lower()
        True
    """
    return cache.device_name(device) if device.type == "cuda" else slug(cpu_model())


def slug(name: str) -> str:
    """Lower case, with one dash for everything that is not a letter, a digit or a dot.

    Example:
        >>> slug("Intel(R) Xeon(R) Processor @ 2.50GHz")
        'intel-xeon-processor-2.50ghz'
    """
    name = re.sub(r"\((r|tm|c)\)", " ", name.lower())
    return re.sub(r"[^a-z0-9.]+", "-", name).strip("-.")


def results_folder() -> Path:
    """Where records go: ``bench/results`` of the repository, or ``bench_results`` here for an installed wheel."""
    inside = (REPOSITORY / "pyproject.toml").is_file()
    return REPOSITORY / "bench" / "results" if inside else Path("bench_results")


@lru_cache(maxsize=1)
def cpu_model() -> str:
    """The processor's model name as the system gives it."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def describe(device: torch.device) -> dict[str, Any]:
    """Versions, device, code state and date, as plain JSON data.

    ``commit`` comes from git, or from ``FASTMKD_COMMIT`` where the repository was copied without its history;
    ``sources`` is a hash of the files that numbers depend on, so that two records can be compared without either.
    """
    commit, dirty = _commit()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "sources": _hash_of_sources(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "timm": _version("timm"),
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "slug": device_slug(device),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "features": _features(device),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
    }


def _features(device: torch.device) -> list[str]:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return [f"sm_{major}{minor}"]
    try:
        from fastmkd._native_loader import load
    except ImportError:
        return [torch.backends.cpu.get_cpu_capability()]
    status = load()
    return [torch.backends.cpu.get_cpu_capability(), *([f"fastmkd:{status.isa}"] if status.cpu else ["fastmkd:none"])]


def _commit() -> tuple[str | None, bool | None]:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    if not (REPOSITORY / ".git").exists():
        return os.environ.get("FASTMKD_COMMIT"), None
    try:
        # Records and the pages made of them do not change what is measured.
        changed = git("status", "--porcelain", "--", ".", ":!bench/results", ":!docs")
        return git("rev-parse", "HEAD"), bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FASTMKD_COMMIT"), None


def _hash_of_sources() -> str:
    digest = hashlib.sha256()
    for room in SOURCES:
        for path in sorted((REPOSITORY / room).rglob("*")):
            if path.suffix in {".py", ".cpp", ".cu", ".cuh", ".h"}:
                digest.update(str(path.relative_to(REPOSITORY)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    try:
        found = re.search(r"Kernel Module[^\d]*([\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    if found:
        return found.group(1)
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None
