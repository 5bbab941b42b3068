"""The benchmark of a DMAE step on tiny networks: the public code's way and ours agree."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from fastmkd.bench.cases import dmae_step
from fastmkd.bench.registry import Setting
from fastmkd.bench.targets import TARGETS
from fastmkd.bench.verify import Oracle

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    def vit(name: str, setting: Setting) -> nn.Module:
        torch.manual_seed(len(name))
        width = {"ViT-S": 24, "ViT-B": 32}[name]
        return timm.create_model("vit_tiny_patch16_224", depth=4, embed_dim=width, num_heads=2, num_classes=0).eval()

    monkeypatch.setattr(dmae_step, "vit", vit)
    monkeypatch.setattr(dmae_step, "DECODER", {"width": 32, "depth": 2, "num_heads": 4})
    real = dmae_step.DMAE
    small = {"decoder_width": 32, "decoder_depth": 2, "decoder_heads": 4}
    monkeypatch.setattr(dmae_step, "DMAE", lambda *args, **options: real(*args, **small, **options))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("percent", [75, 95])
def test_all_ways_agree(dtype: str, percent: int) -> None:
    setting = Setting(CPU, dtype, quick=True)
    for build in (dmae_step.dmae_step, dmae_step.dmae_teacher):
        case = build(setting, "ViT-S", "ViT-B", percent, 2)
        oracle = Oracle(case.variants)
        assert all(oracle.judge(variant).ok for variant in case.variants), case.panel
        assert {"public code", "fastmkd"} <= {variant.name for variant in case.variants}


def test_targets_are_measured() -> None:
    """Every panel, label and variant that a target names is one that the benchmarks make."""
    mine = [target for target in TARGETS if target.benchmark.startswith("dmae_")]
    assert len(mine) == 14  # five of them for both batches of a CPU
    made = {True: set(), False: set()}  # of a GPU and of a CPU
    for gpu, found in made.items():
        setting = SimpleNamespace(quick=False, on_gpu=gpu)
        grid = dmae_step._grid(setting)  # type: ignore[arg-type]
        found |= {(g["student"], g["teacher"], f"{g['percent']} % hidden", g["batch"]) for g in grid}
    for target in mine:
        panels = {
            "dmae_step": [(f"{s} from {t}, batch {b}", label) for s, t, label, b in made[target.gpu]],
            "dmae_teacher": [(f"{t}, layer 18, batch {b}", label) for _, t, label, b in made[target.gpu]],
        }[target.benchmark]
        assert any(panel.startswith(target.panel) and label == target.label for panel, label in panels), target.sentence
    case = dmae_step.dmae_step(Setting(CPU, "fp32"), "ViT-S", "ViT-B", 75, 2)
    names = {variant.name for variant in case.variants}
    steps = [target for target in mine if not target.gpu and target.benchmark == "dmae_step"]
    assert {name for target in steps for name in (target.variant, target.against or "fastmkd")} <= names


def test_the_count_is_the_papers() -> None:
    """ViT-L at 75 %: 20.8 G multiply-adds for all of it and the decoder, 11.5 for what is needed."""
    with torch.device("meta"):
        model = timm.create_model("vit_large_patch16_224", num_classes=0)
    needed = dmae_step.teacher_flops(model, 1, 49, 18) / 2e9
    assert needed == pytest.approx(11.5, abs=0.05)
    embed = (196 - 49) * 768 * 1024 / 1e9
    decoder = (50 * 1024 * 512 + 196 * 512 * 768 + dmae_step.block_macs(512, 8, 197)) / 1e9
    every = embed + decoder + dmae_step.teacher_flops(model, 1, 49, 24) / 2e9
    assert every == pytest.approx(20.8, abs=0.15)
