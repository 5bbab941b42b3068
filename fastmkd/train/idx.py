"""IDX, the file format of MNIST and its relatives: a magic number, the sizes, then the bytes.

Layout (big endian): two zero bytes, a type code (0x08 = unsigned byte), the number of dimensions, one uint32 per
dimension, then the values in row-major order. Source: the description on the MNIST page (LeCun, Cortes, Burges, 1998).
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor

from .errors import UserError

__all__ = ["read_idx"]

UNSIGNED_BYTE = 0x08


def read_idx(path: str | Path, num_dims: int, max_bytes: int = 2**30) -> Tensor:
    """Reads an IDX file of unsigned bytes, gzipped if its name ends in ``.gz``.

    The header is not believed: the declared size must be below `max_bytes` before anything of that size is read, and
    the data must be exactly that long, so neither a lying header nor a compressed bomb can fill the memory.

    Args:
        path: the file.
        num_dims: expected number of dimensions, 3 for pictures and 1 for labels.
        max_bytes: largest number of values to accept.

    Returns:
        uint8 tensor of the declared shape.

    Raises:
        UserError: not such a file, truncated, longer than it says, or too large.

    Example:
        >>> import tempfile, os
        >>> path = os.path.join(tempfile.mkdtemp(), "labels")
        >>> _ = open(path, "wb").write(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))
        >>> read_idx(path, num_dims=1)
        tensor([7, 8, 9], dtype=torch.uint8)
    """
    path = Path(path)
    try:
        with cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb") as file:
            return _read(file, path, num_dims, max_bytes)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged ({error}); get the file again.") from None


def _read(file: BinaryIO, path: Path, num_dims: int, max_bytes: int) -> Tensor:
    header = file.read(4 + 4 * num_dims)
    if len(header) < 4 + 4 * num_dims or header[:2] != b"\0\0":
        raise UserError(f"{path} is not an IDX file, or is cut off in its header; get the file again.")
    if header[2] != UNSIGNED_BYTE or header[3] != num_dims:
        raise UserError(
            f"{path} holds type {header[2]:#04x} with {header[3]} dimensions; "
            f"expected unsigned bytes (0x08) with {num_dims}. Are pictures and labels mixed up?"
        )
    shape = [int.from_bytes(header[4 + 4 * i : 8 + 4 * i], "big") for i in range(num_dims)]
    size = math.prod(shape)
    if not 0 < size <= max_bytes:
        raise UserError(f"{path} says it holds {'x'.join(map(str, shape))} values; expected 1 to {max_bytes}.")
    data = bytearray(file.read(size))
    if len(data) < size:
        raise UserError(f"{path} is cut off: {len(data)} of {size} values are there; get the file again.")
    if file.read(1):
        raise UserError(f"{path} goes on after the {size} values that its header declares; get the file again.")
    return torch.frombuffer(data, dtype=torch.uint8).view(shape)
