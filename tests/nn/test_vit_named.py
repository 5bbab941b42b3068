"""Every family by the name people create it with, made small: equal to the oracle, and as exact in float32 and bf16."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from vit_models import assert_same, check_gradients, check_outputs, check_saliency, choose, pictures, randomize

from fastmkd import MaskedViT
from fastmkd.nn.spectrogram import SpectrogramTransformer
from fastmkd.ops.accuracy import judge
from fastmkd.reference import masked_vit_forward, masked_vit_saliency

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
MODELS = {
    "ViT": ("vit_tiny_patch16_224", {"img_size": 64}),
    "ViT, patch 8": ("vit_base_patch8_224", {"img_size": 24}),
    "ViT, patch 32": ("vit_base_patch32_224", {"img_size": 96}),
    "ViT, not square": ("vit_tiny_patch16_224", {"img_size": (32, 80)}),
    "MAE fine-tuned": ("vit_base_patch16_224", {"img_size": 64, "global_pool": "avg"}),
    "DeiT": ("deit_tiny_patch16_224", {"img_size": 64}),
    "DeiT distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 64}),
    "DeiT III": ("deit3_small_patch16_224", {"img_size": 64}),
    "CLIP": ("vit_base_patch32_clip_224", {"img_size": 96}),
    "CLIP, quick GELU": ("vit_base_patch16_clip_quickgelu_224", {"img_size": 64}),
    "SigLIP": ("vit_base_patch16_siglip_224", {"img_size": 64}),
    "DINOv2": ("vit_small_patch14_dinov2", {"img_size": 56}),
    "DINOv2, registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}),
    "CaiT": ("cait_xxs24_224", {"img_size": 64}),
    "EVA": ("eva_giant_patch14_224", {"img_size": 56}),
    "EVA-02": ("eva02_tiny_patch14_224", {"img_size": 56}),
    "EVA-02 CLIP": ("eva02_base_patch16_clip_224", {"img_size": 64}),
    "EVA-02 CLIP, post norm": ("eva02_enormous_patch14_clip_224", {"img_size": 56}),
    "DINOv3": ("vit_small_patch16_dinov3", {"img_size": 64}),
    "DINOv3, SwiGLU": ("vit_huge_plus_patch16_dinov3", {"img_size": 64}),
    "RoPE, average": ("vit_medium_patch16_rope_reg1_gap_256", {"img_size": 64}),
    "RoPE, axial": ("vit_small_patch16_rope_224", {"img_size": 64}),
    "RoPE, mixed": ("vit_small_patch16_rope_mixed_224", {"img_size": 64}),
    "Perception Encoder": ("vit_pe_core_tiny_patch16_384", {"img_size": 64}),
    "Sapiens 2": ("vit_base_patch16_sapiens2", {"img_size": 64, "num_kv_heads": (1, 2)}),
    "AST": (None, {"img_size": (32, 72)}),
}
MODELS = {family: made for family, made in MODELS.items() if made[0] is None or timm.is_model(made[0])}
KINDS = ["DeiT distilled", "CaiT", "EVA-02", "DINOv3", "RoPE, mixed", "AST"]


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    name, options = MODELS[family]
    if name is None:
        return randomize(SpectrogramTransformer(**SMALL, **options))
    return randomize(timm.create_model(name, **SMALL, **options))


@cache
def built(family: str) -> nn.Module:
    return build(family)


@pytest.mark.parametrize("family", MODELS)
def test_float64_equals_model_and_oracle(family):
    model = build(family)
    check_outputs(model)
    if model.num_prefix_tokens > 0:
        check_saliency(model)


@pytest.mark.parametrize("family", MODELS)
def test_gradients_in_training_mode(family):
    check_gradients(build(family))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", MODELS)
def test_no_less_exact_than_the_plain_network(family, dtype, training):
    """No further from float64 than twice what gather-after-embedding is in the same dtype."""
    # The same rounded weights and pixels in both precisions.
    model = build(family).to(dtype)
    exact_model = copy.deepcopy(model).double()
    images = pictures(model, 64).to(dtype)  # enough that the largest error is no matter of luck
    keep = choose(64, model.patch_embed.num_patches, (model.patch_embed.num_patches + 1) // 2)
    vit = MaskedViT(model.train(training))
    exact = masked_vit_forward(exact_model, images.double(), keep)
    with torch.set_grad_enabled(training):
        verdict = judge(vit(images, keep).detach(), exact.detach(), masked_vit_forward(model, images, keep).detach())
    assert verdict.ok, verdict


@settings(max_examples=30, deadline=None)
@given(family=st.sampled_from(KINDS), data=st.data())
def test_any_keep(family, data):
    model = built(family)
    patches = model.patch_embed.num_patches
    orders = [data.draw(st.permutations(range(patches))) for _ in range(2)]
    keep = torch.tensor(orders)[:, : data.draw(st.integers(1, patches))]
    images = pictures(model, 2)
    logits, saliency = MaskedViT(model)(images, keep, return_saliency=True)
    assert_same(logits, masked_vit_forward(model, images, keep))
    assert_same(saliency, masked_vit_saliency(model, images, keep))


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize(
    ("keep", "error", "match"),
    [
        ([[0, 0]], ValueError, "twice"),
        ([[0, 99]], ValueError, "keep holds"),
        ([[-1, 0]], ValueError, "keep holds"),
        ([[0.0, 1.0]], TypeError, "keep has dtype"),
        ([0, 1], ValueError, "keep has shape"),
        ([[]], (TypeError, ValueError), "keep"),
    ],
)
def test_refuses_bad_keep(family, keep, error, match):
    with pytest.raises(error, match=match):
        MaskedViT(built(family))(pictures(built(family), 1), torch.tensor(keep))
