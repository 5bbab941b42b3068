"""The benchmark of a MaskedKD step on tiny networks: its ways agree, and its targets name ways that it has."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from fastmkd.bench.cases import maskedkd_step
from fastmkd.bench.registry import Case, Setting
from fastmkd.bench.targets import TARGETS
from fastmkd.bench.verify import Oracle

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    def vit(name: str, setting: Setting) -> nn.Module:
        torch.manual_seed(len(name))
        return timm.create_model("deit_tiny_patch16_224", depth=1, embed_dim=24, num_heads=2).eval()

    monkeypatch.setattr(maskedkd_step, "vit", vit)


def case_of(setting: Setting) -> Case:
    return maskedkd_step.maskedkd_step(setting, "DeiT-S", "DeiT-B", 50)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_all_ways_agree(dtype: str) -> None:
    case = case_of(Setting(CPU, dtype, quick=True))
    names = ["full distillation", "student alone", "public code", "fastmkd", "apart"]
    assert [v.name for v in case.variants] == names + ["fastmkd, teacher in bf16"] * (dtype == "fp32")
    oracle = Oracle(case.variants)
    assert all(oracle.judge(variant).ok for variant in case.variants)


def test_targets_name_what_the_benchmark_has() -> None:
    mine = [t for t in TARGETS if t.benchmark == "maskedkd_step"]
    assert len(mine) == len({t.sentence for t in mine}) == 4
    for target in mine:
        case = case_of(Setting(CPU, target.dtype))
        assert {target.variant, target.against or case.baseline} <= {v.name for v in case.variants}
        assert case.label == target.label
        assert case.panel.startswith(target.panel.removesuffix("256") if target.gpu else target.panel)


def test_a_quick_run_on_a_gpu_takes_the_pair_of_its_target() -> None:
    pairs = [(p["student"], p["teacher"]) for p in maskedkd_step._grid(Setting(torch.device("cuda"), quick=True))]
    assert pairs == [("DeiT-S", "DeiT-B")]
