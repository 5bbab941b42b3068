"""Rows of options in a page's tables of experiments, each tried on tiny networks for one update."""

from __future__ import annotations

import re
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

from fastmkd.train.accelerator import make_accelerator
from fastmkd.train.build import Setup, assemble
from fastmkd.train.engine import Trainer, train
from fastmkd.train.meter import Meter
from fastmkd.train.recipe import load_recipe
from fastmkd.train.rundir import RunDir

ROOT = Path(__file__).parents[2]


@dataclass
class Step:
    """What one update did.

    Attributes:
        setup: the objects of the run.
        tokens: shapes of what each of the teacher's blocks that ran got, in order.
        images: what the method got.
        targets: what the method got.
        changed: names of the student's parameters that moved.
        terms: means of the loss and its terms, as they are logged.
    """

    setup: Setup
    tokens: list[tuple[int, ...]]
    images: Tensor
    targets: Tensor
    changed: set[str]
    terms: dict[str, float]

    @property
    def method(self) -> Any:
        return self.setup.method


def rows_of(page: str) -> dict[str, tuple[Path, str]]:
    """Recipe and options of each row ``| ... | ... | `--options` |`` under "The paper's experiments".

    The recipe is the one that the text before the table names last.
    """
    section = (ROOT / page).read_text().split("## The paper's experiments")[1].split("\n## ")[0]
    recipe, rows = Path(), {}
    for line in section.splitlines():
        if row := re.fullmatch(r"\|( .*? \| .*? )\| `(--.*)` \|", line):
            rows[row[1]] = (recipe, row[2])
        elif named := re.search(r"recipes/\w+\.yaml", line):
            recipe = ROOT / named[0]
    return rows


def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch, tiny: Callable[[str], dict[str, Any]]) -> None:
    """Puts pictures of two classes in a folder and goes there; timm's networks become tiny and are never downloaded."""
    noise = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (folder / "pictures" / part / name).mkdir(parents=True)
            for i in range(4):
                picture = Image.fromarray(noise.integers(0, 255, (40, 48, 3), dtype=np.uint8))
                picture.save(folder / "pictures" / part / name / f"{i}.png")
    real = timm.create_model

    def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
        return real(name, **{**tiny(name), **kwargs})

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.chdir(folder)
    torch.manual_seed(0)


def one_update(path: Path, options: list[str]) -> Step:
    """Makes everything that a recipe names and takes one step of training."""
    fixed = ["--data.root=pictures", "--data.batch_size=4", "--data.workers=0", "--run.device=cpu", "--run.root=runs"]
    recipe = load_recipe(path, [*options, *fixed, "--schedule.warmup_epochs=0", "--optim.accumulate=1"])
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
    return Step(setup, tokens, *got[0], changed, values)
