"""The benchmarks of MKD on tiny networks: ways that compute the same agree, and the baseline multiplies by the mask."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.overrides import TorchFunctionMode

from fastmkd import random_mask
from fastmkd.bench.cases import mkd_decoder, mkd_step
from fastmkd.bench.multiplied import Multiplied
from fastmkd.bench.registry import Setting
from fastmkd.bench.verify import Oracle
from fastmkd.nn.cifar import ResNet
from fastmkd.reference import dense_twin

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("part", mkd_decoder.PARTS)
def test_both_ways_of_the_decoders_agree(part: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = mkd_decoder.make_heads
    small = {"width": 16, "depth": 1, "heads": 2, "mlp_ratio": 2.0}
    monkeypatch.setattr(mkd_decoder, "make_heads", lambda sides, channels: real(sides, channels, **small))
    monkeypatch.setattr(mkd_decoder, "CHANNELS", 8)
    monkeypatch.setattr(mkd_decoder, "GRID", 4)
    monkeypatch.setattr(mkd_decoder, "SIDES", (16, 8, 4, 2, 1))
    case = mkd_decoder.mkd_decoder(Setting(CPU, dtype, quick=True), part)
    oracle = Oracle(case.variants)
    assert [variant.name for variant in case.variants] == ["eager", "fastmkd"]
    assert all(oracle.judge(variant).ok for variant in case.variants), part


@pytest.mark.parametrize("kind", mkd_step.KINDS)
def test_both_ways_of_the_step_agree(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.setattr(mkd_step, "SIDE", 128)
    setting = Setting(CPU, "fp32", quick=True)
    student, teacher = mkd_step.networks(setting, ("resnet18", "resnet18"), out_channels=32)
    small = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 4, "mlp_ratio": 2.0}
    case = mkd_step.step_case(setting, student, teacher, kind, 30, *mkd_step.scenes(2, 128, setting), **small)
    assert [variant.name for variant in case.variants] == ["plain, unmasked", "multiplied", "dense twin", "fastmkd"]
    assert case.baseline == "multiplied"
    assert [v.name for v in case.variants if v.answer.exact is not None] == ["dense twin", "fastmkd"]
    oracle = Oracle(case.variants)
    assert all(oracle.judge(variant).ok for variant in case.variants), kind


def test_the_baseline_multiplies_and_leaves_batch_norm_to_pytorch() -> None:
    torch.manual_seed(0)
    network = ResNet(8, num_classes=3).double()
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.uniform_(-1, 1)
            layer.bias.data.uniform_(-1, 1)
    images, visible = torch.randn(2, 3, 32, 32, dtype=torch.float64), random_mask(2, (4, 4), 0.5)
    multiplied, maps = Multiplied(copy.deepcopy(network)), []
    multiplied.network.layer3.register_forward_hook(lambda _, inputs, out: maps.append(out))
    multiplied.eval()(images, visible)
    twin = dense_twin(network).eval().forward_features(images, visible)
    seen = visible.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    torch.testing.assert_close(maps[0] * seen, twin)  # no layer saw what is hidden

    called: list[str] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            called.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Watch():
        multiplied.train()(images, visible)
    assert "batch_norm" in called
    assert not {"index_select", "index_copy", "nonzero"} & set(called)
