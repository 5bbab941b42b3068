r"""Softmax attention within each image of a packed batch, whose images may have different numbers of tokens.

.. math:: O_{b,h} = \mathrm{softmax}(s \, Q_{b,h} K_{b,h}^T) \, V_{b,h}

``qkv (T, 3, H, d)`` is the output of a ViT's qkv projection, viewed: the tokens of all images, one image after the
other. Image b has the rows ``starts[b] : starts[b + 1]``; its queries, keys and values ``(L_b, d)`` of head h are
``qkv[rows, 0, h]``, ``qkv[rows, 1, h]`` and ``qkv[rows, 2, h]``. The result is ``(T, H, d)``, what the output
projection reads, and neither padding nor a copy of queries, keys or values is ever made.

The reference and the gradient read ``starts`` on the host: on a GPU a backward pass waits for the device, and so does a
forward pass without the Triton kernel. The gradient takes images of one length together, others one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import native, triton
from .autocast import no_autocast
from .registry import Backend, BadInput, Cost, Sample, declare

__all__ = ["packed_attention"]

SCHEMA = "packed_attention(Tensor qkv, Tensor starts, float scale) -> Tensor"
FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST_HEAD = 256  # channels; a program of the GPU holds the heads of its queries and keys whole


def packed_attention(qkv: Tensor, starts: Tensor, scale: float | None = None) -> Tensor:
    """Attends within each image of a packed batch.

    Args:
        qkv: ``(T, 3, H, d)`` contiguous queries, keys and values of all tokens; float32, bfloat16, float16 or float64.
        starts: ``(B + 1,)`` int32, contiguous: image b has the rows ``starts[b] : starts[b + 1]``. From 0 to T, never
            descending; equal neighbours are an image without tokens.
        scale: factor on ``q . k``; None means ``d ** -0.5``.

    Returns:
        ``(T, H, d)`` in the dtype of `qkv`, summed in float32 (float64 for float64). Its backward pass reads `starts`
        on the host, for which a GPU is waited for.

    Raises:
        ValueError: shapes that do not fit, or offsets that do not cover the rows (on a GPU an asynchronous assert).
        TypeError: wrong dtypes.

    Example:
        >>> qkv = torch.arange(6.0).view(2, 3, 1, 1)  # two images of one token: each attends to itself
        >>> packed_attention(qkv, torch.tensor([0, 1, 2], dtype=torch.int32)).flatten()
        tensor([2., 5.])
    """
    if scale is None:
        scale = qkv.shape[-1] ** -0.5
    return _entry(qkv, starts, float(scale))


def reference(qkv: Tensor, starts: Tensor, scale: float) -> Tensor:
    out = fake(qkv, starts, scale)
    for rows in _images(starts):
        q, k, v = qkv[rows].permute(1, 2, 0, 3)  # (H, L, d) each
        out[rows] = ((q @ k.mT * scale).softmax(-1) @ v).transpose(0, 1)
    return out


def _on_gpu(qkv: Tensor, starts: Tensor, scale: float) -> Tensor:
    run = triton.launcher("packed_attention") if qkv.shape[-1] <= WIDEST_HEAD else reference
    return run(qkv, starts, scale)


def _images(starts: Tensor) -> list[slice]:
    bounds = starts.tolist()
    return [slice(*pair) for pair in pairwise(bounds)]


def check(qkv: Tensor, starts: Tensor, scale: float) -> None:
    if not qkv.dtype.is_floating_point:
        raise TypeError(f"qkv has dtype {qkv.dtype}; expected a floating-point dtype.")
    if starts.dtype != torch.int32:
        raise TypeError(f"starts has dtype {starts.dtype}; expected torch.int32.")
    if starts.device != qkv.device:
        raise ValueError(f"starts is on {starts.device} but qkv is on {qkv.device}; move them to one device.")
    if qkv.dim() != 4 or qkv.shape[1] != 3 or 0 in qkv.shape[2:]:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}; expected (T, 3, H, d), the output (T, 3 * H * d) of a qkv projection "
            "viewed with at least one head and channel."
        )
    if starts.dim() != 1 or starts.shape[0] == 0:
        raise ValueError(f"starts has shape {tuple(starts.shape)}; expected (B + 1,), an offset per image and the end.")
    for name, tensor in (("qkv", qkv), ("starts", starts)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; expected a contiguous tensor, call .contiguous().")


def check_values(qkv: Tensor, starts: Tensor, scale: float) -> Iterator[tuple[Tensor, str]]:
    tokens = qkv.shape[0]
    covers = (starts[0] == 0) & (starts[-1] == tokens) & (starts[1:] >= starts[:-1]).all()
    yield covers, f"starts does not go from 0 to {tokens}, the tokens of qkv, without ever descending."


def fake(qkv: Tensor, starts: Tensor, scale: float) -> Tensor:
    return qkv.new_empty((qkv.shape[0], *qkv.shape[2:]))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, starts, ctx.scale = inputs
    ctx.save_for_backward(qkv, starts)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _gradient(*ctx.saved_tensors, grad, ctx.scale), None, None


# An operator of its own, since it reads `starts` on the host, which a traced backward cannot.
@torch.library.custom_op(
    "fastmkd::packed_attention_gradient",
    mutates_args=(),
    schema="(Tensor qkv, Tensor starts, Tensor grad, float scale) -> Tensor",
)
def _gradient(qkv: Tensor, starts: Tensor, grad: Tensor, scale: float) -> Tensor:
    images = _images(starts)
    out = torch.empty_like(qkv)
    with no_autocast(qkv.device):
        if len(qkv) and len({rows.stop - rows.start for rows in images}) == 1:
            out[:] = _image_gradients(qkv, grad, len(images), scale)
        else:
            for rows in images:
                out[rows] = _image_gradients(qkv[rows], grad[rows], 1, scale)
    return out


_gradient.register_fake(lambda qkv, starts, grad, scale: torch.empty_like(qkv))


def _image_gradients(qkv: Tensor, grad: Tensor, images: int, scale: float) -> Tensor:
    """Gradient in qkv ``(B * L, 3, H, d)`` for images of one length, from weights that are computed again."""
    wide = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = qkv.to(wide).unflatten(0, (images, -1)).permute(2, 0, 3, 1, 4)  # (B, H, L, d) each
    g = grad.to(wide).unflatten(0, (images, -1)).transpose(1, 2)
    probs = (q @ k.mT * scale).softmax(-1)
    d_probs = g @ v.mT
    # Softmax: dz = p * (g - <p, g>)
    d_scores = probs * (d_probs - (probs * d_probs).sum(-1, keepdim=True)) * scale
    parts = torch.stack((d_scores @ k, d_scores.mT @ q, probs.mT @ g))  # (3, B, H, L, d)
    return parts.permute(1, 3, 0, 2, 4).flatten(0, 1).to(qkv.dtype)


def samples(device: str, dtype: torch.dtype) -> list[Sample]:
    make = partial(_draw, device, dtype)

    def huge() -> tuple[Any, ...]:
        length, images = 1024, 700  # 2^31 elements of qkv: offsets need 64 bits
        qkv = torch.randn(images * length, 3, 16, 64, device=device, dtype=dtype)
        return qkv, torch.arange(images + 1, device=device, dtype=torch.int32) * length, 0.125

    return [
        Sample("deit_tiny_like", lambda: make([50, 50], 3, 64), grad=(0,)),
        Sample("ragged", lambda: make([17, 1, 30, 33, 2], 2, 32), grad=(0,)),
        Sample("length_one", lambda: make([1, 1, 1], 2, 8), grad=(0,)),
        Sample("empty_images", lambda: make([0, 5, 0, 0, 3, 0], 2, 16), grad=(0,)),
        Sample("no_token", lambda: make([0, 0], 2, 16), grad=(0,)),
        Sample("odd_head_dim", lambda: make([13, 40], 5, 23)),
        Sample("head_of_72", lambda: make([31, 66], 2, 72)),
        Sample("head_of_160", lambda: make([20, 33], 2, 160)),
        Sample("wider_than_a_program", lambda: make([9, 14], 1, WIDEST_HEAD + 8)),
        Sample("one_image", lambda: make([577], 2, 64)),
        Sample("many_images", lambda: make([5 + i % 7 for i in range(70)], 1, 32)),
        Sample("sharp_softmax", lambda: make([40, 21], 2, 32, spread=8.0)),
        Sample("deit_small_half_kept", lambda: make([99] * 8, 6, 64)),
        Sample("huge", huge, huge=True),
    ]


def tile_sample(device: str, dtype: torch.dtype) -> Sample:
    return Sample("tiles", lambda: _draw(device, dtype, [197, 130, 1, 66], 3, 64))


def _draw(
    device: str, dtype: torch.dtype, lengths: list[int], heads: int, dim: int, spread: float = 1.0
) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(sum(lengths) * 31 + dim)
    qkv = torch.randn(sum(lengths), 3, heads, dim, generator=g, dtype=torch.float64) * spread
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return qkv.to(device=device, dtype=dtype), starts.to(device, torch.int32), dim**-0.5


def bad_inputs() -> list[BadInput]:
    qkv = torch.zeros(6, 3, 2, 4)
    starts = torch.tensor([0, 2, 6], dtype=torch.int32)
    offsets = lambda *values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    return [
        BadInput("integer", (qkv.long(), starts, 1.0), TypeError, "qkv has dtype"),
        BadInput("int64_starts", (qkv, starts.long(), 1.0), TypeError, "starts has dtype"),
        BadInput("batched", (qkv[None], starts, 1.0), ValueError, "qkv has shape"),
        BadInput("two_of_three", (qkv[:, :2].contiguous(), starts, 1.0), ValueError, "qkv has shape"),
        BadInput("no_head", (qkv[:, :, :0], starts, 1.0), ValueError, "qkv has shape"),
        BadInput("strided", (qkv.transpose(2, 3).contiguous().transpose(2, 3), starts, 1.0), ValueError, "qkv has str"),
        BadInput("no_offset", (qkv, starts[:0], 1.0), ValueError, "starts has shape"),
        BadInput("offset_matrix", (qkv, starts[None], 1.0), ValueError, "starts has shape"),
        BadInput("strided_starts", (qkv, offsets(0, 9, 2, 9, 6, 9)[::2], 1.0), ValueError, "starts has strides"),
        BadInput("meta_device", (qkv, starts.to("meta"), 1.0), ValueError, "starts is on meta"),
        BadInput("descending", (qkv, offsets(0, 4, 2, 6), 1.0), ValueError, "starts does not go from 0 to 6"),
        BadInput("late_start", (qkv, offsets(1, 6), 1.0), ValueError, "starts does not go from 0 to 6"),
        BadInput("early_end", (qkv, offsets(0, 5), 1.0), ValueError, "starts does not go from 0 to 6"),
        BadInput("late_end", (qkv, offsets(0, 7), 1.0), ValueError, "starts does not go from 0 to 6"),
    ]


def cost(qkv: Tensor, starts: Tensor, scale: float) -> Cost:
    _, _, heads, dim = qkv.shape
    pairs = float((starts.diff().double() ** 2).sum())  # of query and key
    return Cost(flops=4 * pairs * heads * dim, bytes=float(qkv.numel() * 4 // 3 * qkv.element_size()))


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
        Backend("cpp", native.entry("packed_attention"), "cpu", FAST_DTYPES, native.missing_cpu),
        Backend("triton", _on_gpu, "cuda", FAST_DTYPES, triton.missing, tiles=triton.tiles("packed_attention")),
    ],
)
