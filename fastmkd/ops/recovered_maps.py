"""What the recovered loss and its gradient share: rows as positions of a map, checks, samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MapInputs", "check_like", "check_maps", "map_samples", "normalised_positions", "rows_of"]

MapInputs = Callable[[], tuple[Tensor, Tensor, Tensor]]


def normalised_positions(rows: Tensor, teacher: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Both sides as positions of the teacher's map, each normalised over its channels without an affine part.

    Args:
        rows: ``(B, gh * gw, p * p * C)``, for each cell its positions row by row, their channels side by side.
        teacher: ``(B, C, gh * p, gw * p)``.
        patch: p.

    Returns:
        Student and teacher, ``(B, H * W, C)`` each, in at least float32.

    Example:
        >>> rows, teacher = torch.arange(8.0).view(1, 1, 8), torch.zeros(1, 2, 2, 2)
        >>> normalised_positions(rows, teacher, 2)[0][0, :2].round()
        tensor([[-1.,  1.],
                [-1.,  1.]])
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    batch, channels, height, width = teacher.shape
    cells = rows.to(wide).view(batch, height // patch, width // patch, patch, patch, channels)
    student = cells.transpose(2, 3).reshape(batch, -1, channels)  # (B, gh, gw, p, p, C) -> (B, gh, p, gw, p, C)
    return F.layer_norm(student, (channels,)), F.layer_norm(teacher.to(wide).flatten(2).mT, (channels,))


def rows_of(positions: Tensor, width: int, patch: int) -> Tensor:
    """``(B, H * W, C) -> (B, gh * gw, p * p * C)``, the way back.

    Args:
        positions: ``(B, H * W, C)``.
        width: W.
        patch: p.

    Example:
        >>> rows_of(torch.arange(8.0).view(1, 8, 1), width=4, patch=2)
        tensor([[[0., 1., 4., 5.],
                 [2., 3., 6., 7.]]])
    """
    batch, count, channels = positions.shape
    cells = positions.view(batch, count // width // patch, patch, width // patch, patch, channels)
    return cells.transpose(2, 3).reshape(batch, -1, patch * patch * channels)


def check_maps(rows: Tensor, teacher: Tensor, queries: Tensor, patch: int) -> None:
    """Checks what the loss and its gradient share; raises a sentence."""
    for name, tensor, dims, layout in (
        ("rows", rows, 3, "(B, gh * gw, p * p * C)"),
        ("teacher", teacher, 4, "(B, C, H, W)"),
    ):
        if tensor.dim() != dims or min(tensor.shape) < 1:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {layout}, none of them 0.")
    if not rows.is_floating_point():
        raise TypeError(f"rows has dtype {rows.dtype}; expected a floating-point dtype.")
    wide = torch.promote_types(rows.dtype, torch.float32)
    if teacher.dtype not in (rows.dtype, wide):
        expected = " or ".join(str(d) for d in dict.fromkeys((rows.dtype, wide)))
        raise TypeError(f"teacher has dtype {teacher.dtype}; expected {expected}.")
    batch, channels, height, width = teacher.shape
    if patch < 1 or height % patch or width % patch:
        raise ValueError(f"patch is {patch}; expected a divisor of the teacher's {height} x {width} positions.")
    expected_rows = (batch, height // patch * (width // patch), patch * patch * channels)
    if tuple(rows.shape) != expected_rows:
        raise ValueError(
            f"rows has shape {tuple(rows.shape)}; expected {expected_rows} for {patch} x {patch} positions a cell of "
            f"teacher maps {tuple(teacher.shape)}."
        )
    check_like(rows, [("queries", queries, (2, channels))])
    for name, tensor in (("rows", rows), ("teacher", teacher)):
        if tensor.device != rows.device:
            raise ValueError(f"{name} is on {tensor.device} but rows is on {rows.device}; move one of them.")
    if not rows.is_contiguous():
        raise ValueError(f"rows has strides {rows.stride()}; expected a contiguous tensor, call .contiguous().")
    if not (teacher.is_contiguous() or teacher.is_contiguous(memory_format=torch.channels_last)):
        raise ValueError(
            f"teacher has strides {teacher.stride()}; expected a contiguous or channels-last map, call .contiguous()."
        )


def check_like(rows: Tensor, others: Iterable[tuple[str, Tensor, tuple[int, ...]]]) -> None:
    """Checks the small arguments: shape, the wide dtype of `rows`, its device, contiguous."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    for name, tensor, shape in others:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}.")
        if tensor.dtype != wide:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected {wide}.")
        if tensor.device != rows.device:
            raise ValueError(f"{name} is on {tensor.device} but rows is on {rows.device}; move one of them.")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; expected a contiguous tensor, call .contiguous().")


def map_samples(device: str, dtype: torch.dtype) -> list[tuple[str, MapInputs, int, bool]]:
    """What the samples of the loss and of its gradient are made of.

    Args:
        device: of the tensors.
        dtype: of the rows.

    Returns:
        For each sample its name, a function that makes rows, teacher and queries, the patch size, and whether it is
        small enough for a gradient check.
    """
    wide = torch.promote_types(dtype, torch.float32)

    def make(
        batch: int,
        channels: int,
        grid: tuple[int, int],
        patch: int,
        teacher_dtype: torch.dtype = dtype,
        channels_last: bool = False,
        sharp: float = 1.0,
        mean: float = 0.5,
    ) -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(batch * 31 + channels * 7 + patch)
        draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
        rows = draw(batch, grid[0] * grid[1], patch * patch * channels) + mean
        teacher = draw(batch, channels, grid[0] * patch, grid[1] * patch) * 2 - mean
        queries = draw(2, channels) * sharp * channels**-0.5
        layout = torch.channels_last if channels_last else torch.contiguous_format
        taught = teacher.to(device, torch.promote_types(teacher_dtype, dtype)).contiguous(memory_format=layout)
        return rows.to(device, dtype), taught, queries.to(device, wide)

    def huge() -> tuple[Tensor, Tensor, Tensor]:
        # 2.2e9 elements a side: offsets need 64 bits
        rows = torch.randn(520, 256, 16 * 1024, device=device, dtype=dtype)
        teacher = torch.randn(520, 1024, 64, 64, device=device, dtype=dtype)
        return rows, teacher, torch.randn(2, 1024, device=device, dtype=wide) / 32

    return [
        ("small", lambda: make(2, 8, (2, 3), 2), 2, True),
        ("one_position", lambda: make(3, 5, (1, 1), 1), 1, True),
        ("one_channel", lambda: make(2, 1, (2, 2), 2), 2, False),
        ("odd_channels", lambda: make(1, 37, (2, 3), 3), 3, True),
        ("channels_last", lambda: make(2, 24, (3, 2), 4, channels_last=True), 4, True),
        ("teacher_in_float32", lambda: make(2, 40, (4, 5), 2, torch.float32), 2, False),
        # Weights a thousand times each other. With larger logits the rounding of a logit decides every way's error.
        ("sharp_attention", lambda: make(2, 64, (9, 3), 2, sharp=2.0), 2, False),
        ("far_from_zero", lambda: make(2, 100, (5, 5), 1, mean=30.0), 1, False),
        ("many_channels", lambda: make(1, 2048, (4, 4), 1), 1, False),
        ("retinanet_p4", lambda: make(4, 256, (16, 16), 2), 2, False),
        ("retinanet_p3_channels_last", lambda: make(2, 256, (16, 16), 4, channels_last=True), 4, False),
        ("huge", huge, 4, False),
    ]
