"""``fastmkd demo``: what MaskedKD is good for, on two processor cores in a few minutes.

Trains a ViT teacher on scikit-learn's digits, then a small student alone, with full logit distillation and with
MaskedKD at 50 %; ends with a table and a picture. Everything comes from ``recipes/*_digits.yaml``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..methods import MaskedKD
from ..nn import MaskedViT
from .augment import Finisher
from .build import assemble
from .cost import vit_macs
from .engine import train
from .errors import UserError
from .models import load_weights
from .recipe import load_recipe
from .show import show

__all__ = ["main"]

STUDENTS = {
    "student_digits": "student alone",
    "kd_digits": "logit KD, teacher sees all",
    "maskedkd_digits": "MaskedKD, teacher sees 50 %",
}


@dataclass
class Row:
    """A line of the final table.

    Attributes:
        title: what was trained.
        accuracy: top-1 in percent of each seed.
        step: milliseconds per update of each seed.
        teacher_macs: multiply-adds of the teacher per image, None without one.
        teacher_speed: images per second through the teacher alone.
    """

    title: str
    accuracy: list[float]
    step: list[float]
    teacher_macs: int | None = None
    teacher_speed: float | None = None


def main(argv: Sequence[str]) -> int:
    """Runs the demo; what was trained before in the same folder is not trained again.

    Args:
        argv: after the command's name.

    Raises:
        UserError: the recipes are not there.
    """
    parser = argparse.ArgumentParser(prog="fastmkd demo", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", default="runs/demo", help="folder for runs and picture")
    parser.add_argument("--recipes", default="recipes", help="folder with the recipes")
    parser.add_argument("--seeds", type=int, default=2, help="students to train per method")
    parser.add_argument("--epochs", type=int, help="shorter or longer training of every network")
    arguments = parser.parse_args(list(argv))
    folder, out = Path(arguments.recipes), Path(arguments.out)
    if not (folder / "maskedkd_digits.yaml").is_file():
        raise UserError(f"{folder} has no maskedkd_digits.yaml; run the demo in the repository or give --recipes.")
    if arguments.seeds < 1:
        raise UserError(f"--seeds is {arguments.seeds}; expected at least 1.")
    quiet = {"run.tensorboard": False, "run.log_every": 200, "run.eval_every": 5}
    changes: dict[str, Any] = {"run.root": str(out), **quiet}
    if arguments.epochs is not None:
        changes["schedule.epochs"] = arguments.epochs
        changes["schedule.warmup_epochs"] = min(2, arguments.epochs / 2)

    began = time.perf_counter()
    teacher = train(load_recipe(folder / "teacher_digits.yaml", changes=changes))
    rows = [Row("teacher", [teacher["top1"]], [teacher["milliseconds_per_update"]])]
    weights = {"teacher.weights": teacher["weights"]}
    for name, title in STUDENTS.items():
        row = Row(title, [], [])
        for seed in range(arguments.seeds):
            own = {**changes, "seed": seed, "name": f"{name}_seed{seed}"}
            if name != "student_digits":
                own |= weights
            recipe = load_recipe(folder / f"{name}.yaml", changes=own)
            result = train(recipe)
            row.accuracy.append(result["top1"])
            row.step.append(result["milliseconds_per_update"])
        if name != "student_digits":
            row.teacher_macs, row.teacher_speed = measure_teacher(recipe, result["weights"])
        rows.append(row)
    picture = out / "maskedkd.png"
    show(recipe, picture, count=10)
    print_table(rows, arguments.seeds)
    sys.stdout.write(f"picture: {picture}   runs: {out}   time: {time.perf_counter() - began:.0f} s\n")
    return 0


@torch.no_grad()
def measure_teacher(recipe: Any, weights: str) -> tuple[int, float]:
    """Returns the teacher's multiply-adds per image, and images per second through it (best of 25 batches).

    Args:
        recipe: of a finished MaskedKD run.
        weights: of its student.
    """
    setup = assemble(recipe, train)
    load_weights(setup.student, weights, "student")
    method = setup.method.eval()
    assert isinstance(method, MaskedKD)
    source = setup.source
    raw: Any = source.test
    images, _ = Finisher(source.mean, source.std, source.num_classes)(raw.images[:128], raw.labels[:128])
    teacher: Any = setup.teacher
    patches = int(teacher.patch_embed.num_patches)
    saliency: Tensor | None = None
    if method.keep_ratio < 1:
        _, saliency = MaskedViT(setup.student)(images, return_saliency=True)
    seconds = []
    for _ in range(25):
        start = time.perf_counter()
        method.teacher_logits(images, saliency)
        seconds.append(time.perf_counter() - start)
    keep = None if saliency is None else max(1, round(method.keep_ratio * patches))
    return vit_macs(teacher, keep).total, len(images) / min(seconds)


def print_table(rows: Sequence[Row], seeds: int) -> None:
    """Prints the final table.

    Args:
        rows: one per method.
        seeds: how many students each mean is over.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"digits: means over {seeds} seed{'s' * (seeds > 1)} (the teacher has one)")
    for column in ("", "test top-1", "step", "teacher MACs/image", "teacher images/s"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        spread = f" ± {(max(row.accuracy) - min(row.accuracy)) / 2:.1f}" if len(row.accuracy) > 1 else ""
        table.add_row(
            row.title,
            f"{statistics.mean(row.accuracy):.1f} %{spread}",
            f"{statistics.mean(row.step):.1f} ms",
            "" if row.teacher_macs is None else f"{row.teacher_macs / 1e6:.1f} M",
            "" if row.teacher_speed is None else f"{row.teacher_speed:.0f}",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
