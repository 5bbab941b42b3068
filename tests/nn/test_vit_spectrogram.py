"""AST: overlapping patches on spectrograms, and the weights of transformers' AST under timm's names."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ASTConfig, ASTForAudioClassification, ASTModel
from vit_models import (
    assert_same,
    check_gradients,
    check_intermediates,
    check_outputs,
    check_saliency,
    choose,
    pictures,
    randomize,
    rows_of_last_mlp,
)

from fastmkd import MaskedViT
from fastmkd.nn.spectrogram import SpectrogramTransformer
from fastmkd.reference import masked_vit_forward, masked_vit_saliency

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
MODELS = {
    "ast": {"img_size": (32, 72), "patch_size": 16, "stride": 10},
    "apart": {"img_size": (32, 64), "patch_size": 8, "stride": 12},  # gaps between patches
    "touching": {"img_size": (32, 64), "patch_size": 16, "stride": 16},
    "stride_in_one_direction": {"img_size": (16, 40), "patch_size": (16, 8), "stride": (16, 3)},
    "no_head": {"img_size": (32, 72), "num_classes": 0},
    "two_channels": {"img_size": (32, 72), "in_chans": 2},
}


def build(name: str = "ast") -> SpectrogramTransformer:
    torch.manual_seed(0)
    return randomize(SpectrogramTransformer(**{**TINY, **MODELS[name]}))


@pytest.mark.parametrize("name", MODELS)
def test_equals_model_and_oracle(name):
    check_outputs(build(name))


@pytest.mark.parametrize("name", MODELS)
def test_saliency_equals_full_attention(name):
    check_saliency(build(name))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_the_oracle_in_training_mode(name):
    check_gradients(build(name))


def test_forward_intermediates_and_rows_of_the_last_block():
    model = build()
    check_intermediates(model)
    assert rows_of_last_mlp(model) == 2  # the head reads two tokens


def test_only_pixels_under_kept_patches_are_read():
    model = build()
    vit, keep = MaskedViT(model), torch.tensor([[0, 11]])
    assert vit.patch_grid() == (2, 6)
    images = pictures(model, 1)
    poisoned = torch.full_like(images, float("nan"))
    poisoned[..., 0:16, 0:16] = images[..., 0:16, 0:16]
    poisoned[..., 10:26, 50:66] = images[..., 10:26, 50:66]
    assert_same(vit(poisoned, keep), vit(images, keep))


def test_gradient_adds_up_where_patches_overlap():
    model = build()
    images, keep = pictures(model).requires_grad_(), choose(3, 12, 7)
    (mine,) = torch.autograd.grad(MaskedViT(model)(images, keep).square().sum(), images)
    (theirs,) = torch.autograd.grad(masked_vit_forward(model, images, keep).square().sum(), images)
    assert_same(mine, theirs)


def test_longer_clips():
    model = build()
    model.set_input_size((32, 92))
    assert MaskedViT(model).patch_grid() == (2, 8)
    check_outputs(model)


def hugging_face() -> ASTForAudioClassification:
    torch.manual_seed(0)
    config = ASTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=72,
        num_mel_bins=32,
        max_length=72,
        num_labels=5,
    )
    return randomize(ASTForAudioClassification(config))


def test_weights_of_hugging_face():
    theirs = hugging_face()
    mine = SpectrogramTransformer.from_transformers(theirs)
    assert not mine.training
    mine, values = mine.double(), torch.randn(3, 72, 32, dtype=torch.float64)  # (B, frames, mel bins)
    assert_same(MaskedViT(mine)(values.mT.unsqueeze(1)), theirs(values).logits)
    assert sum(p.numel() for p in mine.parameters()) == sum(p.numel() for p in theirs.parameters())
    check_outputs(mine)


def test_weights_of_older_transformers(monkeypatch):
    """Version 4 called the same parts by other names."""
    theirs = hugging_face()
    expected, older = SpectrogramTransformer.from_transformers(theirs).state_dict(), {}
    for key, value in theirs.state_dict().items():
        for new, old in (
            ("layers.", "encoder.layer."),
            ("attention.q_proj", "attention.attention.query"),
            ("attention.k_proj", "attention.attention.key"),
            ("attention.v_proj", "attention.attention.value"),
            ("attention.o_proj", "attention.output.dense"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
        ):
            key = key.replace(new, old)
        older[key] = value
    assert older.keys() != theirs.state_dict().keys()
    monkeypatch.setattr(theirs, "state_dict", lambda: older)
    loaded = SpectrogramTransformer.from_transformers(theirs).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


@pytest.mark.parametrize("model", [ASTModel(hugging_face().config), torch.nn.Linear(2, 2), None])
def test_refuses_other_models(model):
    with pytest.raises(TypeError, match="expected transformers' ASTForAudioClassification"):
        SpectrogramTransformer.from_transformers(model)


@settings(max_examples=20, deadline=None)
@given(
    patch=st.tuples(st.integers(2, 6), st.integers(2, 6)),
    stride=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    spare=st.tuples(st.integers(0, 9), st.integers(0, 15)),
    data=st.data(),
)
def test_any_stride_and_keep(patch, stride, spare, data):
    size = (patch[0] + spare[0], patch[1] + spare[1])
    torch.manual_seed(1)
    model = randomize(SpectrogramTransformer(size, patch, stride, embed_dim=8, depth=1, num_heads=2, num_classes=3))
    vit, patches = MaskedViT(model), model.patch_embed.num_patches
    assert vit.patch_grid() == model.patch_embed.grid_size
    keep = torch.tensor([data.draw(st.permutations(range(patches))) for _ in range(2)])
    keep, images = keep[:, : data.draw(st.integers(1, patches))], pictures(model, 2)
    logits, saliency = vit(images, keep, return_saliency=True)
    assert_same(logits, masked_vit_forward(model, images, keep))
    assert_same(saliency, masked_vit_saliency(model, images, keep))
