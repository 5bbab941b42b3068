"""Each line of the table in docs/maskedkd.md: the recipe it names, with the options, on tiny networks for an update."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
from paper_rows import Step, one_update, prepare, rows_of

from fastmkd.methods.strategies import ExternalSaliency, Random
from fastmkd.train.checkpoint import save_tensors

ROWS = rows_of("docs/maskedkd.md")
TINY = {"embed_dim": 12, "depth": 12, "num_heads": 3}
PATCHES, HALF = 196, 98


def seen(step: Step) -> int:
    return step.tokens[0][1] - 1  # without CLS


# By a part of the options: what must come of it. The recipe itself shows the teacher half of the patches.
CHECKS: dict[str, Callable[[Step], bool]] = {
    "--method=Supervised": lambda s: s.setup.teacher is None and not s.tokens,
    "keep_ratio=1": lambda s: seen(s) == PATCHES,
    "keep_ratio=0.4": lambda s: seen(s) == 78,
    "keep_ratio=0.25": lambda s: seen(s) == 49,
    "base=": lambda s: (
        seen(s) == HALF and type(s.method.base).__name__.lower().endswith(s.setup.recipe.method.init_args["base"])
    ),
    "cait_s24": lambda s: s.tokens[0][1] == HALF,  # CLS joins later
    "clip": lambda s: seen(s) == HALF and s.method._teacher_input._scale is not None,
    "strategy=": lambda s: seen(s) == HALF,
    "strategy=patch": lambda s: s.method.strategy.queries == "patch",
    "strategy=first": lambda s: s.method.strategy.layer == "first",
    "strategy=middle": lambda s: s.method.strategy.layer == "middle",
    "ExternalSaliency": lambda s: isinstance(s.method.strategy, ExternalSaliency),
    "strategy=random": lambda s: isinstance(s.method.strategy, Random),
    "strategy=bottom": lambda s: s.method.strategy.order == "bottom",
    "mask=student": lambda s: s.method.hides_patches and seen(s) == PATCHES,
    "teacher_tokens=merge": lambda s: seen(s) == PATCHES and s.tokens[-1][1] < HALF,
    "img_size=384": lambda s: seen(s) == 24 * 24 / 2,
    "linear_probe=true": lambda s: s.changed == {"head.weight", "head.bias"},
    "augment.crop=resized": lambda s: s.targets.shape == (4,),
    "mixup": lambda s: s.targets.shape == (4, 2) and len(s.setup.recipe.augment.rand_augment) > 0,
    "include_prefix=true": lambda s: s.method.include_prefix and s.method.ce_weight == s.method.weight == 0.5,
    "keep_mass": lambda s: len(s.tokens[0]) == 2,  # images of different lengths in one row
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    prepare(tmp_path, monkeypatch, lambda _name: TINY)
    save_tensors("dino.safetensors", timm.create_model("vit_small_patch16_224", num_classes=0).state_dict())
    return tmp_path


def test_the_table_is_read():
    assert len(ROWS) >= 20
    for part in CHECKS:
        assert any(part in options for _, options in ROWS.values()), part


@pytest.mark.parametrize("row", ROWS, ids=lambda row: re.sub(r"\W+", " ", row).strip())
def test_a_line_of_the_table(folder, row):
    recipe, options = ROWS[row]
    step = one_update(recipe, shlex.split(options))
    checks = {part: check for part, check in CHECKS.items() if part in options}
    assert checks
    for part, check in checks.items():
        assert check(step), (part, step.tokens)
    if "linear_probe" not in options:
        assert step.changed == set(dict(step.setup.student.named_parameters()))
