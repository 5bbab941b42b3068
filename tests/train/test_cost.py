"""Multiply-adds against the paper's table, against a count of what really runs, and against mistakes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastmkd.nn import MaskedViT, MergedViT
from fastmkd.nn.merge_cost import merged_macs
from fastmkd.train.cost import main, vit_macs


@pytest.mark.parametrize(
    ("name", "options", "full", "masked"),
    [
        ("deit_small_patch16_224", {}, 4.5, 2.2),
        ("deit_base_patch16_224", {}, 17.5, 8.6),
        ("deit_small_patch16_224", {"img_size": 384}, 15.3, 6.9),
    ],
)
def test_table_9_of_the_paper(name, options, full, masked):
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    half = model.patch_embed.num_patches // 2
    assert vit_macs(model, exact_savings=False).blocks / 1e9 == pytest.approx(full, abs=0.06)
    assert vit_macs(model, half, exact_savings=False).blocks / 1e9 == pytest.approx(masked, abs=0.06)


SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 7}


def counted(run: Callable[[], object]) -> int:
    """Multiply-adds that PyTorch's own counter sees."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops()) // 2


@pytest.mark.parametrize("options", [{}, {"global_pool": "avg"}, {"reg_tokens": 3}, {"mlp_ratio": 2.5}])
def test_the_count_is_what_the_ordinary_network_runs(options):
    model = timm.create_model("vit_tiny_patch16_224", **{**SMALL, **options}).eval()
    prefix, images = model.num_prefix_tokens, torch.randn(1, 3, 32, 32)
    assert vit_macs(model, exact_savings=False).total == counted(lambda: model(images))
    for keep in (1, 5):
        tokens = torch.randn(1, prefix + keep, 24)
        assert vit_macs(model, keep, exact_savings=False).blocks == counted(lambda x=tokens: model.blocks(x))


def test_exact_savings_are_embedding_and_last_block():
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    ours, theirs = vit_macs(model, 5), vit_macs(model, 5, exact_savings=False)
    d, n, patch = 24, 1 + 5, 3 * 8 * 8
    assert theirs.embed - ours.embed == (16 - 5) * patch * d
    # The last block's queries, projection (d^2 each) and MLP (8 d^2) run for 1 row instead of n, as does attention.
    assert theirs.blocks - ours.blocks == (n - 1) * (10 * d * d + 2 * n * d)
    averaged = timm.create_model("vit_tiny_patch16_224", **SMALL, global_pool="avg")
    assert vit_macs(averaged, 5).blocks == vit_macs(averaged, 5, exact_savings=False).blocks
    assert vit_macs(MaskedViT(model), 5) == ours


def test_distilled_heads_count():
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=1)
    assert vit_macs(model).head == 2 * 192 * 1000


def test_merging_costs_what_the_mask_does(capsys):
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    head = vit_macs(model).head
    for keep in (16, 8, 3):
        assert merged_macs(model, (0, 0, 0), keep) + head == vit_macs(model, keep).total
    merging = counted(lambda: MergedViT(model.eval(), (4, 2, 0))(torch.randn(1, 3, 32, 32)))
    assert merged_macs(model, (4, 2, 0), 16) + head == merging
    assert main(["deit_tiny_patch16_224", "eva02_tiny_patch14_224"]) == 0
    lines = capsys.readouterr().out.splitlines()
    half, rotary = (next(line for line in lines if kept in line) for kept in ("98 of 196", "128 of 256"))
    assert half.split("│")[-2].split() == ["19:", "543.5"]
    assert rotary.split("│")[-2].strip() == "-"


def test_mistakes():
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    for keep in (0, 197):
        with pytest.raises(ValueError, match=f"keep is {keep}"):
            vit_macs(model, keep)
    with pytest.raises(TypeError, match="VisionTransformer"):
        vit_macs(torch.nn.Linear(2, 2))
