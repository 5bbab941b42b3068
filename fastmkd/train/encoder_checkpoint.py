"""Reads the public files of self-supervised ViTs into timm's: the encoder, strictly; the rest is named.

Known are the layouts of MAE, DMAE, MoCo v3, DINO and DINOv2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from .errors import UserError, shorten
from .models import read_state_dict

__all__ = ["EncoderReport", "Layout", "find_layout", "load_encoder", "load_encoder_checkpoint"]


class Layout(NamedTuple):
    """How a public file names its tensors; a ``module.`` that DDP has put somewhere in a key does not count.

    Attributes:
        encoder: what the encoder's keys begin with.
        beside: what the keys of all else in the file may begin with.
    """

    encoder: str
    beside: tuple[str, ...]


# The encoder alone (DINO, DINOv2), or with MAE's decoder and the heads that DMAE's code puts on the student.
PLAIN = Layout("", ("mask_token", "decoder_", "aligned_feature_projection_heads."))
# MoCo v3 evaluates its base encoder, without the projection that stands in the place of a classifier.
MOCO_V3 = Layout("base_encoder.", ("base_encoder.head.", "momentum_encoder.", "predictor."))
# DINO and DINOv2 evaluate the teacher; `read_state_dict` puts the networks of such a checkpoint side by side.
DINO = Layout(
    "teacher.backbone.",
    ("student.", "teacher.head.", "teacher.dino_head.", "teacher.ibot_head.", "teacher.backbone.mask_token"),
)

# What a timm ViT may have behind the encoder, of which such files have nothing.
_BEHIND = ("head.", "head_dist.", "fc_norm.", "attn_pool.")


class EncoderReport(NamedTuple):
    """What was not taken from a file, what it could not give, and what had to be changed.

    Attributes:
        left_out: keys of the file that are no part of the encoder.
        untouched: keys of the model that the file lacks: its classifier and what belongs to it.
        resized: how the positions of a DINOv2 file were fitted to the model's grid; "" if they were not.
    """

    left_out: list[str]
    untouched: list[str]
    resized: str = ""


def load_encoder_checkpoint(model: nn.Module, path: str | Path) -> EncoderReport:
    """Loads the encoder of a public MAE, DMAE, MoCo v3, DINO or DINOv2 file into a timm ViT.

    Of DINO's training checkpoints the teacher is taken, of MoCo v3's the base encoder, as their authors' evaluations
    do. A model that averages patches has its norm behind the average (``fc_norm``); the encoder's ``norm`` is then left
    out, as in MAE's own fine-tuning. DINOv2's positions, of 37 x 37 patches, are resized to the model's grid as timm
    does it; all other shapes must fit.

    Args:
        model: timm VisionTransformer of the same width, depth, patch and image size.
        path: ``.pth`` (read without running any code in it) or ``.safetensors``.

    Returns:
        Which keys were left out, and which of the model's stayed as they were.

    Raises:
        UserError: a key that is neither the encoder's nor known to stand beside it, a key of the encoder that is
            missing or of another shape, or a file that cannot be read.

    Example:
        >>> import tempfile, timm, torch
        >>> make = lambda **kwargs: timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, **kwargs)
        >>> file = Path(tempfile.mkdtemp()) / "mae.pth"
        >>> torch.save({"model": {**make(num_classes=0).state_dict(), "mask_token": torch.zeros(1, 1, 8)}}, file)
        >>> load_encoder_checkpoint(make(num_classes=5), file)
        EncoderReport(left_out=['mask_token'], untouched=['head.weight', 'head.bias'], resized='')
    """
    state = read_state_dict(path)
    return load_encoder(model, state, path, find_layout(state) or PLAIN)


def find_layout(state: Mapping[str, Tensor]) -> Layout | None:
    """Returns the layout of weights that have not learnt to classify; None if they have, or are no ViT's.

    Args:
        state: by key.

    Example:
        >>> find_layout({"module.base_encoder.patch_embed.proj.weight": 1}).encoder
        'base_encoder.'
        >>> find_layout({"patch_embed.proj.weight": 1, "decoder_pred.weight": 1}) == PLAIN
        True
        >>> find_layout({"patch_embed.proj.weight": 1, "head.weight": 1})
    """
    names = set(map(_without_ddp, state))
    for layout in (MOCO_V3, DINO):
        if f"{layout.encoder}patch_embed.proj.weight" in names:
            return layout
    if "patch_embed.proj.weight" not in names or any(name.startswith(_BEHIND) for name in names):
        return None
    return PLAIN


def load_encoder(
    model: nn.Module,
    state: Mapping[str, Tensor],
    path: str | Path,
    layout: Layout,
    role: str = "model",
    classifier: bool = False,
) -> EncoderReport:
    """Does what `load_encoder_checkpoint` does with weights that have been read.

    Args:
        model: timm VisionTransformer.
        state: by key.
        path: where they come from, for messages.
        layout: of their keys.
        role: what the model is, for messages.
        classifier: refuse a model with a classifier, for which the weights have nothing.

    Raises:
        UserError: as `load_encoder_checkpoint`.
    """
    _check_heads(model, layout, path, role)
    own = model.state_dict()
    has_norm = any(key.startswith("norm.") for key in own)
    beside = (*layout.beside, *(() if has_norm else (f"{layout.encoder}norm.",)))
    left_out = [key for key in state if _without_ddp(key).startswith(beside)]
    kept = {_without_ddp(key).removeprefix(layout.encoder): state[key] for key in state if key not in left_out}
    encoder, resized = _from_dinov2(kept), ""
    if any(key.endswith("mask_token") and state[key].dim() == 2 for key in left_out):  # MAE's has three dimensions
        resized = _fit_positions(model, encoder, own)
    untouched = [key for key in own if key not in encoder and key.startswith(_BEHIND)]
    problems = {
        "foreign": [key for key in encoder if key not in own],
        "missing": [key for key in own if key not in encoder and (classifier or key not in untouched)],
        "of another shape": [
            f"{key} {tuple(value.shape)} for {tuple(own[key].shape)}"
            for key, value in encoder.items()
            if key in own and value.shape != own[key].shape
        ],
    }
    said = [f"{len(keys)} {title}: {shorten(keys)}" for title, keys in problems.items() if keys]
    if said:
        raise UserError(
            f"the encoder in {path} does not fit the {role}. Keys {'; '.join(said)}. Make it with the width, depth, "
            "patch and image size of the file, and with num_classes: 0 where only features are read."
        )
    model.load_state_dict({**own, **encoder})
    return EncoderReport(left_out, untouched, resized)


def _without_ddp(key: str) -> str:
    return key.replace("module.", "")


def _check_heads(model: Any, layout: Layout, path: str | Path, role: str) -> None:
    """MoCo v3's ViT-S has twice the heads of everybody else's, which no shape in the file tells."""
    if layout != MOCO_V3 or getattr(model, "embed_dim", 0) != 384:
        return
    heads = model.blocks[0].attn.num_heads
    if heads != 12:
        raise UserError(
            f"the {role} has {heads} heads and MoCo v3's ViT-S, in {path}, 12; make it with num_heads: 12, or save the "
            f"file's base encoder alone if it was trained with {heads}."
        )


def _from_dinov2(encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with timm's names where DINOv2 has its own: blocks in chunks, layers of SwiGLU, and registers.

    A block keeps its number inside a chunk. timm adds positions to patches alone where there are registers, so the
    class token takes its own along.
    """
    encoder = {_timm_name(key): value for key, value in encoder.items()}
    if {"register_tokens", "cls_token", "pos_embed"} <= encoder.keys():
        positions = encoder["pos_embed"]  # (1, 1 + N, D)
        encoder["reg_token"] = encoder.pop("register_tokens")
        encoder["cls_token"] = encoder["cls_token"] + positions[:, :1]
        encoder["pos_embed"] = positions[:, 1:]
    return encoder


def _timm_name(key: str) -> str:
    key = re.sub(r"^blocks\.\d+\.(?=\d)", "blocks.", key)
    return key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")


def _fit_positions(model: Any, encoder: dict[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Resizes the positions in `encoder` to the model's grid if they are of another one; says what was done."""
    from timm.layers import resample_abs_pos_embed

    theirs, mine = encoder.get("pos_embed"), own.get("pos_embed")
    if theirs is None or mine is None or theirs.shape == mine.shape or theirs.shape[2:] != mine.shape[2:]:
        return ""
    grid = tuple(model.patch_embed.grid_size)
    prefix = mine.shape[1] - math.prod(grid)
    side = math.isqrt(max(0, theirs.shape[1] - prefix))
    if side == 0 or side * side + prefix != theirs.shape[1]:
        return ""
    encoder["pos_embed"] = resample_abs_pos_embed(theirs, list(grid), [side, side], num_prefix_tokens=prefix)
    return f"pos_embed from {side} x {side} to {grid[0]} x {grid[1]} patches"
