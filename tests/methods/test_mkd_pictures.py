"""What MKD shows: the panels against what the networks gave."""

from __future__ import annotations

import pytest
import torch
from dense_nets import SMALL, Segmenter, batch, detector, teacher_of

import fastmkd
from fastmkd.methods.dense_pictures import stretch
from fastmkd.methods.mkd_decoder import AdaptiveDecoder

TITLES = [
    "input", "masked input", "teacher features", "student features", "restored features", "distance to teacher",
    "decoder attention",
]  # fmt: skip


def test_panels_of_a_detector():
    method, (images, _) = fastmkd.MKD(detector(), teacher_of(), mask_ratio=0.3, **SMALL), batch()
    panels = method.pictures(images)
    assert [panel.title for panel in panels] == TITLES
    by_title = {panel.title: panel.image for panel in panels}
    whole, seen = by_title["input"], by_title["masked input"]
    torch.testing.assert_close(whole[0, :, :96, :80], images[0], rtol=1e-4, atol=1e-5)
    assert (panels[1].kind, seen.shape) == ("mask", (2, 96, 96))
    cells = (seen == 0).unflatten(2, (3, 32)).unflatten(1, (3, 32)).all(4).all(2)  # (B, 3, 3)
    assert cells.flatten(1).sum(1).tolist() == [3, 3]
    hidden = cells.repeat_interleave(32, 1).repeat_interleave(32, 2)
    assert torch.equal(seen, (~hidden).float())
    assert not by_title["distance to teacher"][hidden].any()
    for panel in panels[2:]:
        assert panel.image.shape == (2, 96, 96)
        assert panel.kind == "heat"
        assert panel.image.min() == 0
        assert torch.equal(panel.image.amax((1, 2)), torch.ones(2))
    batched = method.student.transform(images)[0].tensors
    level = method.teacher.backbone(batched)["0"].abs().mean(1)
    torch.testing.assert_close(by_title["teacher features"][:, ::8, ::8], stretch(level))
    assert method.student.training
    assert method.student.backbone.training


def test_padding_that_no_image_needs_is_not_shown():
    method = fastmkd.MKD(detector(), teacher_of(), mask_ratio=0.3, **SMALL)
    image = torch.rand(3, 96, 70)  # padded to 96 x 96
    panels = method.pictures([image])
    assert all(panel.image.shape[-2:] == (96, 70) for panel in panels)
    torch.testing.assert_close(panels[0].image[0], image, rtol=1e-4, atol=1e-5)
    assert all(panel.image.max() == 1 for panel in panels[2:])  # what was cut off does not count


def test_other_levels_and_networks():
    method = fastmkd.MKD(detector(), teacher_of(), mask_ratio=0.3, **SMALL)
    assert len(method.pictures(batch()[0], level="backbone.fpn:p7")) == 7
    with pytest.raises(ValueError, match=r"level is 'p7'; this method has backbone.fpn:0"):
        method.pictures(batch()[0], level="p7")
    segmenter = fastmkd.MKD(Segmenter(), Segmenter(seed=1), mask_ratio=0.25, weight=0.0, global_weight=0.0)
    images = torch.rand(2, 3, 72, 64)
    panels = segmenter.pictures(images)
    assert [panel.title for panel in panels] == TITLES[:4]
    assert torch.equal(panels[0].image, images)


def test_attention_is_that_of_the_last_block():
    torch.manual_seed(0)
    decoder = AdaptiveDecoder(4, 4, 1, width=8, depth=2, heads=2)
    level, visible = torch.randn(2, 4, 3, 3), torch.rand(2, 3, 3) > 0.3
    attention, attn = decoder.attention(level, visible), decoder.blocks[1].attn
    assert torch.allclose(attention.sum(2), torch.ones(2, 9))
    given = []
    attn.register_forward_pre_hook(lambda _m, args: given.append(args[0]))
    attn.register_forward_hook(lambda _m, _a, out: given.append(out))
    decoder(level, visible)
    query, key, value = attn.qkv(given[0]).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    mixed = (query @ key.mT / 2).softmax(-1)  # heads of 4: a scale of 1 / 2
    torch.testing.assert_close(attn.proj((mixed @ value).transpose(1, 2).flatten(2)), given[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attention, mixed.mean(1))
