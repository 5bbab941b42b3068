"""The folder of a run: whose it is, who works in it now, and what came out.

Files: ``recipe.json`` (what the run is), ``lock``, ``checkpoints/``, ``metrics.csv``, ``tensorboard/``, ``panels/``,
``model.safetensors`` (the student, with timm's keys), ``heads.safetensors`` (what a method that pre-trains or has
pictures trained beside the student), ``bad_batch_0.safetensors`` (what made the loss NaN) and ``result.json`` (written
last).
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import weakref
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .checkpoint import atomic_write, remove_parts
from .errors import UserError, cannot_write
from .recipe import SPLIT, differences, with_defaults

__all__ = ["RunDir"]

# A process that reads pictures lives on for some seconds after the one that started it was killed. It must not keep
# that one's folder from being taken again, so it lets go of the lock at once.
_held: weakref.WeakSet[IO[str]] = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [file.close() for file in _held])

# What ``recipe.json`` holds at least: types of values by key.
DESCRIPTION: dict[str, Any] = {
    "identity": {},
    "recipe": {"name": str, "data": {}, "student": {}, "augment": {}, "method": {}, "seed": int},
    "student": {"name": str, "kwargs": {}},
    "data": {"name": str, "classes": [str], "channels": int, "image_size": int, "mean": [float], "std": [float]},
}


def _misfit(value: Any, wanted: Any, name: str = "") -> str:
    """Says which part of a JSON value is missing or of another type than wanted, "" if none is."""
    if isinstance(wanted, dict):
        if not isinstance(value, dict):
            return f"{name} is no mapping"
        inside = f"{name}." if name else ""
        found = (
            f"{inside}{key} is missing" if key not in value else _misfit(value[key], part, inside + key)
            for key, part in wanted.items()
        )
        return next(filter(None, found), "")
    if isinstance(wanted, list):
        right = isinstance(value, list) and not any(_misfit(part, wanted[0], name) for part in value)
        return "" if right else f"{name} is no list of {wanted[0].__name__}"
    right = isinstance(value, (int, float) if wanted is float else wanted) and not isinstance(value, bool)
    return "" if right else f"{name} is no {wanted.__name__}"


@dataclass
class RunDir:
    """Names in the folder of a run, and the rules about it.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def weights(self) -> Path:
        """The trained student."""
        return self.path / "model.safetensors"

    @property
    def heads(self) -> Path:
        """What a method that pre-trains or has pictures has trained beside the student."""
        return self.path / "heads.safetensors"

    @property
    def panels(self) -> Path:
        """Folder of what the method showed at several epochs."""
        return self.path / "panels"

    @property
    def metrics(self) -> Path:
        """Table of all logged numbers."""
        return self.path / "metrics.csv"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard files."""
        return self.path / "tensorboard"

    def lock(self) -> IO[str]:
        """Takes the folder for this process until the returned file is closed or the process ends, however it ends.

        What a killed process was writing is removed.

        Raises:
            UserError: another process is training in it (its host and number are named), its file system knows no
                locks, or it cannot be written to.
        """
        path = self.path / "lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except OSError as error:
            raise cannot_write(path, error) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
            remove_parts(self.path)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200) or "another process"
            file.close()
            raise UserError(f"{holder} trains in {self.path}; wait for it or choose another run.dir.") from None
        except OSError as error:
            file.close()
            raise cannot_write(path, error) from None
        _held.add(file)
        return file

    def claim(self, identity: dict[str, Any], description: dict[str, Any]) -> None:
        """Makes the folder that of a recipe, or checks that it already is.

        A run that has not finished may split its updates otherwise than before: into more batches, or over another
        number of processes. That its updates have as many images as before is checked where its checkpoint is taken up.

        Args:
            identity: what the run is, see `fastmkd.train.recipe.identity`.
            description: what ``recipe.json`` also keeps, for export and show.

        Raises:
            UserError: the folder belongs to another recipe; the differing keys are named.
        """
        if self.description() is None:
            self._describe(identity, description)
        else:
            self.check(identity)

    def check(self, identity: dict[str, Any], unknown: Collection[str] = ()) -> None:
        """Refuses the folder of another recipe, as `claim` does; one that is nobody's passes.

        Args:
            identity: as for `claim`.
            unknown: keys of it that are not known yet, such as the weights of a teacher that is still to be trained.

        Raises:
            UserError: the folder belongs to another recipe; the differing keys are named.
        """
        stored = self.description()
        if stored is None:
            return
        known = stored["identity"]
        if identity.keys() - known.keys():
            known = with_defaults(known, identity, stored["recipe"])
        if self.result() is None:
            known = {**known, **{key: identity[key] for key in SPLIT if key in known and key in identity}}
        changed = differences(*({k: v for k, v in keys.items() if k not in unknown} for keys in (known, identity)))
        if changed:
            raise UserError(
                f"{self.path} belongs to a run of another recipe: {changed}. "
                "Choose another run.dir or name, or remove that folder."
            )

    def restate(self, identity: dict[str, Any], description: dict[str, Any]) -> str:
        """Rewrites ``recipe.json`` if the run goes on with updates that are split otherwise.

        Args:
            identity: as for `claim`, which has let it pass.
            description: as for `claim`.

        Returns:
            What has changed, '' if nothing has.
        """
        stored = self.description()
        assert stored is not None
        known = stored["identity"]
        keys = [key for key in SPLIT if key in known and key in identity]
        changed = differences({key: known[key] for key in keys}, {key: identity[key] for key in keys})
        if changed:
            self._describe(identity, description)
        return changed

    def _describe(self, identity: dict[str, Any], description: dict[str, Any]) -> None:
        content = json.dumps({"identity": identity, **description}, indent=1, default=str)
        atomic_write(self.path / "recipe.json", lambda part: part.write_text(content))

    def description(self) -> dict[str, Any] | None:
        """Returns the content of ``recipe.json``, None if there is none.

        Raises:
            UserError: it is damaged.
        """
        content = self._read_json("recipe.json")
        if content is not None and (wrong := _misfit(content, DESCRIPTION)):
            raise UserError(
                f"{self.path / 'recipe.json'} is damaged: {wrong}; remove the folder {self.path} or choose another "
                "run.dir."
            )
        return content

    def result(self) -> dict[str, Any] | None:
        """Returns what came out of the run, None if it has not finished."""
        return self._read_json("result.json") if self.weights.is_file() else None

    def content(self) -> str:
        """Returns what tells this folder from another on one process, to be compared with what others see in it."""
        return repr((self.description(), self.result()))

    def result_as_seen(self, content: str) -> dict[str, Any] | None:
        """Returns what came out of the run, None if it has not finished, if this process sees the folder of another.

        Args:
            content: of the folder that the other process sees under this name.

        Raises:
            UserError: it is not the same.
        """
        if self.content() != content:
            raise UserError(
                f"{self.path} is not the folder that process 0 sees: run.dir must be a folder that all processes see, "
                "on a file system that all their computers share."
            )
        return self.result()

    def finish(self, result: dict[str, Any]) -> None:
        """Marks the run as finished.

        Args:
            result: JSON-able numbers and names.
        """
        content = json.dumps(result, indent=1)
        atomic_write(self.path / "result.json", lambda part: part.write_text(content))

    def _read_json(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text())
        except (ValueError, RecursionError):
            raise UserError(f"{path} is damaged; remove the folder {self.path} or choose another run.dir.") from None
        if not isinstance(content, dict):
            raise UserError(f"{path} is damaged; remove the folder {self.path} or choose another run.dir.")
        return content
