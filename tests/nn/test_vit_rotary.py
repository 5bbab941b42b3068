"""MaskedViT over timm's Eva: EVA-02, DINOv3, RoPE-ViT, Perception Encoder, Sapiens 2; rotary positions of all kinds."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.eva import Eva
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
    rows_of_last_mlp,
)

from fastmkd import MaskedViT
from fastmkd.nn.attention import runs_on_rows
from fastmkd.nn.rotary import rotary_table, rotations
from fastmkd.reference import masked_vit_forward, masked_vit_intermediates, masked_vit_saliency

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
ROPE = {"use_rot_pos_emb": True}
TOKEN = {**ROPE, "global_pool": "token"}

MODELS = {
    "eva": {},
    "eva02": {**ROPE, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True, "qkv_fused": False},
    "eva02_fused": {**ROPE, "swiglu_mlp": True},
    "token": TOKEN,
    "no_bias": {**TOKEN, "qkv_bias": False},
    "no_absolute_positions": {**TOKEN, "use_abs_pos_emb": False, "no_embed_class": True},
    "dinov3": {
        **TOKEN,
        "rope_type": "dinov3",
        "use_abs_pos_emb": False,
        "num_reg_tokens": 4,
        "rope_rotate_half": True,
        "init_values": 0.1,
        "qkv_bias": False,
    },
    "dinov3_swiglu": {**TOKEN, "rope_type": "dinov3", "swiglu_mlp": True, "swiglu_align_to": 8},
    "mixed": {**TOKEN, "rope_type": "mixed", "attn_type": "rope"},
    "mixed_average": {**ROPE, "rope_type": "mixed", "attn_type": "rope"},
    "attention_rope": {**TOKEN, "attn_type": "rope", "qkv_fused": False},
    "qk_norm": {**TOKEN, "qk_norm": True},
    "grouped": {**TOKEN, "attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1, "qk_norm": True},
    "attention_layer_scale_only": {**TOKEN, "init_values": 0.1, "attn_only_layer_scale": True},
    "post_norm": {**TOKEN, "use_post_norm": True},
    "pre_transformer_norm": {**TOKEN, "use_pre_transformer_norm": True},
    "attention_pool": {**ROPE, "global_pool": "map", "class_token": False},
    "attention_pool_with_token": {**ROPE, "global_pool": "map"},
    "xy_offset": {**TOKEN, "rope_grid_indexing": "xy", "rope_grid_offset": 1.0, "ref_feat_shape": (8, 8)},
    "rectangular": {**TOKEN, "img_size": (16, 40), "rope_grid_indexing": "xy"},
    "dynamic": {**TOKEN, "dynamic_img_size": True},
    "dynamic_mixed": {**TOKEN, "dynamic_img_size": True, "rope_type": "mixed", "attn_type": "rope"},
}
KNOWN = inspect.signature(Eva).parameters.keys()
MODELS = {name: options for name, options in MODELS.items() if options.keys() <= KNOWN}  # older timm has fewer


def build(name: str, **more: object) -> Eva:
    torch.manual_seed(0)
    return randomize(Eva(**{**TINY, **MODELS[name], **more}))


@pytest.mark.parametrize("name", MODELS)
def test_equals_model_and_oracle(name):
    check_outputs(build(name))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "attention_pool"])
def test_saliency_equals_full_attention(name):
    check_saliency(build(name))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_the_oracle_in_training_mode(name):
    check_gradients(build(name))


@pytest.mark.parametrize("name", ["eva02", "dinov3", "mixed", "attention_pool"])
def test_forward_intermediates(name):
    check_intermediates(build(name))


@pytest.mark.parametrize("name", MODELS)
def test_last_block_computes_what_the_head_reads(name):
    model = build(name)
    reads_token = MODELS[name].get("global_pool") == "token"
    every_token = model.num_prefix_tokens + model.patch_embed.num_patches
    assert runs_on_rows(model.blocks[-1])
    assert rows_of_last_mlp(model) == (1 if reads_token else every_token)


@pytest.mark.parametrize("name", ["token", "dinov3", "mixed", "grouped", "post_norm"])
def test_equals_hiding_patches_from_every_attention(name):
    """No gather at all: the whole model runs, and an attention mask hides the other patches from every token."""
    model = build(name)
    images, keep, prefix = pictures(model), choose(3, 16, 7), model.num_prefix_tokens
    seen = torch.zeros(3, prefix + 16, dtype=torch.bool)
    seen[:, :prefix] = True
    seen.scatter_(1, keep + prefix, True)
    expected = model(images, attn_mask=seen[:, None, None].expand(-1, 1, prefix + 16, -1))
    assert_same(MaskedViT(model)(images, keep), expected)


@pytest.mark.parametrize("name", ["eva02", "dinov3", "mixed", "grouped", "post_norm"])
def test_saliency_equals_what_the_model_s_own_attention_gets(name, monkeypatch):
    """Queries and keys as they enter the fused attention of timm's own last block."""
    model = build(name)
    images, calls, fused = pictures(model), [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, *a, **o: calls.append((q, k)) or fused(q, k, *a, **o)
    )
    model(images)
    monkeypatch.undo()
    q, k = calls[-1]
    expected = (q[:, :, :1] @ k.mT * q.shape[-1] ** -0.5)[:, :, 0, model.num_prefix_tokens :].softmax(-1).sum(1)
    for hooked in (False, True):  # a hook on the last block has it called whole
        handle = model.blocks[-1].register_forward_hook(lambda *_: None) if hooked else None
        logits, saliency = MaskedViT(model)(images, return_saliency=True)
        assert_same(saliency, expected)
        assert_same(logits, model(images))
        if handle is not None:
            handle.remove()


@pytest.mark.parametrize("name", ["token", "mixed"])
def test_unfused_attention_with_its_own_scale(name):
    model = build(name)
    for block in model.blocks:
        block.attn.fused_attn, block.attn.scale = False, 0.7
    vit, images, keep = MaskedViT(model), pictures(model), choose(3, 16, 5)
    logits, saliency = vit(images, keep, return_saliency=True)
    assert_same(logits, masked_vit_forward(model, images, keep))
    assert_same(saliency, masked_vit_saliency(model, images, keep))


@pytest.mark.parametrize("name", ["dynamic", "dynamic_mixed"])
def test_other_image_sizes(name):
    model = build(name)
    vit, images = MaskedViT(model), torch.randn(2, 3, 40, 24, dtype=torch.float64)
    assert vit.patch_grid((40, 24)) == (5, 3)
    keep = choose(2, 15, 4)
    assert_same(vit(images), model(images))
    assert_same(vit(images, keep), masked_vit_forward(model, images, keep))


@pytest.mark.parametrize("name", ["token", "mixed"])
def test_patch_dropout_takes_the_angles_along(name):
    """Dropped in training, a patch leaves with its angles, also after others were left out by keep."""
    model = build(name, patch_drop_rate=0.5).train()
    vit, images = MaskedViT(model), pictures(model)
    torch.manual_seed(3)
    expected = model(images)
    torch.manual_seed(3)
    assert_same(vit(images), expected)
    keep = choose(3, 16, 8)
    torch.manual_seed(3)
    dropped = torch.randn(3, 8).argsort(1)[:, :4]  # as timm draws them
    torch.manual_seed(3)
    mine = vit(images, keep)
    assert_same(mine, masked_vit_forward(build(name), images, keep.gather(1, dropped)))
    with pytest.raises(ValueError, match="patch_drop_rate"):
        vit(images, return_saliency=True)


@pytest.mark.skipif("rope_shift_coords" not in KNOWN, reason="timm without augmented coordinates")
@pytest.mark.parametrize("kind", ["dinov3", "cat", "mixed"])
def test_augmented_coordinates_are_drawn_once_for_all_patches(kind):
    attn_type = "rope" if kind == "mixed" else "eva"
    model = build("token", rope_type=kind, attn_type=attn_type, rope_shift_coords=0.5, rope_rescale_coords=2.0).train()
    vit, images, keep = MaskedViT(model), pictures(model), choose(3, 16, 6)
    torch.manual_seed(5)
    expected = masked_vit_forward(model, images, keep)
    torch.manual_seed(5)
    assert_same(vit(images, keep), expected)
    assert not torch.equal(vit(images, keep), expected)


@pytest.mark.parametrize("name", ["dinov3", "mixed"])
def test_gradient_checkpointing(name):
    model = build(name).train()
    vit, images, keep = MaskedViT(model), pictures(model), choose(3, 16, 6)
    expected = gradients(model, vit(images, keep))
    model.set_grad_checkpointing()
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    mine = gradients(model, vit(images, keep))
    assert len(calls) == 2  # once forward, once again in backward
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # learnt angles are float32


@pytest.mark.parametrize("name", ["mixed", "post_norm"])
def test_compiles_without_a_break(name):
    vit = MaskedViT(build(name))
    images, keep = pictures(vit.model), choose(3, 16, 6)
    compiled = torch.compile(vit, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(
        compiled(images, keep, return_saliency=True), vit(images, keep, return_saliency=True), strict=True
    ):
        assert_same(mine, theirs)


def test_rotations_are_those_of_the_kept_patches():
    model = build("mixed")
    table, keep = rotary_table(model, (4, 4)), torch.tensor([[3, 0], [15, 7]])
    assert table.shape[:3] == (2, 2, 16)  # depth, heads, patches
    for angles, of_block in zip(rotations(table, keep), table, strict=True):
        for image in range(2):
            assert torch.equal(angles[image], of_block[:, keep[image]])


@settings(max_examples=20, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    kind=st.sampled_from(["cat", "dinov3", "mixed"]),
    registers=st.integers(0, 2),
    absolute=st.booleans(),
    data=st.data(),
)
def test_any_keep(grid, kind, registers, absolute, data):
    patches = grid[0] * grid[1]
    keep = torch.tensor(
        [data.draw(st.permutations(range(patches))) for _ in range(2)],
    )[:, : data.draw(st.integers(1, patches))]
    torch.manual_seed(patches)
    model = randomize(
        Eva(
            img_size=(grid[0] * 4, grid[1] * 3),
            patch_size=(4, 3),
            embed_dim=16,
            depth=2,
            num_heads=2,
            num_classes=3,
            global_pool="token",
            use_rot_pos_emb=True,
            rope_type=kind,
            attn_type="rope" if kind == "mixed" else "eva",
            num_reg_tokens=registers,
            use_abs_pos_emb=absolute,
        )
    )
    vit, images = MaskedViT(model), pictures(model, 2)
    with torch.inference_mode(data.draw(st.booleans())):
        logits, saliency = vit(images, keep, return_saliency=True)
    assert_same(logits, masked_vit_forward(model, images, keep))
    assert_same(saliency, masked_vit_saliency(model, images, keep))
    last = vit.forward_intermediates(images, 1, keep=keep)[0]
    assert_same(last, masked_vit_intermediates(model, images, keep)[-1])


def test_state_dict_is_the_model_s():
    model = build("dinov3")
    vit = MaskedViT(model)
    assert list(vit.state_dict()) == list(model.state_dict())
    other = copy.deepcopy(vit)
    other.load_state_dict(vit.state_dict(), strict=True)
