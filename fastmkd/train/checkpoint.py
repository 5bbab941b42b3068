"""Checkpoints that are either complete or not there: safetensors and JSON, no pickle.

A checkpoint is a folder ``step_00000123`` with ``NAME.safetensors`` files and ``state.json``, which lists size and
SHA-256 of every file. It is written under another name in the same folder, flushed to the disk, then renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import UserError

__all__ = ["Checkpoint", "atomic_write", "load_checkpoint", "newest_checkpoint", "save_checkpoint", "save_tensors"]

STATE = "state.json"
FORMAT = 1


@dataclass
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        step: updates done.
        tensors: by file, then by name.
        state: everything that is not a tensor.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def atomic_write(path: str | Path, write: Callable[[Path], object]) -> None:
    """Replaces a file so that a crash at any moment leaves either the old one or the new one.

    Args:
        path: the file.
        write: writes the new content to the path that it gets, in the same folder.

    Example:
        >>> import tempfile; folder = Path(tempfile.mkdtemp())
        >>> atomic_write(folder / "a.txt", lambda part: part.write_text("whole"))
        >>> [file.name for file in folder.iterdir()]
        ['a.txt']
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        write(part)
        _flush(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    _flush(path.parent)


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors to a safetensors file, atomically.

    Args:
        path: the file.
        tensors: by name; on any device, any layout, shared memory allowed.
        metadata: strings to keep in the file's header.
    """
    atomic_write(path, lambda part: _write_tensors(part, tensors, metadata))


def save_checkpoint(
    folder: str | Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int = 2
) -> Path:
    """Writes a checkpoint, then removes the oldest beyond `keep`.

    Args:
        folder: of all checkpoints of a run.
        step: updates done.
        tensors: by file, then by name.
        state: JSON-able.
        keep: how many complete checkpoints to leave.

    Returns:
        The folder of the checkpoint.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step_*"):  # of a run that was killed while it wrote
        shutil.rmtree(leftover)
    target = folder / f"step_{step:08d}"
    part = folder / f".{target.name}.{uuid.uuid4().hex[:8]}.part"
    part.mkdir()
    try:
        files = {}
        for name, values in tensors.items():
            path = part / f"{name}.safetensors"
            _write_tensors(path, values)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
            _flush(path)
        (part / STATE).write_text(json.dumps({"format": FORMAT, "step": step, "files": files, "state": state}))
        _flush(part / STATE)
        _flush(part)
        if target.exists():  # only a damaged one can be there: a run never repeats a step it has saved
            shutil.rmtree(target)
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    _flush(folder)
    for old in _steps(folder)[keep:]:
        shutil.rmtree(old)
    return target


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint after checking that every file is as it was written.

    Args:
        path: folder of the checkpoint.

    Raises:
        UserError: not a checkpoint, or a file of it is missing, cut off or changed.
    """
    from safetensors.torch import load_file

    path = Path(path)
    try:
        content = json.loads((path / STATE).read_text())
        files, step, state, version = content["files"], content["step"], content["state"], content["format"]
    except FileNotFoundError:
        raise UserError(f"{path} is not a checkpoint: it has no {STATE}; name a folder like step_00000123.") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"the checkpoint {path} is damaged: {STATE} is cut off or changed; use an older one.") from None
    if version != FORMAT:
        raise UserError(f"the checkpoint {path} has format {version}; this fastmkd reads format {FORMAT}.")
    tensors = {}
    for name, expected in files.items():
        file = path / name
        size = file.stat().st_size if file.is_file() else 0
        if size != expected["bytes"]:
            raise UserError(
                f"the checkpoint {path} is damaged: {name} has {size} of {expected['bytes']} bytes; use an older one."
            )
        if _digest(file) != expected["sha256"]:
            raise UserError(f"the checkpoint {path} is damaged: the content of {name} has changed; use an older one.")
        tensors[file.stem] = load_file(file)
    return Checkpoint(step, tensors, state)


def newest_checkpoint(folder: str | Path) -> tuple[Checkpoint | None, list[str]]:
    """Reads the newest complete checkpoint of a run.

    Args:
        folder: of all checkpoints of a run.

    Returns:
        The checkpoint (None if there is none at all) and what was wrong with newer ones.

    Raises:
        UserError: there are checkpoints but all are damaged.
    """
    problems: list[str] = []
    for path in _steps(Path(folder)):
        try:
            return load_checkpoint(path), problems
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(f"no checkpoint in {folder} can be read. {problems[0]} Remove the folder to start afresh.")
    return None, []


def _steps(folder: Path) -> list[Path]:
    """Folders of complete checkpoints, newest first."""
    return sorted(folder.glob("step_*"), reverse=True)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    from safetensors.torch import save_file

    # Copies, because safetensors refuses tensors that share memory (tied weights).
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save_file(plain, path, metadata=dict(metadata or {"format": "pt"}))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
