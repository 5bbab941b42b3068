r"""CLS saliency: how much the CLS token attends to each patch (MaskedKD, Eq. 2).

.. math:: S_i = \sum_h \mathrm{softmax}_i(s \, q_h \cdot k_{h,i})

``q (B, H, d)`` is the CLS query, ``k (B, H, P + N, d)`` the keys of the same attention layer, prefix tokens first, and
``S`` is ``(B, N)``. Only the CLS row of the attention is ever computed, never the ``(P + N, P + N)`` matrix.

Eq. 2 takes the softmax over the N patch keys and sums over heads. With ``include_prefix`` the softmax runs over all
``P + N`` keys and the heads are averaged, as the authors' code does; the two may rank patches differently.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import native, triton
from .registry import Backend, BadInput, Cost, Sample, declare

__all__ = ["cls_saliency"]

SCHEMA = "cls_saliency(Tensor q, Tensor k, int num_prefix_tokens, float scale, bool include_prefix) -> Tensor"
LOW = (torch.float32, torch.bfloat16, torch.float16)


def cls_saliency(
    q: Tensor,
    k: Tensor,
    num_prefix_tokens: int = 1,
    scale: float | None = None,
    include_prefix: bool = False,
) -> Tensor:
    """Returns the saliency of every patch from the CLS query and the keys of one attention layer (MaskedKD, Eq. 2).

    Args:
        q: ``(B, H, d)`` query of the CLS token; float32, bfloat16, float16 or float64.
        k: ``(B, H, P + N, d)`` keys, prefix tokens first; may be a strided view whose last dimension is contiguous.
        num_prefix_tokens: P, the number of tokens before the patches; at least 1.
        scale: factor on ``q . k``; None means ``d ** -0.5``.
        include_prefix: softmax over prefix keys too and mean over heads, as the authors' code does.

    Returns:
        ``(B, N)`` saliency in float32 whatever the input dtype (float64 for float64).

    Raises:
        ValueError: shapes that do not fit together, or `num_prefix_tokens` out of range.
        TypeError: dtypes that differ or are not floating point.

    Example:
        >>> q, k = torch.zeros(1, 2, 4), torch.zeros(1, 2, 5, 4)
        >>> cls_saliency(q, k)
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return _entry(q, k, num_prefix_tokens, float(scale), include_prefix)


def reference(q: Tensor, k: Tensor, num_prefix_tokens: int, scale: float, include_prefix: bool) -> Tensor:
    probs = _probs(q, k, num_prefix_tokens, scale, include_prefix)
    return probs.mean(1) if include_prefix else probs.sum(1)


def _probs(q: Tensor, k: Tensor, num_prefix_tokens: int, scale: float, include_prefix: bool) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k if include_prefix else k[:, :, num_prefix_tokens:]
    logits = torch.einsum("bhd,bhnd->bhn", q.to(wide), keys.to(wide)) * scale
    probs = logits.softmax(-1)
    return probs[:, :, num_prefix_tokens:] if include_prefix else probs  # (B, H, N)


def check(q: Tensor, k: Tensor, num_prefix_tokens: int, scale: float, include_prefix: bool) -> None:
    if not q.dtype.is_floating_point:
        raise TypeError(f"q has dtype {q.dtype}; expected a floating-point dtype.")
    if k.dtype != q.dtype:
        raise TypeError(f"k has dtype {k.dtype} but q has {q.dtype}; cast one to the other.")
    if k.device != q.device:
        raise ValueError(f"k is on {k.device} but q is on {q.device}; move them to one device.")
    if q.dim() != 3 or min(q.shape[1:]) < 1:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected (B, H, d), the query of the CLS token alone.")
    if k.dim() != 4 or (k.shape[0], k.shape[1], k.shape[3]) != tuple(q.shape):
        raise ValueError(f"k has shape {tuple(k.shape)}; expected (B, H, P + N, d) with B, H, d of q {tuple(q.shape)}.")
    if not 1 <= num_prefix_tokens < k.shape[2]:
        raise ValueError(
            f"num_prefix_tokens is {num_prefix_tokens}; expected 1 to {k.shape[2] - 1}, since k holds {k.shape[2]} "
            "tokens and the saliency needs a CLS token and at least one patch."
        )
    for name, tensor in (("q", q), ("k", k)):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} has strides {tensor.stride()}; its last dimension must be contiguous.")


def fake(q: Tensor, k: Tensor, num_prefix_tokens: int, scale: float, include_prefix: bool) -> Tensor:
    return q.new_empty((k.shape[0], k.shape[2] - num_prefix_tokens), dtype=torch.promote_types(q.dtype, torch.float32))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, ctx.num_prefix_tokens, ctx.scale, ctx.include_prefix = inputs
    ctx.save_for_backward(q, k)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k = ctx.saved_tensors
    prefix, heads = ctx.num_prefix_tokens, q.shape[1]
    wide = grad.dtype
    first = 0 if ctx.include_prefix else prefix
    keys = k[:, :, first:].to(wide)
    probs = (torch.einsum("bhd,bhnd->bhn", q.to(wide), keys) * ctx.scale).softmax(-1)
    g = grad[:, None].expand(-1, heads, -1)  # (B, N) -> (B, H, N)
    if ctx.include_prefix:
        g = torch.nn.functional.pad(g / heads, (prefix, 0))
    # Softmax: dz = p * (g - <p, g>)
    dz = probs * (g - (probs * g).sum(-1, keepdim=True)) * ctx.scale
    dq = torch.einsum("bhn,bhnd->bhd", dz, keys).to(q.dtype)
    dk = dz[..., None] * q[:, :, None].to(wide)
    return dq, torch.nn.functional.pad(dk, (0, 0, first, 0)).to(k.dtype), None, None, None


def samples(device: str, dtype: torch.dtype) -> list[Sample]:
    def make(
        batch: int,
        heads: int,
        patches: int,
        dim: int,
        prefix: int = 1,
        include_prefix: bool = False,
        spread: float = 1.0,
    ) -> tuple[Any, ...]:
        g = torch.Generator().manual_seed(batch * 7919 + patches)
        qkv = torch.randn(batch, prefix + patches, 3, heads, dim, generator=g, dtype=torch.float64) * spread
        q, k, _ = qkv.to(device=device, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)  # views, as in timm's attention
        return q[:, :, 0], k, prefix, dim**-0.5, include_prefix

    def huge() -> tuple[Any, ...]:
        q = torch.randn(4, 16, 128, device=device, dtype=dtype)
        k = torch.randn(4, 16, 1 << 18, 128, device=device, dtype=dtype)  # 2^31 elements: offsets need 64 bits
        return q, k, 1, 128**-0.5, False

    return [
        Sample("deit_tiny_like", lambda: make(2, 3, 49, 64), grad=(0, 1)),
        Sample("include_prefix", lambda: make(2, 3, 49, 64, include_prefix=True), grad=(0, 1)),
        Sample("registers", lambda: make(2, 2, 17, 32, prefix=5), grad=(0, 1)),
        Sample("registers_include_prefix", lambda: make(2, 2, 17, 32, prefix=5, include_prefix=True)),
        Sample("one_patch", lambda: make(3, 2, 1, 16), grad=(0, 1)),
        Sample("odd_head_dim", lambda: make(1, 5, 31, 24)),
        Sample("batch_one_wide", lambda: make(1, 2, 577, 72)),
        Sample("sharp_softmax", lambda: make(2, 2, 40, 32, spread=8.0)),
        Sample("deit_small_batch", lambda: make(8, 6, 196, 64)),
        Sample("huge", huge, huge=True),
    ]


def bad_inputs() -> list[BadInput]:
    q, k = torch.zeros(2, 3, 8), torch.zeros(2, 3, 5, 8)
    return [
        BadInput("integer", (q.long(), k.long(), 1, 1.0, False), TypeError, "q has dtype"),
        BadInput("mixed_dtypes", (q, k.half(), 1, 1.0, False), TypeError, "k has dtype"),
        BadInput("q_of_all_tokens", (k, k, 1, 1.0, False), ValueError, "q has shape"),
        BadInput("head_dim", (q, torch.zeros(2, 3, 5, 7), 1, 1.0, False), ValueError, "k has shape"),
        BadInput("no_prefix", (q, k, 0, 1.0, False), ValueError, "num_prefix_tokens is 0"),
        BadInput("no_patch", (q, k, 5, 1.0, False), ValueError, "num_prefix_tokens is 5"),
        BadInput("strided_dim", (q, torch.zeros(2, 3, 8, 5).mT, 1, 1.0, False), ValueError, "k has strides"),
        BadInput("meta_device", (q, k.to("meta"), 1, 1.0, False), ValueError, "k is on meta"),
    ]


def cost(q: Tensor, k: Tensor, num_prefix_tokens: int, scale: float, include_prefix: bool) -> Cost:
    out = k.shape[0] * (k.shape[2] - num_prefix_tokens) * 4
    return Cost(flops=2.0 * k.numel(), bytes=float((q.numel() + k.numel()) * q.element_size() + out))


_entry = declare(
    SCHEMA,
    reference=reference,
    check=check,
    fake=fake,
    backward=backward,
    setup_context=setup_context,
    samples=samples,
    bad_inputs=bad_inputs,
    cost=cost,
    backends=[
        Backend("cpp", native.entry("cls_saliency"), "cpu", LOW, native.missing_cpu),
        Backend("triton", triton.launcher("cls_saliency"), "cuda", LOW, triton.missing),
    ],
)
