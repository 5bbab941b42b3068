"""``fastmkd finetune`` and ``fastmkd probe``: what a network has learnt, put to use on labels.

Both train a recipe like any other: `fastmkd.Supervised` with `student.backbone`. Only the defaults differ, which are
those of MAE (Appendix A.1); every key is still an option, and the run goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from .build import describe
from .commands import report
from .errors import UserError
from .recipe import flatten, load_recipe, recipe_from_dict, recipe_parser
from .rundir import RunDir
from .schema import Recipe

__all__ = ["DEFAULTS", "finetune", "probe", "tuning_recipe"]

SUPERVISED = "fastmkd.methods.supervised.Supervised"

DEFAULTS: dict[str, dict[str, Any]] = {
    "finetune": {  # MAE, Table 9
        "method": {"class_path": SUPERVISED},
        "optim.name": "adamw",
        "optim.lr": 1e-3,
        "optim.lr_images": 256,
        "optim.weight_decay": 0.05,
        "optim.layer_decay": 0.75,
        "schedule.epochs": 100,
        "schedule.warmup_epochs": 5.0,
        "schedule.warmup_lr": 0.0,
        "schedule.min_lr": 1e-6,
        "augment.mixup": 0.8,
        "augment.cutmix": 1.0,
        "augment.label_smoothing": 0.1,
    },
    "probe": {  # MAE, Table 10
        "method": {"class_path": SUPERVISED, "init_args": {"linear_probe": True, "batch_norm": True}},
        "optim.name": "sgd",
        "optim.lr": 0.1,
        "optim.lr_images": 256,
        "optim.weight_decay": 0.0,
        "schedule.epochs": 90,
        "schedule.warmup_epochs": 10.0,
        "schedule.warmup_lr": 0.0,
        "schedule.min_lr": 0.0,
    },
}
DROP_PATH = 0.1  # fine-tuning, of these families of timm
VITS = ("vision_transformer", "deit", "beit", "eva", "cait")
# What pictures bear is a matter of the data; how much they are mixed is one of the task.
KEPT_AUGMENT = ("crop", "pad", "scale", "flip")


def tuning_recipe(
    command: Literal["finetune", "probe"],
    source: str | Path | Recipe,
    options: Sequence[str] = (),
    changes: dict[str, Any] | None = None,
) -> Recipe:
    """Makes the recipe that fine-tunes or probes a network.

    Args:
        command: whose defaults.
        source: folder of a finished run, which gives seed, data, crops and flips, and the student; or the recipe of
            one, which may yet be to come; or a file of weights, with student.name among the options.
        options: command-line options of the recipe; they win.
        changes: the same by dotted key; they win over `options`.

    Raises:
        UserError: the run has not finished, the source is none of these, the student has no name, or an option is
            wrong.

    Example:
        >>> tuning_recipe("probe", Recipe(name="mae", seed=3)).student.backbone
        'runs/mae/model.safetensors'
        >>> tuning_recipe("probe", "mine.yaml")
        Traceback (most recent call last):
        fastmkd.train.errors.UserError: mine.yaml is a recipe; train it and give the folder of its run, runs/NAME.
    """
    defaults = dict(DEFAULTS[command])
    if isinstance(source, Recipe):
        defaults |= _of_run(source, RunDir(source.run_dir), command)
    elif (source := Path(source)).is_dir():
        run = RunDir(source)
        description = describe(run)
        stored, task = description["recipe"], description["data"].get("task", "classification")
        if task != "classification":
            raise UserError(
                f"the run in {run.path} is one of {task}, whose student needs no other head; train a recipe of "
                "Supervised with student.weights to go on with it."
            )
        found = recipe_from_dict({key: stored[key] for key in ("seed", "data", "student", "augment")})
        defaults |= _of_run(found, run, command)
    elif source.suffix in (".yaml", ".yml"):
        raise UserError(f"{source} is a recipe; train it and give the folder of its run, runs/NAME.")
    elif source.is_file():
        defaults |= {"name": f"{source.stem}-{command}", "student.name": None, "student.backbone": str(source)}
    else:
        raise UserError(f"{source} does not exist; give the folder of a finished run, or a file of weights.")
    recipe = _load(command, options, changes, defaults)
    if not recipe.student.name:
        raise UserError(
            f"student.name is not given, and {source} does not say which network it is of; give --student.name (and "
            "--student.kwargs), or the folder of the run that made it."
        )
    if command == "finetune" and _takes_drop_path(recipe.student.name):
        recipe.student.kwargs.setdefault("drop_path_rate", DROP_PATH)
    return recipe


def _load(command: str, options: Sequence[str], changes: dict[str, Any] | None, defaults: dict[str, Any]) -> Recipe:
    """The recipe; a warm-up that nobody asked for and that is longer than the training becomes the same share of it."""
    try:
        return load_recipe(options=options, changes=changes, defaults=defaults)
    except UserError:
        # Whatever else is wrong is said again here, and what was asked for stays: only the default is replaced.
        plain = load_recipe(options=options, changes=changes, defaults={**defaults, "schedule.warmup_epochs": 0.0})
        usual = DEFAULTS[command]
        warmup = plain.schedule.epochs * usual["schedule.warmup_epochs"] / usual["schedule.epochs"]
        return load_recipe(options=options, changes=changes, defaults={**defaults, "schedule.warmup_epochs": warmup})


def _of_run(recipe: Recipe, run: RunDir, command: str) -> dict[str, Any]:
    """What a run hands on."""
    kwargs = {key: value for key, value in recipe.student.kwargs.items() if key != "num_classes"}  # a new classifier
    return {
        "name": f"{run.path.resolve().name}-{command}",
        "run.root": str(run.path.parent),
        "seed": recipe.seed,
        "student.name": recipe.student.name,
        "student.kwargs": kwargs,
        "student.backbone": str(run.weights),
        **flatten({"data": asdict(recipe.data)}),
        **{f"augment.{name}": getattr(recipe.augment, name) for name in KEPT_AUGMENT},
    }


def _takes_drop_path(name: str) -> bool:
    from timm.models import is_model_in_modules

    return is_model_in_modules(name, VITS)


def finetune(argv: Sequence[str]) -> int:
    """``fastmkd finetune RUN|WEIGHTS [--key=value ...]``: trains all of a network on labels.

    Args:
        argv: after the command's name.

    Raises:
        UserError: see `tuning_recipe` and `fastmkd.train.engine.train`.
    """
    return _command("finetune", argv)


def probe(argv: Sequence[str]) -> int:
    """``fastmkd probe RUN|WEIGHTS [--key=value ...]``: trains a linear classifier on a frozen network.

    Args:
        argv: after the command's name.

    Raises:
        UserError: see `tuning_recipe` and `fastmkd.train.engine.train`.
    """
    return _command("probe", argv)


def _command(command: Literal["finetune", "probe"], argv: Sequence[str]) -> int:
    from .engine import train

    usage = f"fastmkd {command} RUN|WEIGHTS"
    if not argv or argv[0] in ("-h", "--help"):
        recipe_parser(usage, DEFAULTS[command]).print_help()
        return 0 if argv else 2
    if argv[0].startswith("-"):
        raise UserError(f"the run must come before {argv[0]}: {usage} --key=value.")
    report(train(tuning_recipe(command, argv[0], argv[1:])))
    return 0
