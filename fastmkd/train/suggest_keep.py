"""``fastmkd suggest-keep``: how few patches the teacher can do with.

The paper leaves the number of kept patches to trial. What masking does to the teacher can be measured beforehand: on a
few hundred training pictures its answer on k patches is compared with its answer on all of them, and the smallest k
inside a stated tolerance is suggested. That is where to begin, not a guarantee: drift says nothing about labels, and
a student may not suffer where its teacher does (MaskedKD, Fig. 2).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..methods.maskedkd import MaskedKD
from ..methods.strategies import ExternalSaliency, Random, Scores
from ..ops import select_tokens
from .accelerator import make_accelerator
from .augment import Finisher
from .build import Setup, assemble, method_class
from .checkpoint import atomic_write
from .cost import vit_macs
from .engine import train
from .errors import UserError
from .loading import Loader
from .models import load_weights
from .rundir import RunDir
from .schema import Recipe
from .seeds import generator
from .show import open_recipe

__all__ = ["Drift", "DriftMeter", "Tolerance", "check_recipe", "choose_guide", "main", "search"]

STEPS = 10


class Drift(NamedTuple):
    """How far the masked teacher's answers are from those it gives on all patches.

    Attributes:
        keep: k, patches kept.
        agreement: share of the pictures on which its first choice is the same.
        agreement_error: standard error of that share.
        kl: mean of ``KL(full || masked)`` in nats, at temperature 1.
        kl_error: standard error of that mean.
    """

    keep: int
    agreement: float
    agreement_error: float
    kl: float
    kl_error: float


class Tolerance(NamedTuple):
    """How much drift is allowed.

    Attributes:
        agreement: least share of pictures with the same first choice.
        kl: largest mean divergence in nats.

    Example:
        >>> Tolerance(0.9).allows(Drift(8, 0.95, 0.01, 0.2, 0.01))
        True
    """

    agreement: float = 0.95
    kl: float = math.inf

    def allows(self, drift: Drift) -> bool:
        """Tells whether a drift is inside.

        Args:
            drift: what was measured.
        """
        return drift.agreement >= self.agreement and drift.kl <= self.kl


class DriftMeter:
    """Measures the drift of a method's teacher on fixed pictures; scores and full answers are computed once.

    Args:
        method: whose teacher and strategy are asked.
        batches: images ``(B, C, H, W)``, normalised for the student, on the method's device.

    Raises:
        UserError: there are no pictures.
    """

    def __init__(self, method: MaskedKD, batches: Sequence[Tensor]) -> None:
        if not batches:
            raise UserError("there are no pictures to measure the drift on.")
        self.method, self.batches = method.eval(), batches
        self.scores: list[Scores] = [method.patch_scores(images) for images in batches]
        self.full = [method.ask_teacher(images, None).logits for images in batches]
        self.grid = method.masked_grid((batches[0].shape[-2], batches[0].shape[-1]))
        self.patches = math.prod(self.grid)
        self.pictures = sum(map(len, batches))

    def __call__(self, keep: int) -> Drift:
        """Shows the teacher the best patches of every picture.

        Args:
            keep: k, 1 to all.
        """
        if keep == self.patches:
            return Drift(keep, 1.0, 0.0, 0.0, 0.0)
        same, divergence = [], []
        for images, scores, full in zip(self.batches, self.scores, self.full, strict=True):
            chosen = select_tokens(scores.values, keep, scores.grid, self.grid)
            masked = self.method.ask_teacher(images, chosen).logits
            same.append((masked.argmax(1) == full.argmax(1)).double())
            log_p, log_q = full.double().log_softmax(1), masked.double().log_softmax(1)
            divergence.append(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1))
        agreement, kl = torch.cat(same), torch.cat(divergence)
        if not kl.isfinite().all():
            raise UserError(f"the teacher's output on {keep} patches is not finite; try method.teacher_dtype float32.")
        return Drift(keep, *_mean(agreement), *_mean(kl))


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return values.mean().item(), error


def search(meter: Any, patches: int, tolerance: Tolerance) -> tuple[int, list[Drift]]:
    """Finds the smallest k inside the tolerance: ten steps over the whole range, then halving where it is crossed.

    Args:
        meter: k to `Drift`.
        patches: N.
        tolerance: what is allowed.

    Returns:
        The smallest k that is inside together with every larger one that was measured, and all measurements, largest
        k first.

    Example:
        >>> meter = lambda k: Drift(k, 1 - 0.5 / k, 0.0, 0.0, 0.0)
        >>> search(meter, 196, Tolerance(agreement=0.97))[0]
        17
    """
    steps = sorted({max(1, round(patches * i / STEPS)) for i in range(1, STEPS + 1)}, reverse=True)
    measured = [meter(k) for k in steps]
    inside = next((i for i, drift in enumerate(measured) if not tolerance.allows(drift)), len(measured))
    if inside == 0:
        raise UserError(f"not even all {patches} patches are inside {tolerance}; ask for less.")
    best = measured[inside - 1].keep
    low = measured[inside].keep if inside < len(measured) else 0  # k above it are still open
    while best - low > 1:
        drift = meter((low + best) // 2)
        measured.append(drift)
        if tolerance.allows(drift):
            best = drift.keep
        else:
            low = drift.keep
    return best, sorted(measured, key=lambda drift: -drift.keep)


def check_recipe(recipe: Recipe, guide: str) -> None:
    """Refuses a recipe whose teacher sees everything; before that teacher is trained.

    Args:
        recipe: names the method.
        guide: see `choose_guide`.

    Raises:
        UserError: the method masks no teacher, or the student is to rank patches but its run has not finished.
    """
    kind, run = method_class(recipe), RunDir(recipe.run_dir)
    if not issubclass(kind, MaskedKD):
        raise UserError(f"suggest-keep measures the masked teacher of MaskedKD; this method is {kind.__name__}.")
    if recipe.method.init_args.get("mask", "teacher") != "teacher":
        raise UserError("this recipe masks the student, so its teacher sees everything; set mask: teacher.")
    if recipe.method.init_args.get("teacher_tokens", "mask") != "mask":
        raise UserError("this recipe merges the teacher's tokens and hides no patch; set teacher_tokens: mask.")
    if guide == "student" and run.result() is None:
        raise UserError(f"{recipe.name} has no finished run in {run.path}; train it, or use --guide teacher.")


def choose_guide(setup: Setup, guide: str) -> str:
    """Gives student or strategy what they need to rank patches, and says who ranks them.

    Args:
        setup: of a recipe that `check_recipe` takes; the student's weights are loaded, or the method's strategy
            replaced.
        guide: "student" (of the finished run), "teacher" (its own saliency), or "auto": the student if its run has
            finished, else the teacher. A strategy that does not look at the student is left as it is.

    Returns:
        Who ranks the patches, in words.
    """
    method, run = setup.method, RunDir(setup.recipe.run_dir)
    assert isinstance(method, MaskedKD)
    student: Any = setup.student
    if guide == "auto" and not method.looks_at_student:
        return f"strategy {type(method.strategy).__name__}"
    if guide == "student" or (guide == "auto" and run.result() is not None):
        load_weights(student, run.weights, "student")
        return "saliency of the trained student"
    assert setup.teacher is not None
    try:
        method.strategy = ExternalSaliency(setup.teacher)
    except ValueError:
        method.strategy = Random()
        return "chance (no trained student, and the teacher has no CLS token)"
    return "saliency of the teacher itself"


def pictures(setup: Setup, count: int, device: torch.device) -> list[Tensor]:
    """Reads training pictures, without augmentation.

    Args:
        setup: names data and seed.
        count: how many, drawn by the recipe's seed.
        device: where they go.
    """
    recipe, source = setup.recipe, setup.source
    loader = Loader(source.train, recipe.data, None, source.image_size, device, recipe.seed)
    chosen = torch.randperm(len(source.train), generator=generator(recipe.seed, "suggest-keep"))[:count]
    finish = Finisher(source.mean, source.std, source.num_classes)
    batches = loader.batches(list(chosen.split(recipe.data.eval_batch_size)))
    return [finish(batch.images, batch.targets)[0] for batch in batches]


def main(argv: Sequence[str]) -> int:
    """``fastmkd suggest-keep RECIPE.yaml|RUN [--agreement 0.95] [--kl NATS] [--pictures 256]``.

    Args:
        argv: after the command's name.
    """
    # The standard parser, because jsonargparse has no way to hand the recipe's own options on.
    parser = argparse.ArgumentParser(
        prog="fastmkd suggest-keep",
        description="Finds how few patches a teacher needs. A teacher that has no finished run is trained first.",
        allow_abbrev=False,
    )
    parser.add_argument("target", help="recipe (YAML) or folder of a finished run, of MaskedKD")
    parser.add_argument("--agreement", type=float, default=0.95, help="least share of equal first choices")
    parser.add_argument("--kl", type=float, default=math.inf, help="largest mean KL(full || masked), in nats")
    parser.add_argument("--pictures", type=int, default=256, help="how many training pictures to ask about")
    parser.add_argument("--guide", choices=("auto", "student", "teacher"), default="auto", help="who ranks the patches")
    parser.add_argument("--out", default="suggest-keep.json", help="file to write")
    arguments, options = parser.parse_known_args(list(argv))
    if not 0 < arguments.agreement <= 1:
        raise UserError(f"--agreement is {arguments.agreement}; expected a share above 0 and at most 1.")
    if not arguments.kl >= 0:
        raise UserError(f"--kl is {arguments.kl}; expected a number of nats, at least 0.")
    if arguments.pictures < 2:
        raise UserError(f"--pictures is {arguments.pictures}; expected at least 2.")
    recipe = open_recipe(arguments.target, options)
    check_recipe(recipe, arguments.guide)
    setup = assemble(recipe, train)
    guide = choose_guide(setup, arguments.guide)
    assert isinstance(setup.method, MaskedKD)
    device = make_accelerator(setup.recipe).device
    meter = DriftMeter(setup.method.to(device), pictures(setup, arguments.pictures, device))
    tolerance = Tolerance(arguments.agreement, arguments.kl)
    keep, measured = search(meter, meter.patches, tolerance)
    report(setup, meter, guide, tolerance, keep, measured, Path(arguments.out))
    return 0


def report(
    setup: Setup, meter: DriftMeter, guide: str, tolerance: Tolerance, keep: int, measured: list[Drift], out: Path
) -> None:
    """Prints the table and writes the JSON file.

    Args:
        setup: of the recipe.
        meter: has measured.
        guide: who ranked the patches.
        tolerance: what was allowed.
        keep: the suggestion.
        measured: all measurements.
        out: the file.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{setup.recipe.name}: the teacher on k of {meter.patches} patches, {meter.pictures} pictures")
    for column in ("k", "share", "same first choice", "KL in nats", "multiply-adds"):
        table.add_column(column, justify="right")
    rows = []
    for drift in measured:
        cost = _cost(setup.teacher, drift.keep)
        table.add_row(
            str(drift.keep),
            f"{drift.keep / meter.patches:.0%}",
            f"{drift.agreement:.1%} ± {drift.agreement_error:.1%}",
            f"{drift.kl:.4f} ± {drift.kl_error:.4f}",
            "-" if cost is None else f"{cost:.0%}",
            style="bold" if drift.keep == keep else None,
        )
        rows.append({**drift._asdict(), "share": drift.keep / meter.patches, "multiply_adds": cost})
    console = Console()
    console.print(table)
    console.print(f"patches ranked by: {guide}")
    console.print(
        f"keep_ratio: {keep / meter.patches:.4g}  ({keep} patches; first choice equal on at least "
        f"{tolerance.agreement:.0%} of the pictures"
        + (f", KL at most {tolerance.kl} nats)" if math.isfinite(tolerance.kl) else ")")
    )
    result = {
        "name": setup.recipe.name,
        "keep": keep,
        "keep_ratio": keep / meter.patches,
        "patches": meter.patches,
        "pictures": meter.pictures,
        "ranked_by": guide,
        "tolerance": {"agreement": tolerance.agreement, "kl": tolerance.kl if math.isfinite(tolerance.kl) else None},
        "measured": rows,
    }
    atomic_write(out, lambda part: Path(part).write_text(json.dumps(result, indent=2) + "\n"))
    sys.stdout.write(f"wrote {out}\n")


def _cost(teacher: Any, keep: int) -> float | None:
    """Multiply-adds on k patches over those on all; None for a network that `vit_macs` does not count."""
    try:
        return vit_macs(teacher, keep).total / vit_macs(teacher, exact_savings=False).total
    except (TypeError, ValueError):
        return None
