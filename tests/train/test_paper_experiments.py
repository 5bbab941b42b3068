"""Each line of the table in docs/maskedkd.md: the recipe it names, with the options, on tiny networks for an update."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from fastmkd.methods.strategies import ExternalSaliency, Random
from fastmkd.train.accelerator import make_accelerator
from fastmkd.train.build import Setup, assemble
from fastmkd.train.checkpoint import save_tensors
from fastmkd.train.engine import Trainer, train
from fastmkd.train.meter import Meter
from fastmkd.train.recipe import load_recipe
from fastmkd.train.rundir import RunDir

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs/maskedkd.md").read_text().split("## The paper's experiments")[1].split("\n## ")[0]
ROWS = dict(re.findall(r"^\|( .*? \| .*? )\| `(--.*)` \|$", SECTION, re.MULTILINE))
RECIPE = ROOT / re.search(r"recipes/\w+\.yaml", SECTION)[0]
TINY = {"embed_dim": 12, "depth": 12, "num_heads": 3}
PATCHES, HALF = 196, 98


@dataclass
class Step:
    """What one update did: shapes of what the teacher's blocks got, what the method got, which parameters changed."""

    setup: Setup
    tokens: list[tuple[int, ...]]
    images: Tensor
    targets: Tensor
    changed: set[str]

    @property
    def method(self) -> Any:
        return self.setup.method


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
    """Pictures of two classes, and a timm whose networks are tiny and never downloaded."""
    noise = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "pictures" / part / name).mkdir(parents=True)
            for i in range(4):
                picture = Image.fromarray(noise.integers(0, 255, (40, 48, 3), dtype=np.uint8))
                picture.save(tmp_path / "pictures" / part / name / f"{i}.png")
    real = timm.create_model

    def create_model(name, pretrained=False, **kwargs):
        return real(name, **{**TINY, **kwargs})

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_tensors("dino.safetensors", create_model("vit_small_patch16_224", num_classes=0).state_dict())
    return tmp_path


def one_update(options: list[str]) -> Step:
    fixed = ["--data.root=pictures", "--data.batch_size=4", "--data.workers=0", "--run.device=cpu", "--run.root=runs"]
    recipe = load_recipe(RECIPE, [*fixed, "--schedule.warmup_epochs=0", *options])
    setup = assemble(recipe, train)
    trainer = Trainer(setup, make_accelerator(recipe), RunDir(recipe.run_dir))
    tokens: list[tuple[int, ...]] = []
    got: list[tuple[Tensor, Tensor]] = []
    if setup.teacher is not None:
        for block in setup.teacher.blocks:
            block.norm1.register_forward_hook(lambda _m, args, _out: tokens.append(tuple(args[0].shape)))
    setup.method.register_forward_pre_hook(lambda _m, args: got.append(args))
    before = {name: p.detach().clone() for name, p in setup.student.named_parameters()}
    setup.method.train()
    meter = Meter(trainer.accelerator)
    trainer._update(trainer.loader.batches(trainer.plan(0)), meter)
    values, _ = meter.flush()
    assert values
    assert all(np.isfinite(list(values.values()))), values
    assert values.get("kd", 1) > 0
    changed = {name for name, p in setup.student.named_parameters() if not torch.equal(p, before[name])}
    return Step(setup, tokens, *got[0], changed)


def test_the_table_is_read():
    assert len(ROWS) >= 20
    for part in CHECKS:
        assert any(part in options for options in ROWS.values()), part


@pytest.mark.parametrize("row", ROWS, ids=lambda row: re.sub(r"\W+", " ", row).strip())
def test_a_line_of_the_table(folder, row):
    options = ROWS[row]
    step = one_update(shlex.split(options))
    checks = {part: check for part, check in CHECKS.items() if part in options}
    assert checks
    for part, check in checks.items():
        assert check(step), (part, step.tokens)
    if "linear_probe" not in options:
        assert step.changed == set(dict(step.setup.student.named_parameters()))
