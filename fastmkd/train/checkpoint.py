"""Checkpoints that are either complete or not there: safetensors and JSON, no pickle.

A checkpoint is a folder ``step_00000123`` with ``NAME.safetensors`` files and ``state.json``, which lists size and
SHA-256 of every file. It is written under a hidden name in the same folder, flushed to the disk, then renamed; so is
all that is removed. Whatever moment a process is killed at, the folder holds the old checkpoint or the new one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import UserError, cannot_write

__all__ = [
    "Checkpoint",
    "atomic_write",
    "load_checkpoint",
    "newest_checkpoint",
    "remove_parts",
    "save_checkpoint",
    "save_tensors",
    "set_aside",
    "state_digest",
]

STATE = "state.json"
SEAL = "sha256"  # of the rest of that file; checkpoints of older versions have none
FORMAT = 1
PART = ".part"  # ends the hidden name of what is being written or removed
OLD = ".old"  # of a checkpoint whose place is being taken
ASIDE = "aside_"  # begins the name of one that a run no longer goes on from
STEP = re.compile(r"step_(\d{8,})|\.step_(\d{8,})" + re.escape(OLD))


@dataclass
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        step: updates done.
        tensors: by file, then by name.
        state: everything that is not a tensor.
        path: its folder.
        digest: see `state_digest`.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    path: Path
    digest: str


def atomic_write(path: str | Path, write: Callable[[Path], object]) -> None:
    """Replaces a file so that a crash at any moment leaves either the old one or the new one.

    Args:
        path: the file.
        write: writes the new content to the path that it gets, in a hidden folder beside the file.

    Raises:
        UserError: the disk is full, or the folder may not be written to; the old file is still there.

    Example:
        >>> import tempfile; folder = Path(tempfile.mkdtemp())
        >>> atomic_write(folder / "a.txt", lambda part: part.write_text("whole"))
        >>> [file.name for file in folder.iterdir()]
        ['a.txt']
    """
    path = Path(path)
    part = _hidden(path)
    try:
        part.mkdir(parents=True)  # a folder, for what writes may make files of its own that a kill leaves behind
        write(part / path.name)
        _flush(part / path.name)
        (part / path.name).replace(path)
        _flush(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove_parts(folder: str | Path) -> None:
    """Removes what killed processes were writing to the files of a folder that nobody else writes to now.

    Args:
        folder: of files that `atomic_write` replaces.
    """
    for part in list(Path(folder).glob(f".*{PART}")):
        shutil.rmtree(part)


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

    Those of later updates neither count nor go: they are of another branch, or damaged; see `set_aside`.

    Args:
        folder: of all checkpoints of a run.
        step: updates done.
        tensors: by file, then by name.
        state: JSON-able.
        keep: how many complete checkpoints to leave, this one among them.

    Returns:
        The folder of the checkpoint.

    Raises:
        UserError: the disk is full, or the folder may not be written to; the older checkpoints are still there.
    """
    folder = Path(folder)
    target = folder / f"step_{step:08d}"
    part = _hidden(target)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _tidy(folder)
        part.mkdir()
        files = {}
        for name, values in tensors.items():
            path = part / f"{name}.safetensors"
            _write_tensors(path, values)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
            _flush(path)
        content = {"format": FORMAT, "step": step, "files": files, "state": state}
        (part / STATE).write_text(json.dumps({**content, SEAL: _seal(content)}))
        _flush(part / STATE)
        _flush(part)
        aside = folder / f".{target.name}{OLD}"
        if target.exists():  # damaged, or of a run that goes on from an older one
            target.rename(aside)
        part.rename(target)
        _flush(folder)
        if aside.exists():
            _remove(aside)
        for old in [path for path in _steps(folder) if path != target and _number(path) <= step][keep - 1 :]:
            _remove(old)
    except OSError as error:
        raise cannot_write(target, error) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint after checking that every file is as it was written.

    Args:
        path: folder of the checkpoint.

    Raises:
        UserError: not a checkpoint, or a file of it is missing, cut off or changed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    step, files, state, digest = _read_state(path)
    tensors = {}
    for name, expected in files.items():
        file = path / name
        size = file.stat().st_size if file.is_file() else 0
        if size != expected["bytes"]:
            raise UserError(
                f"the checkpoint {path} is damaged: {name} has {size} of {expected['bytes']} bytes; use an older one."
            )
        try:
            if _digest(file) != expected["sha256"]:
                raise UserError(
                    f"the checkpoint {path} is damaged: the content of {name} has changed; use an older one."
                )
            tensors[file.stem] = load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"the checkpoint {path}: {name} cannot be read ({error}); use an older one.") from None
    return Checkpoint(step, tensors, state, path, digest)


def _read_state(path: Path) -> tuple[int, dict[str, Any], dict[str, Any], str]:
    """Step, files, state and digest; nothing in the file is believed before it is looked at."""
    try:
        text = (path / STATE).read_bytes()
        content = json.loads(text)
        seal = content.pop(SEAL, None)
        version, step, files, state = (content[key] for key in ("format", "step", "files", "state"))
        if version != FORMAT:
            raise UserError(f"the checkpoint {path} has format {version!r}; this fastmkd reads format {FORMAT}.")
        whole = seal in (None, _seal(content)) and type(step) is int and step >= 0 and isinstance(state, dict)
        for name, expected in files.items():  # files of this folder alone
            whole &= Path(name).name == name and name.endswith(".safetensors")
            whole &= type(expected["bytes"]) is int and isinstance(expected["sha256"], str)
        if not whole:
            raise ValueError
    except UserError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is not a checkpoint: it has no {STATE}; name a folder like step_00000123.") from None
    except OSError as error:
        raise UserError(f"the checkpoint {path} cannot be read ({error}); use an older one.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"the checkpoint {path} is damaged: {STATE} is cut off or changed; use an older one.") from None
    return step, files, state, hashlib.sha256(text).hexdigest()


def state_digest(path: str | Path) -> str | None:
    """Returns what tells a checkpoint from all others, None if it cannot be read.

    Args:
        path: folder of the checkpoint.

    Returns:
        SHA-256 of ``state.json``, which holds those of all other files.
    """
    try:
        return _digest(Path(path) / STATE)
    except OSError:
        return None


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


def set_aside(folder: str | Path, newest: str | Path) -> list[Path]:
    """Renames the checkpoints that a run does not go on from, so that no later start takes one and no save removes one.

    Args:
        folder: of all checkpoints of a run.
        newest: the one that it goes on from. Newer ones are damaged or of a branch that has been left; of another
            folder's checkpoint all are.

    Returns:
        The new names, such as ``aside_00000123``.

    Raises:
        UserError: the folder may not be written to.
    """
    folder, moved = Path(folder), []
    steps = _steps(folder)
    known = [path.resolve() for path in steps]
    newest = Path(newest).resolve()
    for path in steps[: known.index(newest)] if newest in known else steps:
        target = folder / f"{ASIDE}{_number(path):08d}"
        for count in itertools.count(2):
            if not target.exists():
                break
            target = folder / f"{ASIDE}{_number(path):08d}.{count}"
        try:
            path.rename(target)
            _flush(folder)
        except OSError as error:
            raise cannot_write(target, error) from None
        moved.append(target)
    return moved


def _steps(folder: Path) -> list[Path]:
    """Folders of complete checkpoints, newest first; one whose place was being taken comes behind its successor."""
    found = [path for path in folder.glob("*step_*") if STEP.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_number(path), not path.name.endswith(OLD)), reverse=True)


def _number(path: Path) -> int:
    """The update in the name of a checkpoint's folder."""
    match = STEP.fullmatch(path.name)
    assert match is not None
    return int(match[1] or match[2])


def _tidy(folder: Path) -> None:
    """Ends what a killed process began: puts back what it was replacing, removes what it was writing or removing."""
    for old in list(folder.glob(f".step_*{OLD}")):
        target = folder / old.name[1 : -len(OLD)]
        if not target.exists():
            old.rename(target)
    for left in list(folder.glob(".step_*")):
        shutil.rmtree(left)


def _hidden(path: Path) -> Path:
    return path.parent / f".{path.name.lstrip('.')}.{uuid.uuid4().hex[:8]}{PART}"


def _remove(folder: Path) -> None:
    """Removes a checkpoint so that no half of it is ever seen."""
    part = _hidden(folder)
    folder.rename(part)
    shutil.rmtree(part)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Copies, because safetensors refuses tensors that share memory (tied weights).
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    try:
        path.touch()
        mode = stat.S_IMODE(path.stat().st_mode)
        save_file(plain, path, metadata=dict(metadata or {"format": "pt"}))
        path.chmod(mode)  # safetensors may leave files that nobody else can read
    except SafetensorError as error:
        number = re.search(r"(?:os error|Os \{ code:) (\d+)", str(error))  # the second up to safetensors 0.5
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from None


def _seal(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()  # the text that the file's own makes again


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
