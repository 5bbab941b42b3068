"""MaskedViT against the oracle (embed all, gather, run all) over timm's VisionTransformer family, in float64."""

from __future__ import annotations

import inspect

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import LayerNorm, SwiGLU, SwiGLUPacked
from timm.models import vision_transformer as timm_vit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    Attention,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from vit_models import (
    assert_same,
    check_gradients,
    check_outputs,
    check_saliency,
    choose,
    pictures,
    randomize,
    rows_of_last_mlp,
)

from fastmkd import MaskedViT
from fastmkd.nn.attention import runs_on_rows
from fastmkd.reference import masked_vit_forward, masked_vit_intermediates, masked_vit_saliency

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}

# Plain pre-norm blocks: the last one runs on rows, and a saliency exists where there is a prefix token.
PLAIN = {
    "vit": {},
    "registers": {"reg_tokens": 4},
    "deit3": {"no_embed_class": True, "init_values": 0.1},
    "deit3_registers": {"no_embed_class": True, "reg_tokens": 2},
    "clip": {"pre_norm": True},
    "average": {"global_pool": "avg"},
    "average_with_prefix": {"global_pool": "avg", "pool_include_prefix": True, "fc_norm": False},
    "average_no_class_token": {"global_pool": "avg", "class_token": False},
    "average_registers_only": {"global_pool": "avg", "class_token": False, "reg_tokens": 2},
    "average_and_max": {"global_pool": "avgmax"},
    "max": {"global_pool": "max"},
    "no_pool": {"global_pool": ""},
    "attention_pool": {"global_pool": "map", "class_token": False},
    "region_pool": {"global_pool": "prr"},
    "token_fc_norm": {"fc_norm": True},
    "no_final_norm": {"final_norm": False},
    "no_head": {"num_classes": 0},
    "qk_norm": {"qk_norm": True},
    "no_qkv_bias": {"qkv_bias": False, "proj_bias": False},
    "scale_norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "swiglu": {"mlp_layer": SwiGLU},
    "swiglu_packed": {"mlp_layer": SwiGLUPacked},
    "no_positions": {"pos_embed": "none"},
    "embed_norm": {"embed_norm_layer": LayerNorm},
    "embed_norm_no_positions": {"embed_norm_layer": LayerNorm, "pos_embed": "none"},
    "rectangular_image": {"img_size": (24, 48)},
    "rectangular_patch": {"patch_size": (4, 8), "img_size": (16, 40)},
    "patch14": {"patch_size": 14, "img_size": 42},
    "one_channel": {"in_chans": 1},
    "dynamic": {"dynamic_img_size": True},
    "depth_one": {"depth": 1},
    "distilled": {"class": VisionTransformerDistilled},
    "distilled_dynamic": {"class": VisionTransformerDistilled, "dynamic_img_size": True},
}
# Other blocks are called whole.
OTHER_BLOCKS = {
    "res_post": {"block_fn": ResPostBlock, "init_values": 0.5},
    "parallel": {"block_fn": ParallelScalingBlock},
    "parallel_things": {"block_fn": ParallelThingsBlock},
    "diff_parallel": {"block_fn": getattr(timm_vit, "DiffParallelScalingBlock", None)},
    "diff_attention": {"attn_layer": "diff"},
}
NO_SALIENCY = {"parallel", "parallel_things", "diff_attention"}
GRADIENTS = {"vit", "registers", "deit3", "clip", "average", "qk_norm", "scale_norms", "distilled"}


def known_to_this_timm(options: dict[str, object]) -> bool:
    """Older timm lacks some of the options; what it has, it has to pass."""
    names = inspect.signature(VisionTransformer).parameters.keys() | {"class"}
    pools = options.get("global_pool") != "prr" or hasattr(timm.layers, "AttentionPoolPrr")
    if options.get("pos_embed") == "none":  # timm 1.0.15 forgets the class token of such a model
        probe = VisionTransformer(img_size=8, patch_size=8, embed_dim=8, depth=1, num_heads=1, pos_embed="none")
        return probe.forward_features(torch.zeros(1, 3, 8, 8)).shape[1] == 2
    return options.keys() <= names and pools and options.get("block_fn", Attention) is not None


PLAIN = {name: options for name, options in PLAIN.items() if known_to_this_timm(options)}
OTHER_BLOCKS = {name: options for name, options in OTHER_BLOCKS.items() if known_to_this_timm(options)}
# Models that people use, made small.
NAMED = {
    "deit_tiny_patch16_224": {"img_size": 64},
    "deit_tiny_distilled_patch16_224": {"img_size": 64},
    "deit3_small_patch16_224": {"img_size": 64},
    "vit_base_patch32_clip_224": {"img_size": 96},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56, "num_classes": 5},
    "vit_base_patch16_siglip_224": {"img_size": 64, "num_classes": 5},
    "vit_medium_patch16_reg4_gap_256": {"img_size": 64},
    "vit_tiny_patch16_224": {"img_size": 64, "global_pool": "avg"},
}


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name in NAMED:
        return randomize(timm.create_model(name, embed_dim=24, depth=2, num_heads=2, **NAMED[name]))
    options = {**TINY, **{**PLAIN, **OTHER_BLOCKS}[name]}
    return randomize(options.pop("class", VisionTransformer)(**options))


@pytest.mark.parametrize("name", [*PLAIN, *OTHER_BLOCKS, *NAMED])
def test_equals_model_and_oracle(name):
    check_outputs(build(name))


@pytest.mark.parametrize("name", [*PLAIN, *NAMED])
def test_saliency_equals_full_attention(name):
    model = build(name)
    if model.num_prefix_tokens > 0:
        check_saliency(model)
        return
    with pytest.raises(ValueError, match="no prefix token"):
        MaskedViT(model)(pictures(model), return_saliency=True)


@pytest.mark.parametrize("name", sorted(GRADIENTS & PLAIN.keys()))
def test_gradients_equal_the_oracle_in_training_mode(name):
    check_gradients(build(name))


def test_last_block_runs_on_rows_only_where_that_is_exact():
    assert all(runs_on_rows(build(name).blocks[-1]) for name in (*PLAIN, "res_post"))
    assert not any(runs_on_rows(build(name).blocks[-1]) for name in OTHER_BLOCKS if name != "res_post")


@pytest.mark.parametrize(
    ("name", "rows"),
    [("vit", 1), ("registers", 1), ("distilled", 2), ("res_post", 1), ("average", 17), ("no_pool", 17)],
)
def test_last_mlp_sees_only_the_rows_that_the_head_reads(name, rows):
    assert rows_of_last_mlp(build(name)) == rows


def test_unfused_attention_with_its_own_scale():
    model = build("vit")
    for block in model.blocks:
        block.attn.fused_attn, block.attn.scale = False, 0.7
    vit, images, keep = MaskedViT(model), pictures(model), choose(3, 16, 5)
    logits, saliency = vit(images, keep, return_saliency=True)
    assert_same(logits, masked_vit_forward(model, images, keep))
    assert_same(saliency, masked_vit_saliency(model, images, keep))


@pytest.mark.skipif("gated" not in inspect.signature(Attention).parameters, reason="timm without gated attention")
def test_gated_attention():
    model = build("vit")
    for block in model.blocks:
        block.attn = randomize(Attention(24, num_heads=2, qkv_bias=True, gated=True))
    vit, images, keep = MaskedViT(model), pictures(model), choose(3, 16, 5)
    assert runs_on_rows(model.blocks[-1])
    assert_same(vit(images, keep), masked_vit_forward(model, images, keep))


@pytest.mark.parametrize("name", ["res_post", "vit"])
def test_saliency_of_a_block_called_whole(name):
    model = build(name)
    calls = []
    model.blocks[-1].register_forward_hook(lambda *_: calls.append(1))
    vit, images = MaskedViT(model), pictures(model)
    logits, saliency = vit(images, return_saliency=True)
    assert calls == [1]
    assert not model.blocks[-1].attn.k_norm._forward_hooks
    assert_same(logits, model(images))
    assert_same(saliency, masked_vit_saliency(model, images))


@pytest.mark.parametrize("name", sorted(NO_SALIENCY & OTHER_BLOCKS.keys()))
def test_saliency_that_cannot_be_had(name):
    model = build(name)
    with pytest.raises(ValueError, match="return_saliency needs"):
        MaskedViT(model)(pictures(model), return_saliency=True)


@pytest.mark.parametrize("name", ["vit", "registers", "average_no_class_token", "parallel", "distilled"])
def test_forward_intermediates(name):
    model = build(name)
    vit, images, keep = MaskedViT(model), pictures(model), choose(3, 16, 6)
    expected = masked_vit_intermediates(model, images, keep)
    for indices, blocks in (([0], [0]), ([-1], [1]), ([1, 0], [0, 1]), (1, [1]), (None, [0, 1])):
        for grad in (True, False):  # without gradients a CPU runs plain blocks in place
            with torch.set_grad_enabled(grad):
                outputs = vit.forward_intermediates(images, indices=indices, keep=keep)
            assert len(outputs) == len(blocks)
            for output, i in zip(outputs, blocks, strict=True):
                assert_same(output, expected[i])
    everything = vit.forward_intermediates(images, indices=[0, 1])
    _, theirs = model.forward_intermediates(images, indices=[0, 1], output_fmt="NLC")  # patches without prefix tokens
    for output, patches in zip(everything, theirs, strict=True):
        assert_same(output[:, model.num_prefix_tokens :], patches)


def test_forward_intermediates_stops_early():
    model = build("vit")
    calls = []
    model.blocks[0].register_forward_hook(lambda *_: calls.append(0))
    model.blocks[1].register_forward_hook(lambda *_: calls.append(1))
    MaskedViT(model).forward_intermediates(pictures(model), indices=[0])
    assert calls == [0]


def test_other_image_sizes():
    model = build("dynamic")
    vit, images = MaskedViT(model), torch.randn(2, 3, 40, 24, dtype=torch.float64)
    assert vit.patch_grid((40, 24)) == (5, 3)
    keep = choose(2, 15, 4)
    assert_same(vit(images), model(images))
    assert_same(vit(images, keep), masked_vit_forward(model, images, keep))


def test_padded_images():
    torch.manual_seed(0)
    model = randomize(VisionTransformer(**TINY, dynamic_img_size=True, dynamic_img_pad=True))
    vit, images = MaskedViT(model), torch.randn(2, 3, 37, 20, dtype=torch.float64)
    assert vit.patch_grid((37, 20)) == (5, 3)
    keep = choose(2, 15, 7)
    assert_same(vit(images, keep), masked_vit_forward(model, images, keep))


def test_overlapping_patches():
    """AST cuts patches with a stride smaller than the patch."""
    model = build("vit")
    model.patch_embed.proj.stride = (6, 4)
    vit, images = MaskedViT(model), pictures(model)
    assert vit.patch_grid((32, 32)) == (5, 7)
    model.pos_embed = torch.nn.Parameter(torch.randn(1, 36, 24, dtype=torch.float64))
    keep = choose(3, 35, 9)
    assert_same(vit(images, keep), masked_vit_forward(model, images, keep))


def test_order_of_kept_patches_does_not_matter():
    model = build("vit")
    vit, images, keep = MaskedViT(model), pictures(model), choose(3, 16, 8)
    order = torch.randperm(8)
    logits, saliency = vit(images, keep, return_saliency=True)
    permuted, moved = vit(images, keep[:, order], return_saliency=True)
    assert_same(permuted, logits)
    assert_same(moved, saliency[:, order])


def test_hidden_pixels_are_not_read():
    model = build("vit")
    vit, images = MaskedViT(model), pictures(model, 1)
    keep = torch.tensor([[0, 5, 15]])
    poisoned = torch.full_like(images, float("nan"))
    for i in keep[0].tolist():
        y, x = divmod(i, 4)
        poisoned[..., 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = images[..., 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
    assert_same(vit(poisoned, keep), vit(images, keep))


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    patch=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    registers=st.integers(0, 3),
    no_embed_class=st.booleans(),
    data=st.data(),
)
def test_any_shape(batch, grid, patch, registers, no_embed_class, data):
    k = data.draw(st.integers(1, grid[0] * grid[1]))
    torch.manual_seed(k)
    model = randomize(
        VisionTransformer(
            img_size=(grid[0] * patch[0], grid[1] * patch[1]),
            patch_size=patch,
            embed_dim=8,
            depth=2,
            num_heads=2,
            num_classes=3,
            reg_tokens=registers,
            no_embed_class=no_embed_class,
        )
    )
    vit, images, keep = MaskedViT(model), pictures(model, batch), choose(batch, grid[0] * grid[1], k)
    assert vit.patch_grid() == grid
    with torch.inference_mode(data.draw(st.booleans())):
        logits, saliency = vit(images, keep, return_saliency=True)
    assert_same(logits, masked_vit_forward(model, images, keep))
    assert_same(saliency, masked_vit_saliency(model, images, keep))
