r"""Un-shuffling: kept tokens at their places, the mask token at all others, positions added (MAE, Section 3).

.. math::
    y_{bn} = p_n + \begin{cases} t_{bn} & n < P \\ t_{b,P+j} & n = P + \mathrm{keep}_{bj} \\ m & \text{else} \end{cases}

``tokens`` t is ``(B, P + k, D)``, P prefix tokens first; ``keep`` ``(B, k)`` names the patch of each of the others;
``mask_token`` m is ``(D,)``, ``positions`` p ``(P + N, D)`` and the result ``(B, P + N, D)``: what the decoder of a
masked autoencoder reads. Each token is read once and each place written once, where a concatenation with mask tokens, a
gather by the inverse permutation and an addition make three passes over the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import native, triton
from .registry import Backend, BadInput, Cost, Sample, declare
from .row_numbers import check_patch_numbers

__all__ = ["unshuffle_tokens"]

SCHEMA = "unshuffle_tokens(Tensor tokens, Tensor keep, Tensor mask_token, Tensor positions) -> Tensor"
LOW = (torch.float32, torch.bfloat16, torch.float16)


def unshuffle_tokens(tokens: Tensor, keep: Tensor, mask_token: Tensor, positions: Tensor) -> Tensor:
    """Puts the kept tokens back at their places among mask tokens and adds the positions. Differentiable.

    Args:
        tokens: ``(B, P + k, D)`` floating point, P >= 0 prefix tokens first.
        keep: ``(B, k)`` int64 patch indices of the other tokens, in any order, no repeats in a row.
        mask_token: ``(D,)``, stands at every patch that `keep` does not name.
        positions: ``(P + N, D)``, of the prefix tokens and of every patch.

    Returns:
        ``(B, P + N, D)`` in the promoted dtype of the three, as their sum would have: float32 positions keep float32.

    Raises:
        ValueError: shapes that do not fit, or an index out of range or repeated (on a GPU an asynchronous assert).
        TypeError: dtypes that do not fit.

    Example:
        >>> tokens, keep = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[2, 0]])
        >>> unshuffle_tokens(tokens, keep, torch.tensor([-1.0]), torch.tensor([[0.1], [0.2], [0.3]])).flatten()
        tensor([ 2.1000, -0.8000,  1.3000])
    """
    dtype = torch.promote_types(torch.promote_types(tokens.dtype, mask_token.dtype), positions.dtype)
    if dtype not in (tokens.dtype, torch.float32):
        tokens = tokens.to(dtype)
    mask_token, positions = mask_token.to(dtype), positions.to(dtype)
    return _entry(*(tensor.contiguous() for tensor in (tokens, keep, mask_token, positions)))


def reference(tokens: Tensor, keep: Tensor, mask_token: Tensor, positions: Tensor) -> Tensor:
    (batch, k), (places, width) = keep.shape, positions.shape
    prefix = tokens.shape[1] - k
    tokens = tokens.to(positions.dtype)
    patches = mask_token.expand(batch, places - prefix, width)
    patches = patches.scatter(1, keep[..., None].expand(-1, -1, width), tokens[:, prefix:])  # (B, k, D) -> (B, N, D)
    return torch.cat([tokens[:, :prefix], patches], 1) + positions


def check(tokens: Tensor, keep: Tensor, mask_token: Tensor, positions: Tensor) -> None:
    if tokens.dim() != 3 or tokens.shape[2] < 1:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}; expected (B, P + k, D), prefix tokens first.")
    if not tokens.is_floating_point():
        raise TypeError(f"tokens has dtype {tokens.dtype}; expected a floating-point dtype.")
    batch, rows, width = tokens.shape
    if keep.dim() != 2 or keep.shape[0] != batch or not 1 <= keep.shape[1] <= rows:
        raise ValueError(
            f"keep has shape {tuple(keep.shape)}; expected ({batch}, k), the patch of each token that is not a prefix "
            f"token, k from 1 to {rows}."
        )
    if tuple(mask_token.shape) != (width,):
        raise ValueError(f"mask_token has shape {tuple(mask_token.shape)}; expected ({width},), one token.")
    if positions.dim() != 2 or positions.shape[0] < rows or positions.shape[1] != width:
        raise ValueError(
            f"positions has shape {tuple(positions.shape)}; expected (P + N, {width}), the prefix tokens and every "
            f"patch, at least {rows} rows."
        )
    for name, tensor, dtypes in (
        ("keep", keep, (torch.int64,)),
        ("positions", positions, (tokens.dtype, torch.promote_types(tokens.dtype, torch.float32))),
        ("mask_token", mask_token, (positions.dtype,)),
    ):
        if tensor.dtype not in dtypes:
            expected = " or ".join(str(d) for d in dict.fromkeys(dtypes))
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected {expected}.")
        if tensor.device != tokens.device:
            raise ValueError(f"{name} is on {tensor.device} but tokens is on {tokens.device}; move one of them.")
    for name, tensor in (("tokens", tokens), ("keep", keep), ("mask_token", mask_token), ("positions", positions)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; expected a contiguous tensor, call .contiguous().")


def check_values(tokens: Tensor, keep: Tensor, mask_token: Tensor, positions: Tensor) -> Iterator[tuple[Tensor, str]]:
    yield from check_patch_numbers("keep", keep, positions.shape[0] - tokens.shape[1] + keep.shape[1])


def fake(tokens: Tensor, keep: Tensor, mask_token: Tensor, positions: Tensor) -> Tensor:
    return positions.new_empty((tokens.shape[0], *positions.shape))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, keep, *_ = inputs
    ctx.num_prefix, ctx.dtype = tokens.shape[1] - keep.shape[1], tokens.dtype
    ctx.save_for_backward(keep)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Each token takes its place's gradient, the mask token the sum over all places that it stood at."""
    (keep,) = ctx.saved_tensors
    need_tokens, _, need_mask_token, need_positions = ctx.needs_input_grad
    batch, places, width = grad.shape
    prefix = torch.arange(ctx.num_prefix, device=grad.device).expand(batch, -1)
    first = places * torch.arange(batch, device=grad.device)[:, None]
    taken = (first + torch.cat([prefix, keep + ctx.num_prefix], 1)).flatten()  # (B * (P + k),): each token's place
    rows = grad.flatten(0, 1)  # (B * (P + N), D)
    d_tokens = d_mask_token = None
    if need_tokens:
        d_tokens = rows.index_select(0, taken).view(batch, ctx.num_prefix + keep.shape[1], width).to(ctx.dtype)
    if need_mask_token:
        # As a product with ones and zeros the sum is one pass, wide even for half precision.
        wide = torch.promote_types(grad.dtype, torch.float32)
        stood = torch.ones(len(rows), dtype=wide, device=grad.device).index_fill(0, taken, 0)
        d_mask_token = (stood @ rows.to(wide)).to(grad.dtype)
    return d_tokens, None, d_mask_token, grad.sum(0) if need_positions else None


def samples(device: str, dtype: torch.dtype) -> list[Sample]:
    def make(
        batch: int, patches: int, k: int, width: int, prefix: int = 1, positions: torch.dtype = dtype
    ) -> tuple[Any, ...]:
        g = torch.Generator().manual_seed(batch * 31 + patches * 7 + width)
        draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype)  # noqa: E731
        keep = torch.rand(batch, patches, generator=g).argsort(1)[:, :k].contiguous().to(device)
        wide = torch.promote_types(dtype, positions)
        return draw(batch, prefix + k, width), keep, draw(width).to(wide), draw(prefix + patches, width).to(wide)

    def huge() -> tuple[Any, ...]:
        # 2.2e9 elements in the result: offsets need 64 bits
        keep = torch.rand(1 << 13, 511, device=device).argsort(1)[:, :8].contiguous()
        tokens = torch.randn(1 << 13, 9, 520, device=device, dtype=dtype)
        return tokens, keep, tokens[0, 0].clone(), torch.randn(512, 520, device=device, dtype=dtype)

    all_grads = (0, 2, 3)
    return [
        Sample("small", lambda: make(3, 6, 2, 8), grad=all_grads),
        Sample("no_prefix", lambda: make(2, 5, 3, 7, prefix=0), grad=all_grads),
        Sample("one_of_everything", lambda: make(1, 1, 1, 1, prefix=0), grad=all_grads),
        Sample("nothing_hidden", lambda: make(2, 4, 4, 5), grad=all_grads),
        Sample("registers", lambda: make(2, 9, 4, 33, prefix=5), grad=all_grads),
        Sample("positions_in_float32", lambda: make(3, 16, 5, 40, positions=torch.float32)),
        Sample("many_kept", lambda: make(2, 400, 300, 64)),
        Sample("vit_base_mae", lambda: make(16, 196, 49, 512)),
        Sample("huge", huge, huge=True),
    ]


def bad_inputs() -> list[BadInput]:
    t, m, p = torch.zeros(2, 3, 4), torch.zeros(4), torch.zeros(6, 4)
    keep = torch.tensor([[0, 4], [2, 1]])  # one prefix token, five patches
    return [
        BadInput("two_dims", (t[0], keep, m, p), ValueError, "tokens has shape"),
        BadInput("integers", (t.long(), keep, m.long(), p.long()), TypeError, "tokens has dtype"),
        BadInput("keep_batch", (t, keep[:1], m, p), ValueError, "keep has shape"),
        BadInput("keep_none", (t, keep[:, :0], m, p), ValueError, "keep has shape"),
        BadInput("keep_over_tokens", (t, torch.tensor([[0, 1, 2, 3]] * 2), m, p), ValueError, "keep has shape"),
        BadInput("int32_keep", (t, keep.int(), m, p), TypeError, "keep has dtype"),
        BadInput("keep_too_large", (t, keep + 1, m, p), ValueError, "keep holds a patch outside 0 to 4"),
        BadInput("keep_negative", (t, keep - 1, m, p), ValueError, "keep holds a patch outside 0 to 4"),
        BadInput("keep_repeated", (t, torch.tensor([[0, 4], [1, 1]]), m, p), ValueError, "names a patch twice"),
        BadInput("mask_tokens", (t, keep, t[0], p), ValueError, "mask_token has shape"),
        BadInput("mask_token_dtype", (t, keep, m.half(), p), TypeError, "mask_token has dtype"),
        BadInput("few_positions", (t, keep, m, p[:2]), ValueError, "positions has shape"),
        BadInput("positions_dtype", (t, keep, m.double(), p.double()), TypeError, "positions has dtype"),
        BadInput("strided", (torch.zeros(2, 4, 3).mT, keep, m, p), ValueError, "tokens has strides"),
        BadInput("meta_device", (t, keep.to("meta"), m, p), ValueError, "keep is on meta"),
    ]


def cost(tokens: Tensor, keep: Tensor, mask_token: Tensor, positions: Tensor) -> Cost:
    out = tokens.shape[0] * positions.numel()
    moved = (out + positions.numel()) * positions.element_size() + tokens.numel() * tokens.element_size()
    return Cost(flops=float(out), bytes=float(moved + keep.numel() * 8))


_entry = declare(
    SCHEMA,
    reference=reference,
    check=check,
    check_values=check_values,
    fake=fake,
    backward=backward,
    setup_context=setup_context,
    samples=samples,
    bad_inputs=bad_inputs,
    cost=cost,
    backends=[
        Backend("cpp", native.entry("unshuffle_tokens"), "cpu", LOW, native.missing_cpu),
        Backend("triton", triton.launcher("unshuffle_tokens"), "cuda", LOW, triton.missing),
    ],
)
