"""``fastmkd show RUN``: pictures of a run.

Without an option, what its method has to show for some test pictures: input, saliency, kept patches; of a detector the
true boxes and those it finds, of a segmenter the true classes and those it says. --features draws what the method has
to show for these: of MKD features, distances and attention (MKD, Fig. 1, 2 and 6), of DenseKD features and distances.
--over-training draws the same few pictures as training went on, --answers what teacher and student say,
--accuracy-against-kept compares runs that kept different shares of the patches (MaskedKD, Fig. 2).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..methods import Panel
from .answers import show_answers
from .augment import Finisher
from .build import Setup, open_run
from .errors import UserError
from .keep_curve import show_accuracy
from .loading import Loader
from .over_training import show_over_training
from .recipe import load_recipe, recipe_from_dict
from .rundir import RunDir
from .schema import Recipe
from .sheet import draw_sheet, spread, to_pixels
from .show_boxes import show_boxes
from .show_features import show_features
from .show_masks import show_masks

__all__ = ["main", "open_recipe", "sheet_of", "show"]


def show(recipe: Recipe, out: str | Path, count: int = 8, score: float = 0.3) -> None:
    """Draws the pictures of a recipe's method with the trained student of its run.

    Args:
        recipe: of a finished run.
        out: PNG (or PDF, SVG) to write.
        count: how many test pictures, spread over the classes.
        score: of a detector, least score of a box that is drawn.

    Raises:
        UserError: the run has not finished, or no test picture can be read.
    """
    setup = open_run(recipe)
    if setup.source.task == "detection":
        show_boxes(setup, out, count, score)
        return
    if setup.source.task == "segmentation":
        show_masks(setup, out, count)
        return
    draw_sheet(*sheet_of(setup, count), out, title=f"{recipe.name}: {type(setup.method).__name__}")


def sheet_of(setup: Setup, count: int) -> tuple[list[Panel], list[str]]:
    """Runs the method on test pictures and returns panels with pixels in [0, 1], and a caption per picture.

    Args:
        setup: with a trained student.
        count: how many pictures.

    Raises:
        UserError: no picture can be read.
    """
    source = setup.source
    loader = Loader(source.test, setup.recipe.data, None, source.image_size, torch.device("cpu"), setup.recipe.seed)
    batch = next(loader.batches([spread(source.test.labels, count)]), None)
    if batch is None:
        raise UserError("none of the test pictures to show can be read.")
    images, targets = Finisher(source.mean, source.std, source.num_classes)(batch.images, batch.targets)
    setup.method.eval()
    with torch.no_grad():
        panels = to_pixels(setup.method.pictures(images), source.mean, source.std)
        # A classifier that was not trained has no answers worth showing.
        answers = targets if setup.method.pretrains else setup.student(images).argmax(1)
    captions = []
    for target, answer in zip(targets.tolist(), answers.tolist(), strict=True):
        wrong = "" if target == answer else f"\n(student: {source.classes[answer]})"
        captions.append(source.classes[target] + wrong)
    return panels, captions


def main(argv: Sequence[str]) -> int:
    """Draws a picture of one run, or of several.

    Args:
        argv: after the command's name.
    """
    # The standard parser, because jsonargparse has no way to hand the recipe's own options on.
    parser = argparse.ArgumentParser(prog="fastmkd show", description=__doc__, allow_abbrev=False)
    parser.add_argument("targets", nargs="+", metavar="RUN", help="folder of a run, or its recipe (YAML)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--over-training", action="store_true", help="saliency and kept patches at several epochs")
    kind.add_argument("--answers", action="store_true", help="top 3 of teacher, masked teacher and student")
    kind.add_argument("--features", action="store_true", help="of MKD and DenseKD: both networks' features, distances")
    kind.add_argument("--accuracy-against-kept", action="store_true", help="of the students of several runs")
    parser.add_argument("--out", help="file to write: .png, .pdf or .svg; named after the kind of picture")
    parser.add_argument("--count", type=int, help="how many pictures to show: 8, with the first three options 4")
    parser.add_argument("--pictures", type=int, help="how many to measure the teacher's accuracy on; all")
    parser.add_argument("--level", help="of --features: the student's level, such as backbone.fpn:0; the finest")
    parser.add_argument("--score", type=float, default=0.3, help="of a detector, least score of a box that is drawn")
    arguments, options = parser.parse_known_args(list(argv))
    for name in ("count", "pictures"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name} is {value}; expected at least 1.")
    targets: list[str] = arguments.targets
    if arguments.accuracy_against_kept:
        out = arguments.out or "accuracy_against_kept.png"
        show_accuracy([open_recipe(target, options) for target in targets], out, arguments.pictures)
    elif len(targets) > 1 and Path(targets[0]).is_dir():
        raise UserError(f"{len(targets)} runs are given, but only --accuracy-against-kept draws several.")
    else:
        recipe = open_recipe(targets[0], [*options, *targets[1:]])
        if arguments.over_training:
            out = arguments.out or "over_training.png"
            show_over_training(RunDir(recipe.run_dir), out, arguments.count or 4)
        elif arguments.features:
            out = arguments.out or "features.png"
            show_features(open_run(recipe), out, arguments.count or 4, arguments.level)
        elif arguments.answers:
            out = arguments.out or "answers.png"
            show_answers(open_run(recipe), out, arguments.count or 4)
        else:
            out = arguments.out or "show.png"
            show(recipe, out, arguments.count or 8, arguments.score)
    sys.stdout.write(f"wrote {out}\n")
    return 0


def open_recipe(target: str, options: Sequence[str] = ()) -> Recipe:
    """Returns the recipe in a YAML file, or that of the folder of a run.

    Args:
        target: file or folder.
        options: command-line options, for a file only.

    Raises:
        UserError: it is neither, or options were given for a folder.
    """
    path = Path(target)
    if not path.exists() and path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{target} is neither the folder of a run nor a recipe (YAML).")
    if not path.is_dir():
        return load_recipe(path, options)
    description = RunDir(path).description()
    if description is None:
        raise UserError(f"{target} is not the folder of a run: it has no recipe.json.")
    if options:
        raise UserError(f"{options[0]} cannot be given with the folder of a run, whose recipe is fixed.")
    recipe = recipe_from_dict(description["recipe"])
    recipe.run.dir = str(path)  # it may have been moved
    return recipe
