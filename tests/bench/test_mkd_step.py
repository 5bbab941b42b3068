"""The benchmarks of MKD on tiny networks: the eager way and ours agree."""

from __future__ import annotations

import pytest
import torch

from fastmkd.bench.cases import mkd_decoder, mkd_step
from fastmkd.bench.registry import Setting
from fastmkd.bench.verify import Oracle

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
    real = mkd_step.MKD
    small = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 4, "mlp_ratio": 2.0}
    monkeypatch.setattr(mkd_step, "MKD", lambda *args, **options: real(*args, **small, **options))
    case = mkd_step.step_case(setting, student, teacher, kind, 30, *mkd_step.scenes(2, 128, setting))
    oracle = Oracle(case.variants)
    assert all(oracle.judge(variant).ok for variant in case.variants), kind
    assert {variant.name for variant in case.variants} == {"eager", "fastmkd"}
