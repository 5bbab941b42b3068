"""The commands that are only a few lines: train, eval, env."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import UserError

__all__ = ["env", "evaluate", "train"]


def train(argv: Sequence[str]) -> int:
    """``fastmkd train RECIPE.yaml [--key=value ...]``.

    Args:
        argv: after the command's name.

    Raises:
        UserError: see `fastmkd.train.engine.train`.
    """
    from .engine import train as run
    from .recipe import load_recipe, recipe_parser

    if not argv or argv[0] in ("-h", "--help"):
        recipe_parser().print_help()
        return 0 if argv else 2
    if argv[0].startswith("-"):
        raise UserError(f"the recipe must come before {argv[0]}: fastmkd train RECIPE.yaml --key=value.")
    if Path(argv[0]).is_dir():
        of_run = (Path(argv[0]) / "recipe.json").is_file()
        raise UserError(
            f"{argv[0]} is the folder of a run; give the recipe that made it, and the run goes on."
            if of_run
            else f"{argv[0]} is a folder; give a recipe (YAML)."
        )
    report(run(load_recipe(argv[0], argv[1:])))
    return 0


def report(result: dict[str, Any]) -> None:
    """Prints the final table of a run, on the main process.

    Args:
        result: what `fastmkd.train.engine.train` returns.
    """
    from accelerate.state import PartialState
    from rich.console import Console
    from rich.table import Table

    from .evaluate import worded

    if not PartialState().is_main_process:
        return
    table = Table(title=result["name"], show_header=False)
    rows = {
        **{f"test {name}": text for name, text in worded(result).items()},
        "epochs": str(result["epochs"]),
        "training speed": f"{result['images_per_second']:.0f} images/s",
        "update": f"{result['milliseconds_per_update']:.1f} ms",
        "time": f"{result['seconds']:.0f} s",
        "weights": result["weights"],
    }
    if result["bad_pictures"]:
        rows["unreadable pictures"] = f"{len(result['bad_pictures'])} skipped, named in result.json"
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)


def evaluate(argv: Sequence[str]) -> int:
    """``fastmkd eval RUN [--weights FILE] [--root FOLDER]``: tests the student of a finished run again.

    After pre-training, whose student has no classifier yet, the loss on the test pictures.

    Args:
        argv: after the command's name.
    """
    from jsonargparse import ArgumentParser

    from .accelerator import make_accelerator
    from .build import method_class, open_run, trained_student
    from .data import load_data
    from .evaluate import evaluate_loss, worded
    from .loading import Loader
    from .models import load_weights
    from .parser_messages import parse
    from .recipe import recipe_from_dict
    from .rundir import RunDir
    from .tasks import task_of

    parser = ArgumentParser(
        prog="fastmkd eval", exit_on_error=False, allow_abbrev=False, description="Tests a finished run again."
    )
    parser.add_argument("run", type=str, help="folder of a finished run")
    parser.add_argument("--weights", type=str | None, help="other weights than the run's own")
    parser.add_argument("--root", type=str | None, help="folder of the data, if it is not where the run had it")
    arguments = parse(parser, argv)
    student, description = trained_student(RunDir(Path(arguments.run)), arguments.weights)
    recipe = recipe_from_dict(description["recipe"])
    if arguments.root is not None:
        recipe.data.root = arguments.root
    source = load_data(recipe.data)
    accelerator, task = make_accelerator(recipe), task_of(source)
    loader = Loader(source.test, recipe.data, None, source.image_size, accelerator.device, recipe.seed, task)
    how = (loader, task.finisher(source), len(source.test), recipe.data.eval_batch_size, accelerator)
    if method_class(recipe).pretrains:
        recipe.run.dir = arguments.run
        setup = open_run(recipe)
        if arguments.weights is not None:
            load_weights(setup.student, arguments.weights, "student")
        scores = evaluate_loss(setup.method.to(accelerator.device), *how, recipe.seed)
        said = "  ".join(f"{name} {value:.4f}" for name, value in scores.items() if name != "images")
    else:
        scores = task.evaluate(student.to(accelerator.device), *how)
        said = "  ".join(f"{name} {text}" for name, text in worded(scores).items())
    skipped = f", {len(loader.bad)} unreadable pictures skipped" if loader.bad else ""
    accelerator.print(f"{said}  on {scores['images']:.0f} pictures{skipped}")
    return 0


def env(argv: Sequence[str]) -> int:
    """``fastmkd env``: what is installed, built and active.

    Args:
        argv: nothing is expected but --help.
    """
    import fastmkd

    if list(argv) in (["-h"], ["--help"]):
        sys.stdout.write("usage: fastmkd env\n\nSays what is installed, built and active. There are no options.\n")
        return 0
    if argv:
        raise UserError(f"fastmkd env takes no arguments, got {' '.join(argv)}.")
    fastmkd.show_config()
    return 0
