"""Multiply-adds of DMAE against the paper's pair, and against a count of what ours and the public code's way run."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import timm
import torch
from timm.models.cait import Cait
from timm.models.eva import Eva
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastmkd
from fastmkd.bench.cases.dmae_step import public_losses
from fastmkd.methods.mae_decoder import MAEDecoder
from fastmkd.train.cli import main
from fastmkd.train.dmae_cost import dmae_macs

SMALL = {"img_size": 224, "patch_size": 16, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
DECODER = {"decoder_depth": 2, "decoder_width": 16, "decoder_heads": 2}


@cache
def paper_pair(teacher: bool = True, **options: Any) -> fastmkd.DMAE:
    """ViT-B from ViT-L, without memory for their weights."""
    names = ("vit_base_patch16_224", "vit_large_patch16_224")[: 1 + teacher]
    with torch.device("meta"):
        return fastmkd.DMAE(*(timm.create_model(name, num_classes=0) for name in names), **options)


def small(depth: int, kind: Any = None, **options: Any) -> Any:
    if kind is None:
        return timm.create_model("vit_tiny_patch16_224", depth=depth, **{**SMALL, **options})
    return kind(depth=depth, **{**SMALL, **options})


def counted(run: Any) -> int:
    """Multiply-adds that PyTorch's own counter sees; our patch embedding is an op that it does not know."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops()) // 2


def test_the_teacher_of_the_paper():
    """ViT-L at 75 %: 20.8 G multiply-adds in the public code, of which 11.5 are needed."""
    method = paper_pair()
    assert dmae_macs(method).teacher / 1e9 == pytest.approx(11.5, abs=0.05)
    assert dmae_macs(method, exact_savings=False).teacher / 1e9 == pytest.approx(20.8, abs=0.05)
    d, n = 1024, 50
    assert dmae_macs(method).teacher == 49 * 768 * d + 18 * (12 * n * d * d + 2 * n * n * d)


def test_the_step_of_the_paper():
    """1.25 times the public code's way and 1.41 times plain MAE; at 95 % 1.9 times as fast as at 75 %."""
    ours, public = dmae_macs(paper_pair()), dmae_macs(paper_pair(), exact_savings=False)
    assert public.step / ours.step == pytest.approx(1.25, abs=0.005)
    mae = dmae_macs(paper_pair(teacher=False))
    assert mae == (ours.student, ours.decoder, 0, 0)
    assert ours.step / mae.step == pytest.approx(1.41, abs=0.005)
    assert ours.step / dmae_macs(paper_pair(), 0.95).step == pytest.approx(1.9, abs=0.1)


def test_fewer_and_several_layers():
    one, first, both = (dmae_macs(paper_pair(student_layer=s)) for s in (9, 3, (6, 12)))
    assert first.teacher - 49 * 768 * 1024 == (one.teacher - 49 * 768 * 1024) / 3  # 6 of 18 layers
    assert both.teacher > one.teacher  # all 24
    assert both.projection == 2 * one.projection == 2 * 50 * (768 * 1024 + 1024 * 1024)
    linear = dmae_macs(paper_pair(head="linear"))
    assert linear.projection == 50 * 768 * 1024


@pytest.mark.parametrize(
    ("student", "teacher", "options"),
    [
        ({}, {"embed_dim": 48}, {}),
        ({"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}, {"head": "mlp3"}),
        ({"kind": Eva, "use_rot_pos_emb": True, "swiglu_mlp": True}, {"reg_tokens": 4}, {"mask_ratio": 0.95}),
        ({"kind": Cait, "depth_token_only": 1}, {}, {"student_layer": [1, 2]}),
        ({}, {"kind": Cait}, {"head": "linear"}),
        ({"global_pool": "map", "class_token": False}, None, {"decoder_depth": 1}),
    ],
)
def test_the_count_is_what_runs(student, teacher, options):
    other = None if teacher is None else small(4, **teacher)
    method = fastmkd.DMAE(small(3, **student), other, **{**DECODER, **options})
    images = torch.randn(1, 3, 224, 224)
    keep, hidden, grid = method.draw(images)
    macs, networks = dmae_macs(method), [method.student, *([] if other is None else [other])]
    for network in networks:  # keeps the teacher from kernels that the counter does not know
        network.norm.register_forward_hook(lambda *_: None)
    embedded = keep.shape[1] * sum(network.patch_embed.proj.weight.numel() for network in networks)
    assert sum(macs) == counted(lambda: method(images)) + embedded
    tokens = torch.randn(1, 196 - hidden.shape[1] + method.heads["decoder"].num_prefix_tokens, 24)
    assert macs.decoder == counted(lambda: method.heads["decoder"](tokens, keep, hidden, grid))
    half = dmae_macs(method, 0.5)
    method.mask_ratio = 0.5
    assert half == dmae_macs(method)


def test_the_other_count_is_what_the_public_code_runs():
    method = fastmkd.DMAE(small(3), small(4, embed_dim=48), **DECODER)
    beside = MAEDecoder(48, 768, 1, (14, 14), width=16, depth=2, num_heads=2)
    images = torch.randn(1, 3, 224, 224)
    keep, hidden, _ = method.draw(images)
    run = lambda: public_losses(method, beside, images, keep, hidden)  # noqa: E731
    assert sum(dmae_macs(method, exact_savings=False)) == counted(run)


RECIPE = """
data: {name: digits, image_size: 16, limit: 100}
student: {kwargs: {patch_size: 4, embed_dim: 12, depth: 2, num_heads: 3}}
teacher: {name: vit_tiny_patch16_224, kwargs: {patch_size: 4, embed_dim: 24, depth: 4, num_heads: 3}}
method: {class_path: fastmkd.DMAE, init_args: {mask_ratio: 0.5, decoder_depth: 1, decoder_width: 8, decoder_heads: 2}}
schedule: {epochs: 3, warmup_epochs: 0}
"""


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "dmae.yaml").write_text(RECIPE)
    path = str(tmp_path / "dmae.yaml")
    assert main(["cost", path]) == 0
    said = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == ["8 of 16", "", "4 of 16", "", "2 of 16", "", "1 of 16", ""]
    assert [row[1] for row in rows[:2]] == ["public code", "fastmkd"]
    assert all(float(ours[4]) <= float(public[4]) for public, ours in zip(rows[::2], rows[1::2], strict=True))
    assert "100 pictures x 3 epochs" in said
    assert main(["cost", path, "--teacher=null", "--keep", "0.25", "--epochs", "7"]) == 0
    said = capsys.readouterr().out
    assert "MAE: multiply-adds" in said
    assert "100 pictures x 7 epochs" in said
    assert said.count("fastmkd") == 1
    for keep, problem in (("1", "leaves no hidden patch"), ("0.01", "leaves no visible patch")):
        assert main(["cost", path, "--keep", keep]) == 2
        assert problem in capsys.readouterr().err


def test_a_share_that_leaves_nothing():
    with pytest.raises(ValueError, match="leaves no visible patch of the 196"):
        dmae_macs(paper_pair(), 0.999)
