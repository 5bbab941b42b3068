"""Collections of pictures with classes: a tensor in memory, and files on a disk some of which may be broken."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from .errors import UserError

__all__ = ["FilePictures", "Pictures", "StoredPictures", "TensorPictures", "as_rgb", "find_classes", "open_picture"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
Stored = TypeVar("Stored")
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # whatever the name ends in; others can run programs (EPS)


def open_picture(file: Path | BytesIO) -> Any:
    """Opens a picture as a PIL image, of which no pixel has been read yet.

    Args:
        file: its path, or its content.

    Raises:
        OSError: no file (a pipe would never end), or none of the formats of photographs.
        ValueError: more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``, 89 millions: a small file can say it has as many.
    """
    from PIL import Image

    if isinstance(file, Path) and not file.is_file():
        raise OSError("it is not a file")
    picture = Image.open(file, formats=FORMATS)
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and picture.width * picture.height > most:
        picture.close()
        raise ValueError(f"it has {picture.width} x {picture.height} pixels; expected at most {most}")
    return picture


def as_rgb(picture: Any) -> Any:
    """Converts a PIL image to 8-bit RGB; of 16 bits of grey the upper eight are taken.

    Args:
        picture: of any mode.

    Raises:
        ValueError: its grey is in numbers of 32 bits, of which nobody says which is white.

    Example:
        >>> from PIL import Image
        >>> as_rgb(Image.new("I;16", (1, 1), 0x80FF)).getpixel((0, 0))
        (128, 128, 128)
    """
    from PIL import Image

    # Pillow itself clips these modes to 0 ... 255, which makes nearly all of such a picture white.
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        picture.load()  # raises for a file that is cut off
        grey = np.asarray(picture).astype(np.int32) >> 8
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise ValueError(
            "its grey is in numbers of 32 bits, of which nobody knows which is white; save it with 8 or 16"
        )
    return picture.convert("RGB")


class Pictures(Protocol):
    """Pictures with targets; `load` and `target` may raise for a broken one.

    Attributes:
        labels: ``(N,)`` int64 class of each; where pictures have none, something that tells kinds of pictures apart.
    """

    labels: Tensor

    def __len__(self) -> int:
        """How many."""
        ...

    def load(self, index: int) -> Any:
        """Picture `index` as a PIL image.

        Args:
            index: from 0.
        """
        ...

    def target(self, index: int) -> Any:
        """What is to be learnt about picture `index`: its class as an int, its boxes, its mask.

        Args:
            index: from 0.
        """
        ...

    def subset(self, index: Tensor) -> Pictures:
        """Returns the pictures `index`.

        Args:
            index: int64.
        """
        ...

    def where(self, index: int) -> str:
        """Names picture `index` for a message.

        Args:
            index: from 0.
        """
        ...


class TensorPictures:
    """A whole set as one tensor: a batch is an indexing, which no DataLoader beats on small pictures.

    Args:
        images: ``(N, C, H, W)`` uint8.
        labels: ``(N,)`` int64.

    Example:
        >>> len(TensorPictures(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)))
        3
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise TypeError(f"images are {images.dtype} of shape {tuple(images.shape)}; expected uint8 (N, C, H, W).")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels has shape {tuple(labels.shape)}; expected ({len(images)},), one per image.")
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Any:
        """Picture `index` as a PIL image.

        Args:
            index: from 0.
        """
        from torchvision.transforms.v2.functional import to_pil_image

        return to_pil_image(self.images[index])

    def target(self, index: int) -> int:
        """Class of picture `index`.

        Args:
            index: from 0.
        """
        return int(self.labels[index])

    def where(self, index: int) -> str:
        """Names picture `index` for a message.

        Args:
            index: from 0.
        """
        return f"picture {index}"

    def resized(self, size: int) -> TensorPictures:
        """Returns the set at another size (bilinear, antialiased).

        Args:
            size: side in pixels.
        """
        if self.images.shape[-2:] == (size, size):
            return self
        parts = [
            torch.nn.functional.interpolate(part.float(), (size, size), mode="bilinear", antialias=True)
            for part in self.images.split(4096)
        ]
        return TensorPictures(torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts]), self.labels)

    def subset(self, index: Tensor) -> TensorPictures:
        """Returns the pictures `index`.

        Args:
            index: int64.
        """
        return TensorPictures(self.images[index], self.labels[index])


class StoredPictures(abc.ABC, Generic[Stored]):
    """Pictures on a disk, read when they are needed and converted to RGB.

    Args:
        stored: where each lies; as a string it names the picture in a message.
        labels: ``(N,)`` int64.
    """

    def __init__(self, stored: Sequence[Stored], labels: Tensor) -> None:
        self.stored = list(stored)
        self.labels = labels

    def __len__(self) -> int:
        return len(self.stored)

    @abc.abstractmethod
    def file(self, stored: Stored) -> Path | BytesIO:
        """Returns what `open_picture` can open.

        Args:
            stored: where a picture lies.
        """

    def load(self, index: int) -> Any:
        """Picture `index` as an RGB PIL image.

        Args:
            index: from 0.
        """
        with open_picture(self.file(self.stored[index])) as picture:
            return as_rgb(picture)

    def target(self, index: int) -> int:
        """Class of picture `index`.

        Args:
            index: from 0.
        """
        return int(self.labels[index])

    def where(self, index: int) -> str:
        """Names picture `index` for a message.

        Args:
            index: from 0.
        """
        return str(self.stored[index])

    def subset(self, index: Tensor) -> Self:
        """Returns the pictures `index`.

        Args:
            index: int64.
        """
        return type(self)([self.stored[i] for i in index.tolist()], self.labels[index])


class FilePictures(StoredPictures[Path]):
    """Picture files."""

    def file(self, stored: Path) -> Path:
        """Returns the path itself.

        Args:
            stored: path of a picture.
        """
        return stored

    @classmethod
    def of_folder(cls, folder: Path, classes: Sequence[str]) -> Self:
        """Lists ``folder/class/**/picture`` in sorted order.

        Args:
            folder: with one folder per class.
            classes: folder names in the order of their labels.

        Raises:
            UserError: a class has no picture.
        """
        paths: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            found = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in SUFFIXES)
            if not found:
                raise UserError(f"{folder / name} holds no pictures ({', '.join(SUFFIXES)}); fill or remove it.")
            paths += found
            labels += [label] * len(found)
        return cls(paths, torch.tensor(labels))


def find_classes(folder: Path) -> list[str]:
    """Returns the names of the folders in `folder`, sorted; hidden ones are left out.

    Args:
        folder: with one folder per class.
    """
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
