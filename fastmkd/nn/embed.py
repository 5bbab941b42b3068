"""From pixels to the first block's input in a timm ViT, for the kept patches only.

Positions are added to the patches they belong to, or go with them into the blocks if they are rotary. Prefix tokens
(CLS, distillation, registers) always stay; in CaiT there are none yet, for the CLS token comes after these blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from torch import Tensor, nn

from ..ops import patch_embed
from .ragged import RaggedKeep
from .rotary import rotary_table, rotations

__all__ = ["PackedTokens", "Tokens", "check_images", "embed_all", "embed_kept", "embed_ragged", "patch_grid"]

# Tokens (B, P + k, D), and for each block in turn what it takes as `rope`: rotary positions, or None.
Tokens = tuple[Tensor, Iterator[Tensor | None]]


class PackedTokens(NamedTuple):
    """Tokens of images of different lengths in one row, those of an image together, its prefix tokens first.

    Attributes:
        x: ``(T, D)``, the first block's input.
        starts: ``(B + 1,)`` int32, where the images begin, and T.
        prefix: ``(B, P)`` int64, the rows of the prefix tokens.
        patches: ``(K,)`` int64, the rows of the patches.
    """

    x: Tensor
    starts: Tensor
    prefix: Tensor
    patches: Tensor


def check_images(model: Any, images: Tensor) -> None:
    """Raises ValueError or TypeError unless `images` is a batch that `model` can take.

    Args:
        model: a maskable timm ViT.
        images: should be ``(B, C, H, W)`` floating point.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images is a {type(images).__name__}; expected a (B, C, H, W) tensor.")
    if not images.is_floating_point():
        raise TypeError(f"images has dtype {images.dtype}; expected floating point, for example images.float() / 255.")
    embed = model.patch_embed
    channels = embed.proj.in_channels
    if images.dim() != 4 or images.shape[1] != channels:
        raise ValueError(f"images has shape {tuple(images.shape)}; expected (B, {channels}, H, W).")
    if not len(images):
        raise ValueError(f"images holds no image; its shape is {tuple(images.shape)}.")
    height, width = images.shape[-2:]
    if getattr(embed, "strict_img_size", True) and embed.img_size is not None:
        if (height, width) != tuple(embed.img_size):
            raise ValueError(
                f"images is {height} x {width} pixels but the model takes {embed.img_size[0]} x {embed.img_size[1]}; "
                "resize the images, or create the model with dynamic_img_size=True."
            )
    elif not getattr(embed, "dynamic_img_pad", False) and (height % embed.patch_size[0] or width % embed.patch_size[1]):
        raise ValueError(
            f"images is {height} x {width} pixels, which the patch size {tuple(embed.patch_size)} does not divide; "
            "resize or pad the images."
        )


def patch_grid(model: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Returns ``(gh, gw)``, the patch grid of images of ``(H, W)`` pixels.

    Args:
        model: a maskable timm ViT.
        size: ``(H, W)`` pixels, as `check_images` allows.
    """
    proj = model.patch_embed.proj
    pad_h, pad_w = _padding(model.patch_embed, size)
    return (
        (size[0] + pad_h - proj.kernel_size[0]) // proj.stride[0] + 1,
        (size[1] + pad_w - proj.kernel_size[1]) // proj.stride[1] + 1,
    )


def embed_all(model: Any, images: Tensor) -> Tokens:
    """Embeds every patch as the model itself does: ``(B, C, H, W)`` -> ``(B, P + N, D)``, the first block's input.

    Args:
        model: a maskable timm ViT.
        images: ``(B, C, H, W)``.

    Returns:
        The tokens, and the blocks' rotary positions.
    """
    x = model.patch_embed(images)
    if isinstance(model, Cait):
        return model.pos_drop(x + model.pos_embed), repeat(None)
    if isinstance(model, Eva):
        x, rope = model._pos_embed(x)
        if rope is not None and getattr(model, "rope_mixed", False):
            return model.norm_pre(x), iter(rope)  # (depth, H, N, 2d): each block has its own
        return model.norm_pre(x), repeat(rope)
    return model.norm_pre(_patch_drop(model)(model._pos_embed(x))), repeat(None)


def embed_kept(model: Any, images: Tensor, keep: Tensor) -> Tokens:
    """Embeds the kept patches only: ``(B, C, H, W)``, ``(B, k)`` -> ``(B, P + k, D)``, the first block's input.

    Pixels are gathered before the projection, and positions are added within the same op where the model adds them
    directly to the projection.

    Args:
        model: a maskable timm ViT.
        images: ``(B, C, H, W)``.
        keep: ``(B, k)`` int64 patch indices, row-major over the grid, no repeats.

    Returns:
        The tokens, and the blocks' rotary positions.

    Raises:
        ValueError: `keep` has a wrong shape, or an index out of range or repeated (on a GPU an asynchronous assert).
        TypeError: `keep` is not int64.
    """
    embed, proj = model.patch_embed, model.patch_embed.proj
    grid = patch_grid(model, (images.shape[-2], images.shape[-1]))
    images = _pad(embed, images)
    prefix, positions = _prefix_and_positions(model, grid)
    plain = isinstance(getattr(embed, "norm", None), (nn.Identity, type(None)))
    x = patch_embed(images, proj.weight, proj.bias, positions if plain else None, keep, proj.stride)  # (B, k, D)
    if not plain:
        x = embed.norm(x)
        if positions is not None:
            x = x + positions[keep]
    if prefix is not None:
        x = torch.cat((prefix.expand(x.shape[0], -1, -1), x), dim=1)
    table = rotary_table(model, grid)  # before the dropouts, so that random numbers are drawn in the model's order
    if positions is not None or isinstance(model, Eva):
        x = model.pos_drop(x)
    if isinstance(model, Cait):
        return x, repeat(None)
    x = _patch_drop(model)(x)
    if isinstance(x, tuple):  # Eva's patch dropout says what it kept
        x, of_kept = x
        keep = keep if of_kept is None else keep.gather(1, of_kept)
    return model.norm_pre(x), rotations(table, keep)


def embed_ragged(model: Any, images: Tensor, keep: RaggedKeep) -> PackedTokens:
    """Embeds the kept patches of images that keep different numbers of them.

    Args:
        model: a VisionTransformer.
        images: ``(B, C, H, W)``.
        keep: valid patch indices of each image.
    """
    embed, proj = model.patch_embed, model.patch_embed.proj
    prefix, positions = _prefix_and_positions(model, patch_grid(model, (images.shape[-2], images.shape[-1])))
    (height, width), (down, right) = proj.kernel_size, proj.stride
    windows = _pad(embed, images).unfold(2, height, down).unfold(3, width, right)  # (B, C, gh, gw, ph, pw), a view
    image, columns = keep.images, windows.shape[3]
    pixels = windows[image, :, keep.indices // columns, keep.indices % columns].flatten(1)  # (K, C*ph*pw)
    x = (embed.norm or nn.Identity())(F.linear(pixels, proj.weight.flatten(1), proj.bias))  # (K, D)
    if positions is not None:
        x = x + positions[keep.indices]
    batch, length = len(images), 0 if prefix is None else prefix.shape[1]
    at = torch.arange(max(batch + 1, len(image), length), device=x.device)
    starts = keep.starts + length * at[: batch + 1]
    prefix_rows = starts[:-1, None] + at[:length]  # (B, P)
    patch_rows = at[: len(image)] + length * (image + 1)
    if prefix is not None:
        x = torch.cat((prefix.expand(batch, -1, -1).flatten(0, 1), x))[
            torch.cat((prefix_rows.flatten(), patch_rows)).argsort()
        ]
    if positions is not None:
        x = model.pos_drop(x)
    return PackedTokens(model.norm_pre(x), starts.int(), prefix_rows, patch_rows)


def _prefix_and_positions(model: Any, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
    """Prefix tokens ``(1, P, D)`` with positions added, and patches' positions ``(N, D)``; None if there are none."""
    if isinstance(model, Cait):
        return None, model.pos_embed[0]
    second = "dist_token" if isinstance(model, VisionTransformerDistilled) else "reg_token"
    tokens = [token for token in (model.cls_token, getattr(model, second, None)) if token is not None]
    prefix = torch.cat(tokens, dim=1) if tokens else None
    positions = model.pos_embed
    if positions is None:
        return prefix, None
    embedded_prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    if model.dynamic_img_size:
        positions = resample_abs_pos_embed(
            positions,
            new_size=list(grid),
            old_size=list(model.patch_embed.grid_size),
            num_prefix_tokens=embedded_prefix,
        )
    if embedded_prefix and prefix is not None:
        prefix = prefix + positions[:, :embedded_prefix]
    return prefix, positions[0, embedded_prefix:]


def _pad(embed: Any, images: Tensor) -> Tensor:
    pad_h, pad_w = _padding(embed, (images.shape[-2], images.shape[-1]))
    return F.pad(images, (0, pad_w, 0, pad_h)) if pad_h or pad_w else images


def _padding(embed: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Rows below and columns to the right that a dynamic_img_pad model adds."""
    if not getattr(embed, "dynamic_img_pad", False):
        return 0, 0
    return -size[0] % embed.patch_size[0], -size[1] % embed.patch_size[1]


def _patch_drop(model: Any) -> nn.Module:
    return getattr(model, "patch_drop", None) or nn.Identity()
