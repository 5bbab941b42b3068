"""Inputs for the whole-model benchmarks: random weights, random images, and the least work of a ViT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .registry import Setting

__all__ = ["autocast", "exact_dtype", "images_for", "keep_for", "vit", "vit_flops"]

NAMES = {
    "DeiT-Ti": "deit_tiny_patch16_224",
    "DeiT-S": "deit_small_patch16_224",
    "DeiT-B": "deit_base_patch16_224",
    "ViT-S": "vit_small_patch16_224",
    "ViT-B": "vit_base_patch16_224",
    "ViT-L": "vit_large_patch16_224",
}


def vit(name: str, setting: Setting) -> nn.Module:
    """A DeiT or ViT with random weights in float32, in eval mode on the setting's device.

    Args:
        name: one of `NAMES`.
        setting: where it goes.
    """
    torch.manual_seed(0)
    return timm.create_model(NAMES[name]).eval().to(setting.device)


def images_for(batch: int, setting: Setting, side: int = 224) -> Tensor:
    """Random images ``(batch, 3, side, side)`` float32 on the setting's device; the same for each call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, side, side, generator=generator).to(setting.device)


def keep_for(batch: int, patches: int, kept: int, setting: Setting) -> Tensor:
    """Random patch indices ``(batch, kept)`` int64, ascending as `fastmkd.select_tokens` gives them."""
    generator = torch.Generator().manual_seed(2)
    order = torch.rand(batch, patches, generator=generator).argsort(1)
    return order[:, :kept].sort(1).values.to(setting.device)


def exact_dtype(setting: Setting) -> torch.dtype:
    """The dtype in which to compute what a convolutional network should give: wide enough for the setting's.

    Float32 for the two half precisions, since float64 convolutions of a GPU's batch are slow and large.

    Args:
        setting: whose dtype is to be judged.

    Example:
        >>> exact_dtype(Setting(torch.device("cpu"), "bf16"))
        torch.float32
    """
    return torch.float64 if setting.dtype == "fp32" else torch.float32


def autocast(setting: Setting, function: Callable[..., Any], *args: Any, grad: bool = False) -> Callable[[], Any]:
    """``function(*args)`` as a callable without arguments, under the setting's autocast.

    Args:
        setting: float32 runs without autocast.
        function: a model or a step.
        args: its positional arguments.
        grad: record gradients.
    """

    def run() -> Any:
        lower = torch.autocast(setting.device.type, setting.torch_dtype, enabled=setting.dtype != "fp32")
        with torch.set_grad_enabled(grad), lower:
            return function(*args)

    return run


def vit_flops(model: nn.Module, batch: int, kept: int) -> float:
    """The fewest floating-point operations of a ViT's logits on `kept` patches an image (a multiply-add counts two).

    Only the rows that feed the head count in the last block: keys and values of all tokens, everything else of the
    class token alone. Norms, activations and the softmax are left out, as in the paper (MaskedKD, Appendix on FLOPs).

    Args:
        model: a timm VisionTransformer.
        batch: images.
        kept: patches an image.
    """
    dim, depth = model.embed_dim, len(model.blocks)
    hidden = model.blocks[0].mlp.fc1.out_features
    tokens = kept + model.num_prefix_tokens
    embed = kept * model.patch_embed.proj.weight[0].numel() * dim
    block = tokens * (4 * dim * dim + 2 * dim * hidden) + 2 * tokens * tokens * dim
    last = tokens * 2 * dim * dim + 2 * dim * dim + 2 * dim * hidden + 2 * tokens * dim
    head = model.head.weight.numel() if isinstance(model.head, nn.Linear) else 0
    return 2.0 * batch * (embed + (depth - 1) * block + last + head)
