"""The two ends of a masked autoencoder's decoder, against the public code's way of them.

That code concatenates mask tokens, gathers by the inverse permutation and adds the positions; it predicts every patch,
cuts the whole image into patches, normalises them all, and takes the mean under a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmkd.ops import masked_patch_loss, unshuffle_tokens

from ..models import images_for, keep_for
from ..op_entries import compile_variant
from ..registry import Answer, Case, Setting, Variant, benchmark

PATCH, GRID, KEPT, WIDTH = 16, 14, 49, 512  # a ViT at 75 % masking, and the decoder's width
PARTS = ("un-shuffle", "loss", "loss, normalised")
DIRECTIONS = ("forward", "forward and backward")


def concatenate_then_gather(tokens: Tensor, restore: Tensor, mask_token: Tensor, positions: Tensor) -> Tensor:
    """``(B, 1 + k, D) -> (B, 1 + N, D)``; ``restore (B, N)`` is where each patch stands among kept and mask tokens."""
    hidden = mask_token.expand(len(tokens), restore.shape[1] + 1 - tokens.shape[1], -1)
    patches = torch.cat([tokens[:, 1:], hidden], 1)
    patches = patches.gather(1, restore[..., None].expand(-1, -1, tokens.shape[2]))
    return torch.cat([tokens[:, :1], patches], 1) + positions


def patchify_then_mask(prediction: Tensor, images: Tensor, mask: Tensor, normalize: bool) -> Tensor:
    """Mean over the patches that ``mask (B, N)`` hides; `prediction` is ``(B, N, 16 * 16 * 3)``."""
    cells = images.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # (B, C, gh, ph, gw, pw)
    target = cells.permute(0, 2, 4, 3, 5, 1).reshape(prediction.shape)
    if normalize:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    return ((prediction - target).square().mean(-1) * mask).sum() / mask.sum()


def _with_gradients(function: Callable[..., Tensor], leaves: tuple[Tensor, ...], *rest: Any) -> tuple[Tensor, ...]:
    """The result, weighted by itself in the backward, and the gradients of `leaves`, its first arguments."""
    out = function(*leaves, *rest)
    return out, *torch.autograd.grad(out, leaves, out.detach())


def _unshuffle(setting: Setting, batch: int) -> tuple[list[Callable[..., Tensor]], list[tuple[Any, ...]], int]:
    keep = keep_for(batch, GRID**2, KEPT, setting)
    hidden = (
        torch.ones(batch, GRID**2, device=setting.device).scatter(1, keep, 0.0).argsort(stable=True, dim=1)[:, KEPT:]
    )
    restore = torch.cat([keep, hidden], 1).argsort(1)
    generator = torch.Generator().manual_seed(4)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(setting.device)  # noqa: E731
    leaves = draw(batch, 1 + KEPT, WIDTH).to(setting.torch_dtype), draw(WIDTH), draw(1 + GRID**2, WIDTH)

    def public(tokens: Tensor, mask_token: Tensor, positions: Tensor, restore: Tensor, _: Tensor) -> Tensor:
        return concatenate_then_gather(tokens, restore, mask_token, positions)

    def ours(tokens: Tensor, mask_token: Tensor, positions: Tensor, _: Tensor, keep: Tensor) -> Tensor:
        return unshuffle_tokens(tokens, keep, mask_token, positions)

    moved = leaves[0].numel() * leaves[0].element_size() + 4 * (batch + 1) * leaves[2].numel()
    return [public, ours], [(leaves, (restore, keep))] * 2, moved


def _loss(
    setting: Setting, batch: int, normalize: bool
) -> tuple[list[Callable[..., Tensor]], list[tuple[Any, ...]], int]:
    images = images_for(batch, setting)
    keep = keep_for(batch, GRID**2, KEPT, setting)
    mask = torch.ones(batch, GRID**2, device=setting.device).scatter(1, keep, 0.0)
    hidden = mask.argsort(stable=True, dim=1)[:, KEPT:].contiguous()
    generator = torch.Generator().manual_seed(5)
    everywhere = torch.randn(batch, GRID**2, 3 * PATCH**2, generator=generator).to(setting.device, setting.torch_dtype)
    prediction = everywhere.take_along_dim(hidden[..., None], 1)

    def ours(prediction: Tensor, images: Tensor, hidden: Tensor, normalize: bool) -> Tensor:
        return masked_patch_loss(prediction, images, hidden, PATCH, normalize)

    moved = prediction.numel() * (prediction.element_size() + 4)
    inputs = [((everywhere,), (images, mask, normalize)), ((prediction,), (images, hidden, normalize))]
    return [patchify_then_mask, ours], inputs, moved


def _grid(setting: Setting) -> list[dict[str, Any]]:
    parts, directions = (PARTS[::2], DIRECTIONS[1:]) if setting.quick else (PARTS, DIRECTIONS)
    return [{"part": part, "direction": direction} for part in parts for direction in directions]


@benchmark(
    "masked_autoencoder",
    summary="mask tokens and positions, and the loss on hidden patches, against the public code's way",
    grid=_grid,
    dtypes=("fp32", "bf16", "fp16"),
)
def masked_autoencoder(setting: Setting, part: str, direction: str) -> Case:
    """ViT-B/16 at 75 %: 49 of 196 patches kept; tokens in the setting's dtype, images and parameters in float32."""
    batch, backward = (256 if setting.on_gpu else 16), direction != "forward"
    made = _unshuffle(setting, batch) if part == "un-shuffle" else _loss(setting, batch, part.endswith("normalised"))
    (public, ours), inputs, moved = made
    for leaves, _ in inputs:
        for leaf in leaves:
            leaf.requires_grad_(backward)

    def bind(function: Callable[..., Tensor], at: int) -> Callable[[], Any]:
        leaves, rest = inputs[at]
        return lambda: _with_gradients(function, leaves, *rest) if backward else function(*leaves, *rest)

    def exact() -> Any:
        leaves, rest = (_double(side) for side in inputs[1])
        if not backward:
            return ours(*leaves, *rest)
        return _with_gradients(ours, tuple(leaf.requires_grad_() for leaf in leaves), *rest)

    def read(result: Any) -> Any:
        """The gradient where something was predicted, for the loss that predicts every patch."""
        if not backward or part == "un-shuffle":
            return result
        return result[0], result[1].take_along_dim(inputs[1][1][1][..., None], 1)

    answer = Answer(exact, bytes=float(moved * (2 if backward else 1)))
    variants = [Variant("public code", bind(public, 0), answer, plain=True, read=read)]
    if not setting.quick:
        fast = compile_variant("public code, compiled", public, answer, lambda function: bind(function, 0))
        variants.append(Variant(fast.name, fast.run, answer, unavailable=fast.unavailable, read=read))
    variants.append(Variant("fastmkd", bind(ours, 1), answer))
    return Case(
        label=f"{part}, {direction}",
        panel=f"ViT-B/16 at 75 %, batch {batch}",
        variants=variants,
        baseline="public code",
        items=batch,
        device_time=not backward,
        params={"batch": batch, "kept": KEPT, "width": WIDTH, "part": part, "direction": direction},
    )


def _double(side: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in side)
