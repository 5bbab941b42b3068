"""Methods on the meta device, on which shapes and costs are learned: it has no autocast to ask or to switch off."""

from __future__ import annotations

import pytest
import torch
from dpk_networks import cnn, make
from tiny_vits import tiny

from fastmkd import MaskedKD
from fastmkd.methods import FeatureKD
from fastmkd.nn import MergedViT

LAYERS = {"last": "last"}


def crd(**options) -> FeatureKD:
    return FeatureKD(cnn(0), cnn(1, channels=6), "crd", LAYERS, image_size=24, train_labels=[0, 4, 2], **options)


MAKERS = {
    "dpk": lambda: make(),
    "crd": crd,
    "teacher in float32": lambda: crd(teacher_dtype=torch.float32),
    "teacher in bfloat16": lambda: crd(teacher_dtype=torch.bfloat16),
    "manifold": lambda: MaskedKD(tiny(0, img_size=24), tiny(1, img_size=24), base="manifold"),
    "attention": lambda: MaskedKD(tiny(0, img_size=24), tiny(1, img_size=24), base="attention"),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_step_on_meta(name):
    method = MAKERS[name]().double().to("meta")
    images = torch.zeros(3, 3, 24, 24, device="meta", dtype=torch.float64)
    targets = torch.zeros(3, dtype=torch.int64, device="meta")
    out = method(images, targets, **({"numbers": targets} if isinstance(method, FeatureKD) else {}))
    out.loss.backward()
    assert out.loss.shape == ()
    assert all(p.grad is not None for p in method.student.parameters())


def test_merged_tokens_on_meta():
    vit = tiny(0, depth=3).to("meta")
    assert MergedViT(vit, 2)(torch.zeros(2, 3, 32, 32, device="meta", dtype=torch.float64)).shape == (2, 5)
