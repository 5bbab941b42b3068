"""Pictures in tar files as webdataset lays them out: ``000017.jpg`` beside ``000017.cls``, many samples a file.

The headers are read once, when the set is opened; a picture is then read from its place in its file. So a set of shards
is a collection like any other: which process and which worker reads what, and how a run goes on in the middle of an
epoch, is decided by `fastmkd.train.loading.epoch_plan`. Nothing is unpacked, and no link or path of an archive is
followed.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import NamedTuple, Self

import torch

from .errors import UserError, shorten
from .pictures import SUFFIXES, StoredPictures

__all__ = ["SHARDS", "ShardPictures", "open_shards"]

SHARDS = (
    "expected root/train/*.tar and root/val/*.tar, or root/*.tar, holding pairs such as 000017.jpg and 000017.cls (the "
    "number of its class); names of classes, one a line, may stand in root/classes.txt"
)
LONGEST_LABEL = 20  # characters of a .cls file
MOST_CLASSES = 10**6  # a list of names is made for as many classes as the largest number says
MOST_BYTES = 2**30  # of a picture, which is read as a whole
LONGEST_HEADER = 2**14  # bytes of a long name or of PAX records, of which tarfile may keep copies for each of them


class Place(NamedTuple):
    """Where the bytes of a picture lie.

    Attributes:
        shard: the tar file.
        offset: of the first byte.
        size: bytes.
        name: of the picture in its shard.
        label: its class.
    """

    shard: Path
    offset: int
    size: int
    name: str
    label: int

    def __str__(self) -> str:
        return f"{self.shard}: {self.name}"


class ShardPictures(StoredPictures[Place]):
    """Pictures in tar files."""

    def file(self, stored: Place) -> io.BytesIO:
        """Returns the bytes of a picture.

        Args:
            stored: where they lie.
        """
        with stored.shard.open("rb") as file:
            file.seek(stored.offset)
            return io.BytesIO(file.read(stored.size))


def open_shards(folder: Path) -> tuple[ShardPictures, list[str]]:
    """Reads what the tar files of a folder hold, in sorted order.

    Args:
        folder: with ``*.tar``.

    Returns:
        The pictures, and a sentence for each shard of which something was left out.

    Raises:
        UserError: no tar file, or none with a picture and its class.
    """
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        hints = [
            f" {path.name} is compressed, so nothing in it can be reached by its place: unpack it."
            for path in sorted(folder.iterdir())
            if path.name.endswith(".tgz") or ".tar." in path.name
        ]
        raise UserError(f"{folder} has no *.tar; {SHARDS}.{''.join(hints[:1])}")
    places: list[Place] = []
    notes: list[str] = []
    for path in shards:
        found, left_out = _read_shard(path)
        places += found
        if left_out:
            notes.append(f"{path}: {len(left_out)} left out: {shorten(left_out)}")
    if not places:
        raise UserError(f"no picture with a class is in {folder}. {' '.join(notes)} {SHARDS}.")
    return ShardPictures(places, torch.tensor([place.label for place in places])), notes


class _Header(tarfile.TarInfo):
    """Refuses what `tarfile` reads wrongly, with an error that it does not take for the end of the archive."""

    def _block(self, count: int) -> int:
        # A negative size sends tarfile back to headers it has read, over and over (CVE-2025-8194).
        if count < 0:
            raise tarfile.ReadError(f"{self.name} says it has {count} bytes")
        if self.type in EXTENSIONS and count > LONGEST_HEADER:
            raise tarfile.ReadError(f"a header says it goes on for {count} bytes")
        return super()._block(count)  # type: ignore[misc]

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Reads a header; one that is damaged does not end the archive in silence.

        Args:
            buf: 512 bytes.
            encoding: of names.
            errors: what to do with a name that is in another encoding.

        Raises:
            tarfile.ReadError: it is damaged.
        """
        try:
            return super().frombuf(buf, encoding, errors)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from None


EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
              tarfile.SOLARIS_XHDTYPE)  # fmt: skip


def _read_shard(path: Path) -> tuple[list[Place], list[str]]:
    """What a shard holds in the order of its pictures, and what was left out of it with the reason."""
    pictures: dict[str, tuple[int, int, str]] = {}
    labels: dict[str, int] = {}
    left_out: list[str] = []
    end = path.stat().st_size
    try:
        # A name in no known encoding must be one that can be printed.
        with tarfile.open(path, "r:", tarinfo=_Header, errors="backslashreplace") as archive:
            for member in archive:
                archive.members.clear()  # type: ignore[attr-defined]  # it keeps all it has seen
                key, _, suffix = _split(member.name)
                if f".{suffix}" not in SUFFIXES and suffix != "cls":
                    continue  # other things may lie beside a picture
                if not member.isreg() or member.issparse():
                    left_out.append(f"{member.name} (no ordinary file)")
                elif not 0 <= member.size <= MOST_BYTES:
                    left_out.append(f"{member.name} (says it has {member.size} bytes)")
                elif member.offset_data + member.size > end:
                    left_out.append(f"{member.name} (cut off)")
                elif suffix != "cls":
                    pictures.setdefault(key, (member.offset_data, member.size, member.name))
                else:
                    label = _label(archive, member)
                    if label is None:
                        left_out.append(f"{member.name} (no number of a class from 0 to {MOST_CLASSES - 1})")
                    else:
                        labels.setdefault(key, label)
    except Exception as error:  # tarfile raises its own, value, index, recursion errors for one archive or another
        left_out.append(f"what follows (the archive is damaged: {error})")
    places = [Place(path, *place, labels[key]) for key, place in pictures.items() if key in labels]
    left_out += [f"{name} (no class beside it)" for key, (_, _, name) in pictures.items() if key not in labels]
    return places, left_out


def _split(name: str) -> tuple[str, str, str]:
    """``a/b.c.JPG`` -> ``a/b``, ``.``, ``c.jpg``: webdataset's key ends at the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    key, dot, suffix = file.partition(".")
    return folder + slash + key, dot, suffix.lower()


def _label(archive: tarfile.TarFile, member: tarfile.TarInfo) -> int | None:
    """The number of a class that a member says; None if it says something else."""
    content = archive.extractfile(member)
    text = content.read(LONGEST_LABEL).strip() if content is not None and member.size <= LONGEST_LABEL else b""
    return int(text) if text.isdigit() and int(text) < MOST_CLASSES else None
