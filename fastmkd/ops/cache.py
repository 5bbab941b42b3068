"""What is known about a device: shipped tables, and verdicts and choices found here and kept on disk.

The cache is one JSON file a device under ``$FASTMKD_CACHE`` (default ``~/.cache/fastmkd``). It is read once and written
atomically, entry by entry and under a lock, so that processes side by side keep what the others found. A file that
cannot be read or written is ignored, since everything in it can be found again. So is a file system without locks:
of two processes that write at the same moment one may then lose what it found.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

__all__ = ["choices", "device_name", "remember", "replace", "snapshot", "table", "verdict", "verified"]

PATIENCE = 10.0  # seconds; a lock is held for milliseconds, unless its owner is stopped or was forked meanwhile

_TABLES = Path(__file__).parent / "tables"
_known: dict[str, dict[str, Any]] = {}


@lru_cache(maxsize=64)
def device_name(device: torch.device) -> str:
    """Name of the device model as used in file names: ``"cpu"``, ``"nvidia-h200"``."""
    if device.type != "cuda":
        return device.type
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


@lru_cache(maxsize=16)
def table(device: str) -> dict[str, Any]:
    """The table shipped for a device: ``{"<op>/<dtype>/<size class>" or "<op>": backend}``; may be empty."""
    path = _TABLES / f"{device}.json"
    return dict(json.loads(path.read_text())["choices"]) if path.is_file() else {}


@lru_cache(maxsize=16)
def verified(device: str) -> frozenset[str]:
    """The ``"<op>/<backend>"`` pairs that a committed record proves right on this device model."""
    path = _TABLES / f"{device}.json"
    return frozenset(json.loads(path.read_text()).get("verified", ())) if path.is_file() else frozenset()


def choices(device: str) -> dict[str, Any]:
    """The choices measured on this machine for a device."""
    return dict(_state(device)["choices"])


def verdict(device: str, pair: str) -> bool | None:
    """What the first use of ``"<op>/<backend>"`` on this device found: right, wrong, or not tried yet (None)."""
    found = _state(device)["verdicts"].get(pair)
    return None if found is None else bool(found)


def remember(device: str, key: str, value: str | bool) -> None:
    """Keeps a choice (a backend's name) or a verdict (a bool), in memory and on disk."""
    part = "verdicts" if isinstance(value, bool) else "choices"
    _state(device)[part][key] = value
    with _lock(device):
        on_disk = _read(device)  # other processes may have written since it was read
        on_disk[part][key] = value
        _write(device, on_disk)


def snapshot(device: torch.device) -> dict[str, Any]:
    """All that is known here about a device, as plain JSON data."""
    return _state(device_name(device))


def replace(device: torch.device, state: dict[str, Any]) -> None:
    """Takes over what another process knows; does not touch the disk."""
    _known[device_name(device)] = state


def _state(device: str) -> dict[str, Any]:
    if device not in _known:
        _known[device] = _read(device)
    return _known[device]


def _path(device: str) -> Path:
    root = os.environ.get("FASTMKD_CACHE") or Path.home() / ".cache" / "fastmkd"
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    # A new compiler may be right where an old one was wrong, or the other way round: each combination has its own file.
    return Path(root) / f"{device}_fastmkd-{__version__}_torch-{torch.__version__}_triton-{triton}.json"


@contextlib.contextmanager
def _lock(device: str) -> Iterator[None]:
    """Keeps other processes from writing; in vain where there are no locks, since no step may wait for a cache."""
    path = _path(device).with_suffix(".lock")  # not the file itself, which each writing replaces
    with contextlib.ExitStack() as held:
        # A home that is read-only, a file system without locks, a lock that is not let go.
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(path.open("a"))
            if fcntl is not None:
                _take(file.fileno())
        yield


def _take(file: int) -> None:
    """Waits for the lock of an open file; raises OSError when it cannot be had."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(0.005)


def _read(device: str) -> dict[str, Any]:
    empty: dict[str, Any] = {"choices": {}, "verdicts": {}}
    try:
        state = json.loads(_path(device).read_text())
    except (OSError, ValueError):
        return empty
    sound = isinstance(state, dict) and all(isinstance(state.get(part), dict) for part in empty)
    return state if sound else empty


def _write(device: str, state: dict[str, Any]) -> None:
    path = _path(device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(state, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError:
        pass  # a read-only home costs a measurement per process, nothing else
