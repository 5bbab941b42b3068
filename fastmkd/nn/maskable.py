"""Which networks can run on part of their patches, and why the others cannot."""

from __future__ import annotations

from typing import Any

from timm.layers import PatchEmbed
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

__all__ = ["why_not_maskable"]

# What `fastmkd.nn.embed` and `MaskedViT.forward` do in the place of a model's own methods; a subclass that brings
# another one of these computes something else.
_KNOWN: dict[type[nn.Module], dict[str, tuple[Any, ...]]] = {
    VisionTransformer: {
        "_pos_embed": (VisionTransformer._pos_embed, VisionTransformerDistilled._pos_embed),
        "forward_features": (VisionTransformer.forward_features,),
        "forward": (VisionTransformer.forward,),
    },
    Eva: {
        "_pos_embed": (Eva._pos_embed,),
        "forward_features": (Eva.forward_features,),
        "forward": (Eva.forward,),
    },
    Cait: {
        "forward_cls": (Cait.forward_cls,),
        "forward_features": (Cait.forward_features,),
        "forward": (Cait.forward,),
    },
}
_NAMES = "a timm VisionTransformer (ViT, DeiT, DeiT III, CLIP, DINOv2, ...), Eva (EVA-02, DINOv3, ...) or Cait"


def why_not_maskable(model: Any) -> str | None:
    """Says why patches of this model cannot be left out, or None when they can.

    Args:
        model: any module.

    Example:
        >>> import timm
        >>> why_not_maskable(timm.create_model("resnet18"))
        'ResNet is a convolutional network, whose windows cross patch borders; fastmkd.convert_cnn is for those'
    """
    kind = type(model).__name__
    base = next((base for base in _KNOWN if isinstance(model, base)), None)
    if base is None:
        return _why_another_kind(model, kind)
    for method, known in _KNOWN[base].items():
        if getattr(type(model), method) not in known:
            return f"{kind} has its own {method}, which MaskedViT does not know"
    embed = model.patch_embed
    proj = getattr(embed, "proj", None)
    if type(embed).forward is not PatchEmbed.forward or type(proj) is not nn.Conv2d:
        return f"its patch_embed ({type(embed).__name__}) is not one convolution over separate patches"
    if proj.padding not in ((0, 0), "valid") or proj.dilation != (1, 1) or proj.groups != 1:
        return "its patch convolution has padding, dilation or groups, so patches are not independent"
    if getattr(getattr(model, "attn_pool", None), "pos_embed", None) is not None:
        return "its attention pool adds a position to every patch, so it needs all of them"
    if len(model.blocks) == 0:
        return "it has no blocks"
    return None


def _why_another_kind(model: Any, kind: str) -> str:
    names = [*dict(model.named_modules()), *dict(model.named_parameters())]
    if any("rel_pos" in name or "relative_position" in name for name in names):
        return f"{kind} adds a relative position bias between all patches, so none can be left out"
    attends = any("attn" in name or "attention" in name for name in names)
    if not attends and sum(isinstance(part, nn.Conv2d) for part in model.modules()) > 1:
        return f"{kind} is a convolutional network, whose windows cross patch borders; fastmkd.convert_cnn is for those"
    if hasattr(model, "stages") or hasattr(model, "layers"):
        return f"{kind} works in stages that pool or window neighbouring patches, so none can be left out"
    return f"{kind} is not {_NAMES}"
