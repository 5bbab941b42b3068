"""The masked encoder of MKD on networks of every build: what it hides, and what size its maps have."""

from __future__ import annotations

import pytest
import torch

from fastmkd.methods.mkd_masking import MaskedBackbone
from fastmkd.nn.detectors import build_detector
from fastmkd.reference.dense import upsampled


@pytest.mark.parametrize("name", ["mobilenetv2_035", "mobilenetv3_small_050"])
def test_small_cells_stay_small_until_a_block_is_too_coarse_for_them(name):
    """A network that returns a list, as EfficientNetFeatures, is no block: its maps up to stride 16 know such cells."""
    torch.manual_seed(0)
    body = build_detector("retinanet", f"timm.{name}", num_classes=3, image_size=(64, 96)).backbone.body.eval()
    images, visible = torch.randn(2, 3, 64, 96, requires_grad=True), torch.rand(2, 4, 6) > 0.4
    with MaskedBackbone(body, 16, 32).masking(lambda *_: (visible, int(visible.sum()))):
        eighth, sixteenth, last = body(images).values()
    assert [x.shape[2] for x in (eighth, sixteenth, last)] == [8, 4, 2]
    assert torch.equal(sixteenth.abs().sum(1) > 0, visible)
    (eighth * torch.randn_like(eighth)).sum().backward()
    assert torch.equal(images.grad.abs().sum(1) > 0, upsampled(visible, (64, 96)))
