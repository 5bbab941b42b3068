"""What MaskedViT refuses, and that the sentence says why: models, wrong keep, images and indices."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import HybridEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fastmkd import MaskedViT

KEEP = torch.tensor([[0, 3, 7, 12, 15], [9, 8, 2, 1, 0]])


def tiny(attn_pool_positions: bool = False, **options) -> VisionTransformer:
    torch.manual_seed(0)
    defaults = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = VisionTransformer(**{**defaults, **options}).eval()
    if attn_pool_positions:
        model.attn_pool.pos_embed = nn.Parameter(torch.zeros(16, 24))
    return model


def images(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=24),
            "relative position",
        ),
        (lambda: timm.create_model("vit_relpos_small_patch16_224", depth=1), "relative position"),
        (lambda: timm.create_model("beit_base_patch16_224", depth=1), "relative position"),
        (lambda: timm.create_model("hiera_tiny_224", embed_dim=24), "Hiera is not"),
        (lambda: timm.create_model("pvt_v2_b0"), "stages"),
        (lambda: timm.create_model("vit_tiny_r_s16_p8_224", depth=1), "patch_embed"),
        (lambda: tiny(global_pool="map", class_token=False, attn_pool_positions=True), "attention pool"),
        (lambda: timm.create_model("resnet18"), "convert_cnn"),
        (lambda: nn.Linear(2, 2), "Linear is not"),
        (lambda: MaskedViT(tiny()), "already a MaskedViT"),
        (lambda: "vit", "model is a str"),
        (
            lambda: tiny(
                embed_layer=lambda **options: HybridEmbed(timm.create_model("resnet18"), img_size=32, embed_dim=24)
            ),
            "HybridEmbed",
        ),
        (lambda: tiny(depth=0), "no blocks"),
    ],
)
def test_refuses_models_whose_patches_cannot_be_left_out(model, reason):
    with pytest.raises(TypeError, match=reason):
        MaskedViT(model())


class OwnPositions(VisionTransformer):
    def _pos_embed(self, x):
        return super()._pos_embed(x) * 2


def test_refuses_unknown_positions_and_padded_patches():
    with pytest.raises(TypeError, match="OwnPositions"):
        MaskedViT(OwnPositions(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2))
    model = tiny()
    model.patch_embed.proj.padding = (1, 1)
    with pytest.raises(TypeError, match="padding"):
        MaskedViT(model)


class OwnFeatures(VisionTransformer):
    def forward_features(self, x):
        return super().forward_features(x).flip(1)


class OwnForward(Eva):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(("kind", "method"), [(OwnFeatures, "forward_features"), (OwnForward, "forward")])
def test_refuses_subclasses_that_compute_something_else(kind, method):
    with pytest.raises(TypeError, match=f"its own {method}"):
        MaskedViT(kind(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2))


@pytest.mark.parametrize(
    ("keep", "error", "match"),
    [
        (KEEP.int(), TypeError, "keep has dtype"),
        (KEEP.float(), TypeError, "keep has dtype"),
        (KEEP.tolist(), TypeError, "keep is a list"),
        (KEEP[0], ValueError, "keep has shape"),
        (KEEP[:1], ValueError, "keep has shape"),
        (KEEP[:, :0], ValueError, "keep names 0"),
        (torch.arange(17).expand(2, -1), ValueError, "keep names 17"),
        (KEEP + 1, ValueError, "keep holds"),
        (KEEP - 1, ValueError, "keep holds"),
        (KEEP // 2, ValueError, "twice"),
        (KEEP.to("meta"), ValueError, "keep is on meta"),
    ],
)
def test_refuses_bad_keep(keep, error, match):
    vit = MaskedViT(tiny())
    with pytest.raises(error, match=match):
        vit(images(), keep)
    with pytest.raises(error, match=match):
        vit.forward_intermediates(images(), [0], keep=keep)


@pytest.mark.parametrize(
    ("x", "options", "error", "match"),
    [
        (torch.zeros(2, 3, 32, 40), {}, ValueError, "32 x 40 pixels but the model takes 32 x 32"),
        (torch.zeros(0, 3, 32, 32), {}, ValueError, "images holds no image"),
        (torch.zeros(2, 3, 36, 32), {"dynamic_img_size": True}, ValueError, "does not divide"),
        (torch.zeros(2, 1, 32, 32), {}, ValueError, r"expected \(B, 3, H, W\)"),
        (torch.zeros(3, 32, 32), {}, ValueError, "images has shape"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), {}, TypeError, "images has dtype"),
        ([[0.0]], {}, TypeError, "images is a list"),
    ],
)
def test_refuses_bad_images(x, options, error, match):
    vit = MaskedViT(tiny(**options))
    for keep in (None, KEEP):
        with pytest.raises(error, match=match):
            vit(x, keep)


@pytest.mark.parametrize(
    ("indices", "error"),
    [
        ([2], ValueError),
        ([-3], ValueError),
        ([], ValueError),
        (0, ValueError),
        (3, ValueError),
        ([0.5], TypeError),
        ("0", TypeError),
        (True, TypeError),
    ],
)
def test_refuses_bad_indices(indices, error):
    with pytest.raises(error, match="indices is"):
        MaskedViT(tiny()).forward_intermediates(images(), indices=indices)
