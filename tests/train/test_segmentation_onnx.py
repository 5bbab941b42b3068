"""Segmenters as ONNX files say what the network says, for other batch sizes than the one that was traced."""

from __future__ import annotations

import pytest
import torch

from fastmkd.nn.segmenters import build_segmenter
from fastmkd.train.export import export_onnx

TINY = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "psp_out_channels": 16}


def test_onnx_computes_what_the_segmenter_does(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = build_segmenter("pspnet", "tu-resnet18", num_classes=5, **TINY).eval()
    data = {"task": "segmentation", "channels": 3, "image_size": 72}  # no multiple of the encoder's stride
    export_onnx(model, {"data": data}, tmp_path / "bare.onnx")
    images = torch.randn(3, 3, 72, 72)
    (logits,) = onnxruntime.InferenceSession(tmp_path / "bare.onnx").run(None, {"images": images.numpy()})
    assert logits.shape == (3, 5, 72, 72)
    torch.testing.assert_close(torch.from_numpy(logits), model(images).detach(), rtol=1e-3, atol=1e-4)
