r"""Patch embedding of the kept patches only: gather, project, add position, in one op.

.. math:: Y_{b,j} = W \, \mathrm{patch}(X_b, \mathrm{keep}_{b,j}) + \mathrm{bias} + \mathrm{pos}_{\mathrm{keep}_{b,j}}

``X (B, C, H, W)``, ``keep (B, k)`` and ``Y (B, k, D)``. A ViT's first layer is a convolution with kernel ``(ph, pw)``
and a stride; here only the patches named in `keep` are read from the picture. The stride may be smaller than the patch
(AST, whose patches overlap).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native, triton
from .autocast import autocast_dtype
from .registry import Backend, BadInput, Cost, Sample, declare
from .row_numbers import check_patch_numbers

__all__ = ["patch_embed", "patch_grid", "patch_rows"]

SCHEMA = (
    "patch_embed(Tensor images, Tensor weight, Tensor? bias, Tensor? pos, Tensor keep, "
    "int stride_h, int stride_w) -> Tensor"
)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor | None,
    keep: Tensor,
    stride: tuple[int, int] | None = None,
) -> Tensor:
    """Embeds the kept patches of each image and adds their positions.

    Under autocast, `images`, `weight` and `bias` are cast as a convolution's inputs would be; `pos` keeps its dtype, as
    in ``x + pos_embed``.

    Args:
        images: ``(B, C, H, W)`` pixels.
        weight: ``(D, C, ph, pw)``, the convolution's weight.
        bias: ``(D,)`` or None.
        pos: ``(N, D)`` position embedding of every patch or None; the dtype of `images` or float32.
        keep: ``(B, k)`` int64 indices of patches, row-major over the grid, any order, no repeats in a row.
        stride: ``(sh, sw)`` between patches; None means the patch size.

    Returns:
        ``(B, k, D)`` in the dtype of `images`, promoted with that of `pos`.

    Raises:
        ValueError: shapes that do not fit, or an index out of range or repeated (on a GPU an asynchronous assert).
        TypeError: dtypes that do not fit.

    Example:
        >>> images, weight = torch.arange(16.0).view(1, 1, 4, 4), torch.ones(1, 1, 2, 2)
        >>> patch_embed(images, weight, None, None, torch.tensor([[0, 3]]))
        tensor([[[10.],
                 [50.]]])
    """
    dtype = autocast_dtype(images.device)
    if images.dtype != torch.float64 and dtype is not None:
        images, weight = images.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    sh, sw = (weight.shape[2], weight.shape[3]) if stride is None else stride
    bias, pos = (None if tensor is None else tensor.contiguous() for tensor in (bias, pos))
    return _entry(images.contiguous(), weight.contiguous(), bias, pos, keep.contiguous(), sh, sw)


def reference(
    images: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor | None, keep: Tensor, stride_h: int, stride_w: int
) -> Tensor:
    rows = patch_rows(images, keep, (weight.shape[2], weight.shape[3]), (stride_h, stride_w))
    out = F.linear(rows, weight.flatten(1), bias)  # (B, k, C*ph*pw) -> (B, k, D)
    return out if pos is None else out + pos[keep]


def patch_grid(images: Tensor, patch: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int]:
    """Returns ``(gh, gw)``, how many patches fit into the images; what is left over at the border is not seen.

    Args:
        images: ``(B, C, H, W)``.
        patch: ``(ph, pw)``.
        stride: ``(sh, sw)``.

    Example:
        >>> patch_grid(torch.empty(1, 1, 128, 512), (16, 16), (10, 10))
        (12, 50)
    """
    return (images.shape[2] - patch[0]) // stride[0] + 1, (images.shape[3] - patch[1]) // stride[1] + 1


def patch_rows(images: Tensor, keep: Tensor, patch: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Gathers the pixels of the kept patches.

    Args:
        images: ``(B, C, H, W)``.
        keep: ``(B, k)`` int64 patch indices.
        patch: ``(ph, pw)``.
        stride: ``(sh, sw)``.

    Returns:
        ``(B, k, C * ph * pw)``, channel first within a patch, as in a flattened convolution weight.

    Example:
        >>> patch_rows(torch.arange(16.0).view(1, 1, 4, 4), torch.tensor([[3]]), (2, 2), (2, 2))
        tensor([[[10., 11., 14., 15.]]])
    """
    down, right = _within(images.shape, stride)
    windows = images.unfold(2, patch[0], down).unfold(3, patch[1], right)  # (B, C, gh, gw, ph, pw), a view
    batch = torch.arange(images.shape[0], device=images.device)[:, None]
    row, column = keep // windows.shape[3], keep % windows.shape[3]
    return windows[batch, :, row, column].flatten(2)  # (B, k, C, ph, pw) -> (B, k, C*ph*pw)


def _within(shape: torch.Size, stride: tuple[int, ...]) -> tuple[int, int]:
    """A stride as long as the image leaves one patch, as all longer ones do; PyTorch overflows in those."""
    return min(stride[0], shape[2]), min(stride[1], shape[3])


def check(
    images: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor | None, keep: Tensor, stride_h: int, stride_w: int
) -> None:
    if images.dim() != 4:
        raise ValueError(f"images has shape {tuple(images.shape)}; expected (B, C, H, W).")
    if not images.is_floating_point():
        raise TypeError(f"images has dtype {images.dtype}; expected a floating-point dtype, scale the pixels first.")
    if weight.dim() != 4 or weight.shape[1] != images.shape[1] or min(weight.shape) < 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (D, {images.shape[1]}, ph, pw), none 0.")
    dim, _, ph, pw = weight.shape
    if min(stride_h, stride_w) < 1:
        raise ValueError(f"stride is ({stride_h}, {stride_w}); expected two positive numbers.")
    if images.shape[2] < ph or images.shape[3] < pw:
        raise ValueError(f"images have shape {tuple(images.shape)}, smaller than one {ph} x {pw} patch.")
    for name, tensor, dtypes in (
        ("weight", weight, (images.dtype,)),
        ("bias", bias, (images.dtype,)),
        ("pos", pos, (images.dtype, torch.float32)),
        ("keep", keep, (torch.int64,)),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            expected = " or ".join(str(d) for d in dict.fromkeys(dtypes))
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected {expected}.")
        if tensor.device != images.device:
            raise ValueError(f"{name} is on {tensor.device}, images on {images.device}; move them to one device.")
    gh, gw = patch_grid(images, (ph, pw), (stride_h, stride_w))
    if bias is not None and tuple(bias.shape) != (dim,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({dim},), one value per embedding channel.")
    if pos is not None and tuple(pos.shape) != (gh * gw, dim):
        raise ValueError(
            f"pos has shape {tuple(pos.shape)}; expected ({gh * gw}, {dim}), a row per patch of the {gh} x {gw} grid."
        )
    if keep.dim() != 2 or keep.shape[0] != images.shape[0]:
        raise ValueError(f"keep has shape {tuple(keep.shape)}; expected ({images.shape[0]}, k), a row per image.")
    if not 1 <= keep.shape[1] <= gh * gw:
        raise ValueError(f"keep names {keep.shape[1]} patches an image; expected 1 to {gh * gw}, the size of the grid.")
    named = (("images", images), ("weight", weight), ("bias", bias), ("pos", pos), ("keep", keep))
    for name, tensor in named:
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; expected a contiguous tensor, call .contiguous().")


def check_values(
    images: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor | None, keep: Tensor, stride_h: int, stride_w: int
) -> Iterator[tuple[Tensor, str]]:
    gh, gw = patch_grid(images, (weight.shape[2], weight.shape[3]), (stride_h, stride_w))
    yield from check_patch_numbers("keep", keep, gh * gw)


def fake(
    images: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor | None, keep: Tensor, stride_h: int, stride_w: int
) -> Tensor:
    dtype = images.dtype if pos is None else torch.promote_types(images.dtype, pos.dtype)
    return images.new_empty((keep.shape[0], keep.shape[1], weight.shape[0]), dtype=dtype)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, weight, bias, pos, keep, *ctx.stride = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.pos_like = None if pos is None else (pos.shape[0], pos.dtype)
    ctx.save_for_backward(images, weight, keep)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    images, weight, keep = ctx.saved_tensors
    need_images, need_weight, need_bias, need_pos, *_ = ctx.needs_input_grad
    patch, dim = (weight.shape[2], weight.shape[3]), weight.shape[0]
    g = grad.to(images.dtype)  # (B, k, D)
    d_images = d_weight = d_bias = d_pos = None
    if need_images:
        d_images = _scatter_rows(g @ weight.flatten(1), keep, images.shape, patch, tuple(ctx.stride))
    if need_weight:
        rows = patch_rows(images, keep, patch, tuple(ctx.stride))
        d_weight = (g.flatten(0, 1).mT @ rows.flatten(0, 1)).view_as(weight)  # (D, B*k) @ (B*k, C*ph*pw)
    if need_bias:
        d_bias = grad.sum((0, 1), dtype=torch.promote_types(grad.dtype, torch.float32)).to(ctx.bias_dtype)
    if need_pos:
        n, dtype = ctx.pos_like
        # No index repeats within an image: a plain scatter has no collisions, the sum over the batch a fixed order.
        spread = grad.new_zeros(grad.shape[0], n, dim).scatter(1, keep[..., None].expand(-1, -1, dim), grad)
        d_pos = spread.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(dtype)
    return d_images, d_weight, d_bias, d_pos, None, None, None


def _scatter_rows(
    rows: Tensor, keep: Tensor, shape: torch.Size, patch: tuple[int, int], stride: tuple[int, ...]
) -> Tensor:
    """Adds ``(B, k, C*ph*pw)`` patch pixels back into a ``(B, C, H, W)`` picture; where patches overlap they add up."""
    stride = _within(shape, stride)
    gh, gw = (shape[2] - patch[0]) // stride[0] + 1, (shape[3] - patch[1]) // stride[1] + 1
    spread = rows.new_zeros(shape[0], gh * gw, rows.shape[2])
    spread = spread.scatter(1, keep[..., None].expand_as(rows), rows)  # (B, k, C*ph*pw) -> (B, N, C*ph*pw)
    covered = ((gh - 1) * stride[0] + patch[0], (gw - 1) * stride[1] + patch[1])
    picture = F.fold(spread.mT, covered, patch, stride=stride)
    return F.pad(picture, (0, shape[3] - covered[1], 0, shape[2] - covered[0]))


def samples(device: str, dtype: torch.dtype) -> list[Sample]:
    make = partial(_draw, device, dtype)
    same = dtype
    all_grads = (0, 1, 2, 3)
    return [
        Sample("deit_tiny_half", lambda: make(2, 3, (64, 64), (16, 16), 192, 8, pos=same)),
        Sample("small", lambda: make(2, 3, (8, 8), (4, 4), 6, 2, pos=same), grad=all_grads),
        Sample("no_bias_no_pos", lambda: make(2, 1, (8, 8), (2, 2), 5, 7, bias=False), grad=(0, 1)),
        Sample("one_patch", lambda: make(3, 3, (4, 4), (4, 4), 8, 1, pos=same), grad=all_grads),
        Sample("keep_all", lambda: make(2, 2, (6, 9), (3, 3), 7, 6, pos=same), grad=all_grads),
        Sample("rectangular_patch", lambda: make(1, 3, (12, 8), (3, 4), 24, 5, pos=same)),
        Sample("overlapping", lambda: make(2, 1, (13, 21), (4, 4), 10, 9, stride=(3, 2), pos=same), grad=all_grads),
        Sample(
            "stride_beyond_the_image", lambda: make(2, 1, (5, 6), (4, 4), 8, 1, stride=(2**63 - 1, 9)), grad=(0, 1, 2)
        ),
        Sample("single_pixel_patch", lambda: make(2, 1, (8, 8), (1, 1), 48, 32, pos=same)),
        Sample("patch14_odd_dim", lambda: make(2, 3, (42, 42), (14, 14), 130, 5)),
        Sample("pos_in_float32", lambda: make(2, 3, (32, 32), (8, 8), 40, 9, pos=torch.float32)),
        Sample("deit_small_half", lambda: make(4, 3, (224, 224), (16, 16), 384, 98, pos=same)),
        Sample("huge", lambda: _huge(device, dtype), huge=True),
    ]


def tile_sample(device: str, dtype: torch.dtype) -> Sample:
    return Sample("tiles", lambda: _draw(device, dtype, 3, 3, (112, 112), (16, 16), 200, 45, pos=dtype))


def _draw(
    device: str,
    dtype: torch.dtype,
    batch: int,
    channels: int,
    size: tuple[int, int],
    patch: tuple[int, int],
    dim: int,
    k: int,
    stride: tuple[int, int] | None = None,
    bias: bool = True,
    pos: torch.dtype | None = None,
) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(size[0] * 101 + dim)
    stride = stride or patch
    n = ((size[0] - patch[0]) // stride[0] + 1) * ((size[1] - patch[1]) // stride[1] + 1)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(device=device, dtype=dtype)  # noqa: E731
    weight = draw(dim, channels, *patch) * (channels * patch[0] * patch[1]) ** -0.5
    keep = torch.rand(batch, n, generator=g).argsort(1)[:, :k].contiguous().to(device)
    positions = None if pos is None else draw(n, dim).to(torch.promote_types(pos, dtype))
    return draw(batch, channels, *size), weight, draw(dim) if bias else None, positions, keep, *stride


def _huge(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    images = torch.randn(15_000, 3, 224, 224, device=device, dtype=dtype)  # 2.26e9 pixels: offsets need 64 bits
    weight = torch.randn(8, 3, 16, 16, device=device, dtype=dtype) * 768**-0.5
    keep = torch.rand(15_000, 196, device=device).argsort(1)[:, :49].contiguous()
    return images, weight, None, None, keep, 16, 16


def bad_inputs() -> list[BadInput]:
    x, w, b, p = torch.zeros(2, 3, 8, 8), torch.zeros(5, 3, 4, 4), torch.zeros(5), torch.zeros(4, 5)
    keep = torch.tensor([[0, 3], [1, 2]])
    return [
        BadInput("three_dims", (x[0], w, b, p, keep, 4, 4), ValueError, "images has shape"),
        BadInput("byte_images", (x.byte(), w, b, p, keep, 4, 4), TypeError, "images has dtype"),
        BadInput("channels", (x[:, :1].contiguous(), w, b, p, keep, 4, 4), ValueError, "weight has shape"),
        BadInput("half_weight", (x, w.half(), b, p, keep, 4, 4), TypeError, "weight has dtype"),
        BadInput("int32_keep", (x, w, b, p, keep.int(), 4, 4), TypeError, "keep has dtype"),
        BadInput("bias_length", (x, w, torch.zeros(4), p, keep, 4, 4), ValueError, "bias has shape"),
        BadInput("pos_rows", (x, w, b, torch.zeros(5, 5), keep, 4, 4), ValueError, "pos has shape"),
        BadInput("keep_batch", (x, w, b, p, keep[:1], 4, 4), ValueError, "keep has shape"),
        BadInput("keep_none", (x, w, b, p, keep[:, :0], 4, 4), ValueError, "keep names 0"),
        BadInput("keep_too_many", (x, w, b, p, torch.zeros(2, 5).long(), 4, 4), ValueError, "keep names 5"),
        BadInput("keep_too_large", (x, w, b, p, torch.tensor([[0, 4], [1, 2]]), 4, 4), ValueError, "keep holds"),
        BadInput("keep_negative", (x, w, b, p, torch.tensor([[0, -1], [1, 2]]), 4, 4), ValueError, "keep holds"),
        BadInput("keep_repeated", (x, w, b, p, torch.tensor([[3, 3], [1, 2]]), 4, 4), ValueError, "twice"),
        BadInput("stride_zero", (x, w, b, p, keep, 0, 4), ValueError, "stride"),
        BadInput("image_below_patch", (x[:, :, :3].contiguous(), w, b, p, keep, 4, 4), ValueError, "smaller than one"),
        BadInput("strided_images", (x.mT, w, b, p, keep, 4, 4), ValueError, "images has strides"),
    ]


def cost(
    images: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor | None, keep: Tensor, stride_h: int, stride_w: int
) -> Cost:
    dim, width = weight.shape[0], weight[0].numel()
    size = images.element_size()
    moved = keep.numel() * (width + dim) * size + weight.numel() * size + keep.numel() * 8
    if pos is not None:
        moved += pos.numel() * pos.element_size()
    return Cost(flops=2.0 * keep.numel() * width * dim, bytes=float(moved))


_entry = declare(
    SCHEMA,
    reference=reference,
    check=check,
    check_values=check_values,
    fake=fake,
    backward=backward,
    setup_context=setup_context,
    samples=samples,
    tile_sample=tile_sample,
    bad_inputs=bad_inputs,
    cost=cost,
    backends=[
        Backend("cpp", native.entry("patch_embed"), "cpu", (*GPU_DTYPES, torch.float64), native.missing_cpu),
        Backend(
            "triton",
            triton.launcher("patch_embed"),
            "cuda",
            GPU_DTYPES,
            triton.missing,
            tiles=triton.tiles("patch_embed"),
        ),
    ],
)
