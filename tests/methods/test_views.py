"""What `observe` records against the plain forward pass, and which rows `on_common_patches` pairs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_vits import full_attention, pictures, tiny

from fastmkd import MaskedViT
from fastmkd.methods.views import Needs, View, observe, on_common_patches
from fastmkd.reference import masked_vit_forward, masked_vit_intermediates

EVERYTHING = Needs(frozenset({0, 2}), frozenset({0, 1, 2}), frozenset({1, 2}), saliency=True, features=True)
KEEP = torch.tensor([[0, 5, 9], [15, 3, 2], [7, 8, 1]])


@pytest.mark.parametrize("keep", [None, KEEP])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2, "qk_norm": True}])
def test_records_what_the_forward_pass_computes(keep, grad, options):
    model, images = tiny(0, depth=3, **options).eval(), pictures()
    prefix = model.num_prefix_tokens
    with torch.set_grad_enabled(grad):
        view = observe(MaskedViT(model), images, keep, EVERYTHING)
    torch.testing.assert_close(view.logits, masked_vit_forward(model, images, keep))
    outputs = masked_vit_intermediates(model, images, keep)
    assert sorted(view.blocks) == [0, 2]
    for i, block in view.blocks.items():
        torch.testing.assert_close(block, outputs[i][:, prefix:])
    for i in range(3):
        logits = full_attention(model, images, i, keep)[:, :, :, prefix:]
        torch.testing.assert_close(view.attention[i], logits[:, :, 0])
        if i:
            mean = logits[:, :, prefix:].softmax(-1).sum((1, 2)) / logits.shape[-1]
            torch.testing.assert_close(view.patch_attention[i], mean)
    torch.testing.assert_close(view.saliency.double(), view.attention[2].softmax(-1).sum(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.head(view.features), view.logits)
    assert (view.grid, view.depth) == ((4, 4), 3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_flow_through_what_was_recorded(checkpointing):
    model, images = tiny(0).train(), pictures()
    model.set_grad_checkpointing(checkpointing)
    view = observe(MaskedViT(model), images, None, Needs(frozenset({0}), frozenset({1})))
    (view.blocks[0].square().sum() + view.attention[1].square().sum()).backward()
    mine = model.blocks[0].attn.qkv.weight.grad.clone()
    model.zero_grad()
    model.set_grad_checkpointing(False)
    by_hand = masked_vit_intermediates(model, images)[0][:, 1:].square().sum()
    (by_hand + full_attention(model, images, 1)[:, :, 0, 1:].square().sum()).backward()
    torch.testing.assert_close(mine, model.blocks[0].attn.qkv.weight.grad)


def test_hooks_are_gone_afterwards_even_after_an_error():
    model = tiny(0).eval()
    with pytest.raises(ValueError, match="images is 8 x 8"):
        observe(MaskedViT(model), pictures(8), None, Needs(frozenset({0}), frozenset({0}), features=True))
    observe(MaskedViT(model), pictures(), None, Needs(frozenset({0}), frozenset({0}), features=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_attention_is_wide_under_autocast():
    model = tiny(0).float()
    with torch.autocast("cpu", torch.bfloat16):
        view = observe(MaskedViT(model), pictures().float(), None, Needs(attention=frozenset({1})))
    assert view.attention[1].dtype == torch.float32
    assert view.attention[1].bfloat16().float().ne(view.attention[1]).any()


def view(grid, keep=None):
    return View((), torch.zeros(()), grid, 1, keep)


def test_rows_are_paired_by_patch():
    whole, keep = torch.arange(2.0 * 16).view(2, 16, 1), torch.tensor([[3, 1], [0, 15]])
    part = torch.zeros(2, 2, 1)
    s, t = on_common_patches(whole, part, view((4, 4)), view((4, 4), keep))  # the teacher was masked
    assert s[..., 0].tolist() == [[3, 1], [16, 31]]
    assert t is part
    s, t = on_common_patches(part, whole, view((4, 4), keep), view((4, 4)))  # the student was masked
    assert t[..., 0].tolist() == [[3, 1], [16, 31]]
    s, t = on_common_patches(whole, 2 * whole, view((4, 4)), view((4, 4)))
    assert torch.equal(2 * s, t)


def test_another_grid_is_resized_first():
    maps = torch.randn(2, 5, 3, 4)
    keep = torch.tensor([[0, 41], [7, 20]])
    s, _ = on_common_patches(maps.flatten(2).mT, torch.zeros(2, 2, 1), view((3, 4)), view((6, 7), keep))
    resized = F.interpolate(maps, (6, 7), mode="bilinear", align_corners=False).flatten(2)
    for b in range(2):
        torch.testing.assert_close(s[b], resized[b][:, keep[b]].T)
