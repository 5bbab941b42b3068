"""Each line of the tables in docs/dmae.md: the recipe it names, with the options, on tiny networks for an update."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from paper_rows import Step, one_update, prepare, rows_of

from fastmkd.methods.crd import CRD
from fastmkd.methods.feature_alignment import FeatureAlignment
from fastmkd.train.checkpoint import save_tensors

ROWS = rows_of("docs/dmae.md")
WIDTHS = {"tiny": 12, "small": 24, "base": 36, "large": 48}
# What the recipe leaves large, made small, by what it is an option of.
SMALLER = {
    "MaskedDINO": {"out_features": 16, "hidden": 16, "local_crops": 2},
    "MoCoV3": {"hidden": 16},
    "FeatureKD": {},
    "": {"decoder_width": 16, "decoder_heads": 2},
}


def tiny(name: str) -> dict[str, Any]:
    size = next(size for size in WIDTHS if f"_{size}_" in name)
    return {"embed_dim": WIDTHS[size], "depth": 24 if size == "large" else 12, "num_heads": 3}


def linear_layers(step: Step) -> int:
    return sum(hasattr(part, "out_features") for part in step.method.heads["project"][0])


def visible(step: Step) -> int:
    return step.tokens[0][1] - 1  # without CLS


def widths(step: Step) -> tuple[int, int]:
    return step.setup.student.embed_dim, step.setup.teacher.embed_dim


def learns_labels(step: Step) -> bool:
    return "ce" in step.terms and step.setup.recipe.schedule.epochs == 100


# By a part of the options: what must come of it. The recipe itself aligns layer 9 with 18 and shows 49 patches.
CHECKS: dict[str, Callable[[Step], Any]] = {
    "student_layer=3": lambda s: s.method.layers == [(3, 6)] and len(s.tokens) == 6,
    "student_layer=6": lambda s: s.method.layers == [(6, 12)] and len(s.tokens) == 12,
    "student_layer=12": lambda s: s.method.layers == [(12, 24)] and len(s.tokens) == 24,
    "student_layer=[6,12]": lambda s: (
        s.method.layers == [(6, 12), (12, 24)] and {"align.6", "align.12"} <= s.terms.keys()
    ),
    "teacher_layer=24": lambda s: s.method.layers == [(9, 24)] and len(s.tokens) == 24,
    "teacher_layer=6": lambda s: s.method.layers == [(9, 6)] and len(s.tokens) == 6,
    "mask_ratio=0.9": lambda s: visible(s) in (20, 10, 4, 2),
    "mask_ratio=0.95": lambda s: visible(s) == 10,
    "mask_ratio=0.98": lambda s: visible(s) == 4,
    "mask_ratio=0.99": lambda s: visible(s) == 2,
    "head=linear": lambda s: linear_layers(s) == 1,
    "head=mlp3": lambda s: linear_layers(s) == 3,
    "decoder_depth=2": lambda s: len(s.method.heads["decoder"].blocks) == 2,
    "decoder_depth=4": lambda s: len(s.method.heads["decoder"].blocks) == 4,
    "loss=l2": lambda s: s.method.heads["project"].loss == "l2",
    "alpha=": lambda s: s.terms["loss"] == pytest.approx(s.terms["mae"] + s.method.alpha * s.terms["align"], rel=1e-4),
    "alpha=0.5": lambda s: s.method.alpha == 0.5,
    "alpha=4": lambda s: s.method.alpha == 4,
    "--teacher=null": lambda s: s.setup.teacher is None and "align" not in s.terms,
    "epochs=1600": lambda s: set(s.terms) == {"loss", "mae"} and s.setup.recipe.schedule.epochs == 1600,
    "--student.name=vit_base": lambda s: widths(s) == (36, 48),
    "--student.name=vit_small": lambda s: widths(s) in ((24, 48), (24, 36)),
    "--student.name=vit_tiny": lambda s: widths(s) == (12, 36),
    "--teacher.name=vit_base": lambda s: s.method.layers == [(9, 9)] and len(s.tokens) == 9,
    "MaskedDINO": lambda s: "dino" in s.terms,
    "MoCoV3": lambda s: "moco" in s.terms,
    "normalize=true": lambda s: s.method.normalize and s.terms["align"] < 0.5,
    "--method=Supervised": lambda s: set(s.terms) == {"loss", "ce"},
    "temperature=3": lambda s: learns_labels(s) and (s.method.ce_weight, s.method.weight) == (0.9, 0.1),
    "base=g2sd": lambda s: learns_labels(s) and s.method.base.two_heads and "head_dist.weight" in s.changed,
    "keep_ratio=1 ": lambda s: s.tokens[0][1] == 197,
    "base=align": lambda s: learns_labels(s) and isinstance(s.method.base, FeatureAlignment),
    "base=crd": lambda s: learns_labels(s) and isinstance(s.method.base, CRD),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    prepare(tmp_path, monkeypatch, tiny)
    for size in ("base", "large"):
        state = timm.create_model(f"vit_{size}_patch16_224", num_classes=0).state_dict()
        torch.save({"model": state}, f"mae_pretrain_vit_{size}.pth")
    save_tensors("finetuned.safetensors", timm.create_model("vit_large_patch16_224", num_classes=2).state_dict())
    return tmp_path


def test_the_tables_are_read():
    assert len(ROWS) >= 34
    for part in CHECKS:
        assert any(part in options for _, options in ROWS.values()), part


@pytest.mark.parametrize("row", ROWS, ids=lambda row: re.sub(r"\W+", " ", row).strip())
def test_a_line_of_the_tables(folder, row):
    recipe, options = ROWS[row]
    given = shlex.split(options)
    smaller = {}
    if recipe.stem.startswith("dmae"):
        smaller = SMALLER[next(name for name in SMALLER if name in options)]
        if "teacher=null" not in options and "teacher.weights" not in options:
            given.append("--teacher.weights=mae_pretrain_vit_large.pth")
    step = one_update(recipe, [*given, *(f"--method.init_args.{key}={value}" for key, value in smaller.items())])
    checks = {part: check for part, check in CHECKS.items() if part in options}
    assert checks
    for part, check in checks.items():
        assert check(step), (part, step.tokens, step.terms)
    trained = {name for name, p in step.setup.student.named_parameters() if p.requires_grad}
    assert step.changed == trained
