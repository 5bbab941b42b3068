"""MaskedViT over timm's CaiT: patch blocks without a CLS token, then class attention."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.cait import Cait
from torch import nn
from vit_models import (
    assert_same,
    check_gradients,
    check_intermediates,
    check_outputs,
    check_saliency,
    choose,
    gradients,
    pictures,
    randomize,
)

from fastmkd import MaskedKD, MaskedViT
from fastmkd.reference import masked_vit_forward, masked_vit_intermediates, masked_vit_saliency

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
MODELS = {
    "cait": {},
    "one_class_block": {"depth_token_only": 1},
    "average": {"global_pool": "avg"},
    "no_pool": {"global_pool": ""},
    "no_bias": {"qkv_bias": False},
    "one_patch_block": {"depth": 1},
    "rectangular": {"img_size": (16, 40)},
    "no_head": {"num_classes": 0},
}


def build(name: str = "cait", **more: object) -> Cait:
    torch.manual_seed(0)
    return randomize(Cait(**{**TINY, **MODELS[name], **more}))


@pytest.mark.parametrize("name", MODELS)
def test_equals_model_and_oracle(name):
    check_outputs(build(name))


@pytest.mark.parametrize("name", MODELS)
def test_saliency_equals_explicit_class_attention(name):
    check_saliency(build(name))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_the_oracle_in_training_mode(name):
    check_gradients(build(name))


def test_forward_intermediates_hold_patches_alone():
    model = build()
    check_intermediates(model)
    outputs = MaskedViT(model).forward_intermediates(pictures(model), [0, 1], keep=choose(3, 16, 6))
    assert [tuple(out.shape) for out in outputs] == [(3, 6, 24)] * 2


def test_unfused_class_attention_with_its_own_scale():
    model = build()
    for block in model.blocks_token_only:
        block.attn.fused_attn, block.attn.scale = False, 0.7
    check_saliency(model)


def test_a_head_that_reads_the_class_token_normalises_it_alone():
    model, seen = build(), []
    model.norm.register_forward_pre_hook(lambda _module, args: seen.append(args[0].shape[1]))
    MaskedViT(model)(pictures(model))
    assert seen == [1]


def test_hooks_see_whole_blocks_once():
    model, seen = build(), []
    for block in (*model.blocks, *model.blocks_token_only):
        block.register_forward_hook(lambda _module, args, _out: seen.append(args[0].shape[1]))
    MaskedViT(model)(pictures(model), choose(3, 16, 6), return_saliency=True)
    assert seen == [6] * 4


def test_pruned_model_gives_patches():
    model = build()
    model.prune_intermediate_layers([0])
    vit, images, keep = MaskedViT(model), pictures(model), choose(3, 16, 6)
    assert_same(vit(images, keep), model.norm(masked_vit_intermediates(model, images, keep)[0]))
    with pytest.raises(ValueError, match="no prefix token"):
        vit(images, return_saliency=True)


def test_saliency_needs_class_attention():
    model = build(depth_token_only=0)
    vit, images, keep = MaskedViT(model), pictures(model), choose(3, 16, 6)
    assert_same(vit(images, keep), masked_vit_forward(model, images, keep))
    with pytest.raises(ValueError, match="ClassAttn"):
        vit(images, return_saliency=True)
    other = build()
    other.blocks_token_only[-1].attn = nn.Identity()
    with pytest.raises(ValueError, match="Identity"):
        MaskedViT(other)(images, return_saliency=True)


def test_gradient_checkpointing():
    model = build().train()
    vit, images, keep = MaskedViT(model), pictures(model), choose(3, 16, 6)
    expected = gradients(model, vit(images, keep))
    model.set_grad_checkpointing()
    for a, b in zip(gradients(model, vit(images, keep)), expected, strict=True):
        assert_same(a, b)


def test_drop_path_is_drawn_as_in_the_model():
    model = build(drop_path_rate=0.5).train()
    images = pictures(model)
    torch.manual_seed(7)
    mine = MaskedViT(model)(images)
    torch.manual_seed(7)
    assert_same(mine, model(images))


def test_compiles_without_a_break():
    vit = MaskedViT(build())
    images, keep = pictures(vit.model), choose(3, 16, 6)
    compiled = torch.compile(vit, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(
        compiled(images, keep, return_saliency=True), vit(images, keep, return_saliency=True), strict=True
    ):
        assert_same(mine, theirs)


def test_state_dict_and_copies():
    model = build()
    vit = MaskedViT(model)
    assert list(vit.state_dict()) == list(model.state_dict())
    twin = copy.deepcopy(vit)
    images = pictures(model)
    assert torch.equal(twin(images), vit(images))


def test_teaches_and_learns():
    """CaiT as teacher and as student: the CLS query that ranks patches comes from its last class attention."""
    torch.manual_seed(0)
    small = {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 4}
    cait, deit = (timm.create_model(name, **small) for name in ("cait_xxs24_224", "deit_tiny_patch16_224"))
    for student, teacher in ((copy.deepcopy(cait), deit), (copy.deepcopy(deit), cait)):
        out = MaskedKD(student, teacher, keep_ratio=0.5)(torch.randn(2, 3, 64, 64), torch.tensor([1, 3]))
        out.loss.backward()
        assert student.patch_embed.proj.weight.grad.abs().max() > 0


@settings(max_examples=20, deadline=None)
@given(grid=st.tuples(st.integers(1, 4), st.integers(1, 5)), pool=st.sampled_from(["token", "avg"]), data=st.data())
def test_any_keep(grid, pool, data):
    patches = grid[0] * grid[1]
    orders = [data.draw(st.permutations(range(patches))) for _ in range(2)]
    keep = torch.tensor(orders)[:, : data.draw(st.integers(1, patches))]
    model = build(img_size=(grid[0] * 8, grid[1] * 8), global_pool=pool)
    vit, images = MaskedViT(model), pictures(model, 2)
    logits, saliency = vit(images, keep, return_saliency=True)
    assert_same(logits, masked_vit_forward(model, images, keep))
    assert_same(saliency, masked_vit_saliency(model, images, keep))
