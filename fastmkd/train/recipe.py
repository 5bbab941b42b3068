"""Reads recipes: YAML file + command-line options -> checked `Recipe`; compares the recipe of a run with another."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import itertools
import json
import math
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError, shorten
from .method_keys import check_lengths, fill_lengths, left_out_updates, with_other_method
from .parser_messages import explain
from .schema import MethodRecipe, Recipe, StoredRecipe
from .trust import known_code_only, refuse_foreign

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["differences", "flatten", "identity", "load_recipe", "recipe_from_dict", "recipe_parser"]


MOST_VALUES = 10_000  # of a recipe


def recipe_parser(prog: str = "fastmkd train RECIPE.yaml", defaults: dict[str, Any] | None = None) -> ArgumentParser:
    """Returns the parser whose options are the recipe's keys.

    Args:
        prog: how the usage line begins.
        defaults: other ones than those of `Recipe`, by dotted key.
    """
    from jsonargparse import ArgumentParser

    from ..methods import DistillMethod

    parser = ArgumentParser(
        prog=prog,
        exit_on_error=False,
        description="Keys of a recipe; each is also an option.",
        allow_abbrev=False,  # --schedule.epoch is a slip, and may mean another key one day
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below")
    parser.add_class_arguments(Recipe, skip={"method"})
    parser.add_subclass_arguments(
        DistillMethod, "method", skip={"student", "teacher"}, required=False, instantiate=False
    )
    parser.set_defaults({"method": {"class_path": MethodRecipe.class_path}, **(defaults or {})})
    return parser


def load_recipe(
    path: str | Path | None = None,
    options: Sequence[str] = (),
    changes: dict[str, Any] | None = None,
    defaults: dict[str, Any] | None = None,
    stored: bool = False,
) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: YAML file; None starts from the defaults.
        options: command-line options such as ``--optim.lr=1e-3``; they win over the file. With a method of another
            class its arguments in the file no longer count.
        changes: the same by dotted key; they win over `options`.
        defaults: by dotted key, for what neither says; in place of those of `Recipe`.
        stored: True if the folder of a run named the file, and so may name no code but fastmkd's.

    Returns:
        The recipe. A relative `teacher.recipe` is resolved against the folder of `path`.

    Raises:
        UserError: the file is missing, not YAML, has an unknown key, or a value has the wrong type or range.

    Example:
        >>> load_recipe(options=["--optim.lr=0.5"]).optim.lr
        0.5
    """
    import yaml

    argv = []
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"the recipe {path} does not exist; give the path of a YAML file, see the folder recipes/.")
        _check_size(Path(path))
        argv += [f"--config={path}"]
    argv += list(options)
    for key, value in (changes or {}).items():
        # One line; a bare scalar ends in YAML's end-of-document mark.
        text = yaml.safe_dump(value, default_flow_style=True, width=2**31).removesuffix("...\n").strip()
        argv.append(f"--{key}={text}")
    parser = recipe_parser(defaults=defaults)
    with known_code_only() if stored else contextlib.nullcontext():
        try:
            given = parser.parse_args(argv, defaults=False)
            if path is not None and len(argv) > 1:
                alone = parser.parse_args(argv[:1], defaults=False)
                text = with_other_method(path, *(one.get("method.class_path") for one in (alone, given)))
                if text is not None:
                    argv[0] = f"--config={text}"
                    given = parser.parse_args(argv, defaults=False)
            config = parser.parse_args(argv)
        except (argparse.ArgumentError, yaml.YAMLError) as error:
            raise UserError(_blame(path, parser) + explain(str(error), parser)) from None
    recipe: Recipe = _from_dict(StoredRecipe if stored else Recipe, config.as_dict())
    if stored:
        refuse_foreign(recipe.method.init_args)
    if recipe.teacher is not None and recipe.teacher.recipe is not None and path is not None:
        recipe.teacher.recipe = str(Path(path).parent / recipe.teacher.recipe)
    _check(recipe)
    fill_lengths(recipe, _named(given))
    if not stored:
        _check_teacher(recipe)
        check_lengths(recipe)
    return recipe


def _named(given: Any) -> Collection[str]:
    """Arguments of the method that what was parsed without defaults names."""
    return ((given.as_dict().get("method") or {}).get("init_args") or {}).keys()


def _blame(path: str | Path | None, parser: ArgumentParser) -> str:
    """How the message about a mistake begins: with the file, unless that is right and an option is wrong."""
    if path is None:
        return ""
    try:
        parser.parse_args([f"--config={path}"])
    except Exception:
        return f"the recipe {path} is not right: "
    return ""


def _check_size(path: Path) -> None:
    """Refuses a file that is no YAML, says a key twice, or has aliases for more than a computer holds (``*name``)."""
    import yaml

    try:
        root = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
        values = 0 if root is None else _count(root, {})
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"the recipe {path} is not right: {' '.join(str(error).split())}") from None
    except RecursionError:
        values = math.inf
    if values > MOST_VALUES:
        raise UserError(
            f"the recipe {path} is not right: it stands for more than {MOST_VALUES} values; take its aliases apart."
        )


def _count(node: Any, known: dict[int, float]) -> float:
    """Values under a node of a YAML file with every alias written out; infinitely many if it contains itself.

    Raises:
        ValueError: a key stands twice in one place.
    """
    if id(node) not in known:
        known[id(node)] = math.inf
        _refuse_twins(node)
        parts = [] if isinstance(node.value, str) else node.value  # of a mapping: (key, value) pairs
        known[id(node)] = 1 + sum(_count(part, known) for p in parts for part in (p if isinstance(p, tuple) else (p,)))
    return known[id(node)]


def _refuse_twins(node: Any) -> None:
    """Refuses a mapping that says a key twice, of which YAML would drop the first in silence."""
    lines: dict[str, int] = {}
    for key in (part[0] for part in node.value if isinstance(part, tuple)):
        line = key.start_mark.line + 1
        if isinstance(key.value, str) and key.value in lines:
            raise ValueError(f"the key {key.value} stands twice, in lines {lines[key.value]} and {line}; join the two.")
        if isinstance(key.value, str):
            lines[key.value] = line


def recipe_from_dict(values: dict[str, Any]) -> StoredRecipe:
    """Checks and returns a recipe that `dataclasses.asdict` and JSON have made plain, from the folder of a run.

    Args:
        values: by key.

    Raises:
        UserError: an unknown key, a value of the wrong type or range, or code that is not fastmkd's.

    Example:
        >>> recipe_from_dict({"name": "again"}).name
        'again'
    """
    refuse_foreign(values)
    parser = recipe_parser()
    try:
        with known_code_only():
            config = parser.parse_object(values)
            given = parser.parse_object(values, defaults=False)
    except argparse.ArgumentError as error:
        raise UserError(f"the recipe of the run is not right: {explain(str(error), parser)}") from None
    recipe: StoredRecipe = _from_dict(StoredRecipe, config.as_dict())
    refuse_foreign(recipe.method.init_args)  # with what jsonargparse has read from files that are named in `values`
    _check(recipe)
    fill_lengths(recipe, _named(given), stored=True)
    return recipe


def _from_dict(kind: Any, values: dict[str, Any]) -> Any:
    """Builds the dataclass from nested dicts that the parser has already checked."""
    hints = typing.get_type_hints(kind)
    arguments = {}
    for item in dataclasses.fields(kind):
        value = values.get(item.name)
        inner = next((hint for hint in (hints[item.name], *typing.get_args(hints[item.name]))
                      if dataclasses.is_dataclass(hint)), None)  # fmt: skip
        if inner is not None and isinstance(value, dict):
            value = _from_dict(inner, value)
        elif inner is not None and (value is not None or (item.name in values and inner is hints[item.name])):
            raise UserError(f"{item.name} is {json.dumps(value, default=str)}; it takes keys with values.")
        if value is not None or item.name in values:
            arguments[item.name] = value
    return kind(**arguments)


def _check(recipe: Recipe) -> None:
    """Ranges that a type cannot say."""
    limits: list[tuple[str, float | None, float, float]] = [
        ("data.batch_size", recipe.data.batch_size, 1, float("inf")),
        ("data.eval_batch_size", recipe.data.eval_batch_size, 1, float("inf")),
        ("data.workers", recipe.data.workers, 0, 256),
        ("data.image_size", recipe.data.image_size, 1, 65536),
        ("data.limit", recipe.data.limit, 1, float("inf")),
        ("data.label_fraction", recipe.data.label_fraction, 1e-9, 1),
        ("data.subset_seed", recipe.data.subset_seed, 0, 2**63 - 1),
        ("data.test_fraction", recipe.data.test_fraction, 0.001, 0.999),
        ("data.validation_fraction", recipe.data.validation_fraction, 0.001, 0.999),
        ("optim.lr", recipe.optim.lr, 0, float("inf")),
        ("optim.lr_images", recipe.optim.lr_images, 1, float("inf")),
        ("optim.weight_decay", recipe.optim.weight_decay, 0, float("inf")),
        ("optim.accumulate", recipe.optim.accumulate, 1, float("inf")),
        ("optim.layer_decay", recipe.optim.layer_decay, 1e-6, 1),
        ("optim.clip_grad", recipe.optim.clip_grad, 1e-12, float("inf")),
        ("optim.skip_nonfinite", recipe.optim.skip_nonfinite, 0, float("inf")),
        ("schedule.epochs", recipe.schedule.epochs, 1, float("inf")),
        ("schedule.warmup_epochs", recipe.schedule.warmup_epochs, 0, recipe.schedule.epochs),
        ("schedule.warmup_lr", recipe.schedule.warmup_lr, 0, float("inf")),
        ("schedule.min_lr", recipe.schedule.min_lr, 0, float("inf")),
        ("schedule.gamma", recipe.schedule.gamma, 0, 1),
        ("schedule.last_lr", recipe.schedule.last_lr, 0, float("inf")),
        ("augment.pad", recipe.augment.pad, 0, 65536),
        ("run.log_every", recipe.run.log_every, 1, float("inf")),
        ("run.eval_every", recipe.run.eval_every, 1, float("inf")),
        ("run.save_every", recipe.run.save_every, 0, float("inf")),
        ("run.keep", recipe.run.keep, 1, float("inf")),
        ("run.panels", recipe.run.panels, 0, 1000),
        ("seed", recipe.seed, 0, 2**63 - 1),
    ]
    shares = ("flip", "random_erasing", "mix_prob", "switch_prob", "label_smoothing")
    limits += [(f"augment.{name}", getattr(recipe.augment, name), 0, 1) for name in shares]
    limits += [(f"augment.{name}", getattr(recipe.augment, name), 0, float("inf")) for name in ("mixup", "cutmix")]
    if recipe.ema is not None:
        limits.append(("ema.decay", recipe.ema.decay, 0, 1))
    for name, value, low, high in limits:
        if value is not None and not low <= value <= high:  # also refuses NaN
            raise UserError(f"{name} is {value}; expected a number from {low:g} to {high:g}.")
    schedule = recipe.schedule
    if schedule.last_lr is not None and not 0 < schedule.last_epochs <= schedule.epochs:
        raise UserError(
            f"schedule.last_epochs is {schedule.last_epochs}; expected a number above 0 and at most {schedule.epochs}, "
            "for the epochs that last_lr is for."
        )
    marks = schedule.milestones
    if marks is not None and not all(0 < a < b for a, b in itertools.pairwise([*marks, schedule.epochs])):
        raise UserError(
            f"schedule.milestones is {marks}; expected epochs in rising order, above 0 and below {schedule.epochs}; "
            "null has a cosine."
        )
    low, high = recipe.augment.scale
    if not 0 < low <= high <= 1:
        raise UserError(
            f"augment.scale is {[low, high]}; expected two shares of the area in rising order, above 0 and at most 1."
        )
    if (recipe.augment.mixup or recipe.augment.cutmix) and recipe.data.batch_size % 2:
        raise UserError(f"data.batch_size is {recipe.data.batch_size}; mixup and cutmix pair images: make it even.")
    if not recipe.name or recipe.name in (".", "..") or "/" in recipe.name:
        raise UserError(f"name is {recipe.name!r}; expected a word that can name a folder.")
    if recipe.student.weights is not None and recipe.student.backbone is not None:
        raise UserError("student has weights and backbone; give one of them, backbone to make the classifier anew.")
    teacher = recipe.teacher
    if teacher is not None and teacher.recipe is None and teacher.name is None:
        raise UserError("teacher has neither recipe nor name; give teacher.recipe (YAML) or teacher.name (timm).")


def _check_teacher(recipe: Recipe) -> None:
    """Refuses keys of the teacher that nothing would read."""
    teacher = recipe.teacher
    if teacher is None:
        return
    unread = [name for name in ("name", "kwargs", "pretrained") if getattr(teacher, name)]
    if teacher.recipe is not None and unread:
        raise UserError(
            f"teacher.recipe says which network the teacher is, so that teacher.{' and teacher.'.join(unread)} would "
            "not be read; change that recipe by teacher.options (student.name, student.kwargs), or set teacher.recipe "
            "to null."
        )
    if teacher.recipe is None and teacher.options:
        raise UserError(
            f"teacher.options has {shorten(teacher.options)}, but there is no teacher.recipe to change; give one, or "
            "set teacher.options to {} and say it by teacher.name and teacher.kwargs."
        )


# Keys of a recipe that say where or how fast a run goes, not what comes out of it.
NOT_IDENTITY = ("run.", "data.root", "data.download", "data.workers", "data.eval_batch_size", "teacher.recipe")

# How an update is split over batches, which a run that has not finished may do otherwise on other processes.
SPLIT = ("data.batch_size", "optim.accumulate")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> one dict with dotted keys; tuples become lists, as they come back from JSON.

    Args:
        values: nested dicts.
        prefix: put before each key.

    Example:
        >>> flatten({"a": {"b": (1, 2)}})
        {'a.b': [1, 2]}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def identity(recipe: Recipe) -> dict[str, Any]:
    """Returns what makes two runs the same run, by dotted key.

    Args:
        recipe: any recipe.

    Example:
        >>> identity(Recipe(seed=3))["seed"], "run.log_every" in identity(Recipe())
        (3, False)
    """
    # Through JSON, so that an identity read back from a run's folder compares equal (a torch.dtype becomes its name).
    flat = json.loads(json.dumps(flatten(dataclasses.asdict(recipe)), default=str))
    flat |= {f"method.init_args.{name}": "as the run" for name in left_out_updates(recipe)}
    return {key: value for key, value in flat.items() if key == "run.precision" or not key.startswith(NOT_IDENTITY)}


def with_defaults(old: dict[str, Any], new: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """Adds to an identity the keys that came into being after it, with their defaults.

    Args:
        old: an identity from a file.
        new: an identity with today's keys.
        plain: the recipe of either, as `recipe_from_dict` takes it.

    Example:
        >>> with_defaults({"optim.lr": 0.1}, {"optim.lr": 0.2, "seed": 5}, {"seed": 5})
        {'optim.lr': 0.1, 'seed': 0}
    """
    younger = new.keys() - old.keys()
    values = copy.deepcopy(plain)
    for key in younger:
        *groups, last = key.split(".")
        group = values
        for name in groups:
            group = group.get(name) or {}
        group.pop(last, None)
    today = identity(recipe_from_dict(values)) if younger else {}  # parsing takes time
    known = {key: value for key, value in old.items() if value != {} or key in new}  # a group may have got its keys
    return {**known, **{key: today[key] for key in sorted(younger & today.keys())}}


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Says which keys of two identities differ, or '' if none does.

    Args:
        old: from the run's folder.
        new: of the recipe given now.

    Example:
        >>> differences({"seed": 1}, {"seed": 2})
        'seed is 1 there and 2 here'
    """
    keys = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    return shorten([f"{key} is {old.get(key)!r} there and {new.get(key)!r} here" for key in keys], limit=4)
