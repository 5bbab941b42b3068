"""The recovered map against the teacher's: layer-normed squared error and attention-pooled contexts (MKD, Eq. 3 and 4).

With s and t the normalised features at a position (mean 0, variance 1 over the channels), over positions of an image

    error = sum |s - t|^2 / (2 n),  difference = sum s - t,  context = sum softmax(query . s) s,  and likewise of t

A program takes some tiles of BLOCK_P positions by all channels of one image and reads both maps once: a position of the
rows is contiguous, one of the teacher's map too if that is channels-last; otherwise neighbouring positions are. A
softmax is kept as its greatest logit so far, its denominator and its weighted sum. The second kernel, one program an
image, joins what the programs of the image have written, in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import AotCase, on_device

__all__ = ["AOT_CASES", "load_maps", "normalise", "recovered_loss", "tiling"]

TILE = 4096  # elements of a map that a program holds at once
MOST_POSITIONS = 64  # of a tile
FULL_GRID = 528  # four programs for each multiprocessor of a large GPU
MOST_TILES = 8  # of a program, so that what it writes is little
JOINED = 16  # programs whose sums the second kernel reads at once
EPS = tl.constexpr(1e-5)  # on the variance
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
NUMBERS = tl.constexpr(5)  # of a program: greatest logits and denominators of student and teacher, squares


@triton.jit
def load_maps(
    rows_ptr, teacher_ptr, image, position, count, width, PATCH: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """[BLOCK_P, BLOCK_C] of both maps in float32, 0 outside; also the places and the mask of the rows."""
    channel = tl.arange(0, BLOCK_C)
    inside = (position < count)[:, None] & (channel < CHANNELS)[None, :]
    y = position // width
    x = position % width
    cell = y // PATCH * (width // PATCH) + x // PATCH
    inner = y % PATCH * PATCH + x % PATCH
    start = image.to(tl.int64) * count * CHANNELS
    place = start + ((cell * (PATCH * PATCH) + inner) * CHANNELS)[:, None] + channel[None, :]
    student = tl.load(rows_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if CHANNELS_LAST:
        offset = (position * CHANNELS)[:, None] + channel[None, :]
    else:
        offset = position[:, None] + (channel * count)[None, :]
    teacher = tl.load(teacher_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
    return student, teacher, place, inside


@triton.jit
def normalise(x, inside, CHANNELS: tl.constexpr):
    """Normalised positions, 0 outside, and 1 / standard deviation."""
    mean = tl.sum(x, axis=1) / CHANNELS
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=1) / CHANNELS + EPS)
    return centred * rstd[:, None], rstd


@triton.jit
def _pool(x, query, valid, most, total, pooled):
    """One tile more in a softmax over positions."""
    logit = tl.where(valid, tl.sum(x * query[None, :], axis=1), -float("inf"))  # [BLOCK_P]
    greatest = tl.maximum(most, tl.max(logit, axis=0))
    weight = tl.exp(logit - greatest)
    rescale = tl.exp(most - greatest)
    return greatest, total * rescale + tl.sum(weight, axis=0), pooled * rescale + tl.sum(weight[:, None] * x, axis=0)


@triton.jit
def _parts_kernel(
    rows_ptr,  # (B, gh * gw, p, p, C)
    teacher_ptr,  # (B, C, H, W) or (B, H, W, C)
    queries_ptr,  # (2, C) fp32
    parts_ptr,  # (programs, 3, C) fp32, out
    numbers_ptr,  # (programs, NUMBERS) fp32, out
    count,  # H * W
    width,
    programs,  # of an image
    tiles,  # of a program
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    image = program // programs
    channel = tl.arange(0, BLOCK_C)
    query_s = tl.load(queries_ptr + channel, mask=channel < CHANNELS, other=0.0)
    query_t = tl.load(queries_ptr + CHANNELS + channel, mask=channel < CHANNELS, other=0.0)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    difference = tl.zeros((BLOCK_C,), tl.float32)
    context_s = tl.zeros((BLOCK_C,), tl.float32)
    context_t = tl.zeros((BLOCK_C,), tl.float32)
    most_s = -float("inf")
    most_t = -float("inf")
    sum_s = 0.0
    sum_t = 0.0
    for tile in range(tiles):
        position = (program % programs * tiles + tile) * BLOCK_P + tl.arange(0, BLOCK_P)
        student, teacher, _, inside = load_maps(
            rows_ptr, teacher_ptr, image, position, count, width, PATCH, CHANNELS, BLOCK_C, CHANNELS_LAST
        )
        s, _ = normalise(student, inside, CHANNELS)
        t, _ = normalise(teacher, inside, CHANNELS)
        apart = s - t
        squares += tl.sum(apart * apart, axis=0)
        difference += tl.sum(apart, axis=0)
        most_s, sum_s, context_s = _pool(s, query_s, position < count, most_s, sum_s, context_s)
        most_t, sum_t, context_t = _pool(t, query_t, position < count, most_t, sum_t, context_t)
    parts = parts_ptr + program.to(tl.int64) * (3 * CHANNELS) + channel
    tl.store(parts, difference, mask=channel < CHANNELS)
    tl.store(parts + CHANNELS, context_s, mask=channel < CHANNELS)
    tl.store(parts + 2 * CHANNELS, context_t, mask=channel < CHANNELS)
    numbers = numbers_ptr + program * NUMBERS
    tl.store(numbers, most_s)
    tl.store(numbers + 1, most_t)
    tl.store(numbers + 2, sum_s)
    tl.store(numbers + 3, sum_t)
    tl.store(numbers + 4, tl.sum(squares, axis=0))


@triton.jit
def _join_kernel(
    parts_ptr,  # (B * programs, 3, C) fp32
    numbers_ptr,  # (B * programs, NUMBERS) fp32
    errors_ptr,  # (B) fp32, out
    difference_ptr,  # (B, C) fp32, out
    contexts_ptr,  # (2, B, C) fp32, out
    log_sums_ptr,  # (2, B) fp32, out
    batch,
    programs,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    JOINED: tl.constexpr,
):
    image = tl.program_id(0)
    channel = tl.arange(0, BLOCK_C)
    inside = channel < CHANNELS
    squares = tl.zeros((JOINED,), tl.float32)
    difference = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, programs, JOINED):
        part = start + tl.arange(0, JOINED)
        row = (image * programs + part).to(tl.int64)
        squares += tl.load(numbers_ptr + row * NUMBERS + 4, mask=part < programs, other=0.0)
        mask = (part < programs)[:, None] & inside[None, :]
        place = (row * (3 * CHANNELS))[:, None] + channel[None, :]
        difference += tl.sum(tl.load(parts_ptr + place, mask=mask, other=0.0), axis=0)
    tl.store(errors_ptr + image, tl.sum(squares, axis=0))
    tl.store(difference_ptr + image.to(tl.int64) * CHANNELS + channel, difference, mask=inside)

    for side in tl.static_range(2):
        most = -float("inf")
        for start in range(0, programs, JOINED):
            part = start + tl.arange(0, JOINED)
            place = (image * programs + part) * NUMBERS + side
            most = tl.maximum(
                most, tl.max(tl.load(numbers_ptr + place, mask=part < programs, other=-float("inf")), axis=0)
            )
        total = tl.zeros((JOINED,), tl.float32)
        context = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(0, programs, JOINED):
            part = start + tl.arange(0, JOINED)
            row = (image * programs + part).to(tl.int64)
            own = tl.load(numbers_ptr + row * NUMBERS + side, mask=part < programs, other=-float("inf"))
            share = tl.exp(own - most)
            total += share * tl.load(numbers_ptr + row * NUMBERS + 2 + side, mask=part < programs, other=0.0)
            mask = (part < programs)[:, None] & inside[None, :]
            place = (row * (3 * CHANNELS) + (1 + side) * CHANNELS)[:, None] + channel[None, :]
            context += tl.sum(share[:, None] * tl.load(parts_ptr + place, mask=mask, other=0.0), axis=0)
        denominator = tl.sum(total, axis=0)
        out = side * batch + image
        tl.store(contexts_ptr + out.to(tl.int64) * CHANNELS + channel, context / denominator, mask=inside)
        tl.store(log_sums_ptr + out, most + tl.log(denominator))


def tiling(batch: int, count: int, channels: int) -> tuple[int, int, dict[str, int]]:
    """How the positions of a batch are split; a function of the shapes alone.

    Args:
        batch: images.
        count: positions of an image.
        channels: of a position.

    Returns:
        Programs of an image, tiles of a program, and the sides of a tile.

    Example:
        >>> tiling(16, 64 * 64, 256)
        (64, 4, {'BLOCK_P': 16, 'BLOCK_C': 256})
    """
    block_c = triton.next_power_of_2(channels)
    block_p = min(max(1, TILE // block_c), MOST_POSITIONS, triton.next_power_of_2(count))
    all_tiles = triton.cdiv(count, block_p)
    tiles = min(max(batch * all_tiles // FULL_GRID, 1), MOST_TILES)
    tiles = 1 << (tiles.bit_length() - 1)
    return triton.cdiv(all_tiles, tiles), tiles, {"BLOCK_P": block_p, "BLOCK_C": block_c}


def recovered_loss(rows: Tensor, teacher: Tensor, queries: Tensor, patch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches both kernels; arguments as in `fastmkd.ops.recovered_loss`.

    Args:
        rows: ``(B, gh * gw, p * p * C)`` float32, bfloat16 or float16, contiguous.
        teacher: ``(B, C, H, W)``, contiguous or channels-last.
        queries: ``(2, C)`` float32.
        patch: p.

    Returns:
        Error ``()``, difference ``(B, C)``, contexts ``(2, B, C)`` and log_sums ``(2, B)``, all float32.
    """
    batch, channels, height, width = teacher.shape
    programs, tiles, blocks = tiling(batch, height * width, channels)
    make = lambda *shape: torch.empty(shape, dtype=torch.float32, device=rows.device)  # noqa: E731
    parts, numbers = make(batch * programs, 3, channels), make(batch * programs, NUMBERS.value)
    errors, difference = make(batch), make(batch, channels)
    contexts, log_sums = make(2, batch, channels), make(2, batch)
    with on_device(rows):
        _parts_kernel[(batch * programs,)](
            rows,
            teacher,
            queries,
            parts,
            numbers,
            height * width,
            width,
            programs,
            tiles,
            PATCH=patch,
            CHANNELS=channels,
            CHANNELS_LAST=teacher.is_contiguous(memory_format=torch.channels_last),
            **blocks,
            **OPTIONS,
        )
        _join_kernel[(batch,)](
            parts,
            numbers,
            errors,
            difference,
            contexts,
            log_sums,
            batch,
            programs,
            CHANNELS=channels,
            BLOCK_C=blocks["BLOCK_C"],
            JOINED=JOINED,
            **OPTIONS,
        )
    return errors.sum() / (2 * rows.numel()), difference, contexts, log_sums


def _case(dtype: str, teacher: str, channels: int, patch: int, channels_last: bool) -> AotCase:
    blocks = tiling(16, 4096, channels)[2]
    return AotCase(
        f"recovered-{dtype}-{teacher}-c{channels}-p{patch}{'-last' if channels_last else ''}",
        _parts_kernel,
        signature={
            "rows_ptr": f"*{dtype}",
            "teacher_ptr": f"*{teacher}",
            **dict.fromkeys(("queries_ptr", "parts_ptr", "numbers_ptr"), "*fp32"),
            **dict.fromkeys(("count", "width", "programs", "tiles"), "i32"),
        },
        constexprs={"PATCH": patch, "CHANNELS": channels, "CHANNELS_LAST": channels_last, **blocks},
        aligned=("count", "width"),
        options=OPTIONS,
        # 16 bytes a load of the rows wherever the alignment allows them.
        requires=(r"LDG\.E\.128",) if channels % 16 == 0 else (),
    )


AOT_CASES = [
    *(_case(dtype, dtype, 256, 4, channels_last=True) for dtype in ("bf16", "fp16", "fp32")),
    _case("bf16", "bf16", 256, 4, channels_last=False),
    _case("bf16", "fp32", 256, 2, channels_last=False),
    _case("bf16", "bf16", 2048, 1, channels_last=False),
    _case("fp32", "fp32", 37, 1, channels_last=False),
    AotCase(
        "join-c256",
        _join_kernel,
        signature={
            **dict.fromkeys(
                ("parts_ptr", "numbers_ptr", "errors_ptr", "difference_ptr", "contexts_ptr", "log_sums_ptr"), "*fp32"
            ),
            **dict.fromkeys(("batch", "programs"), "i32"),
        },
        constexprs={"CHANNELS": 256, "BLOCK_C": 256, "JOINED": JOINED},
        options=OPTIONS,
    ),
]
