"""What a recipe says of its method: the class, which options may change, and arguments that repeat the schedule.

A method that changes at the end of the training is told how long that is (`DistillMethod.lengths`). The schedule knows
it already: a recipe that leaves such an argument out gets it from there, and one that says otherwise is refused.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from ..methods import DistillMethod
    from .schema import Recipe

__all__ = ["check_lengths", "fill_lengths", "left_out_updates", "method_class", "settle_updates", "with_other_method"]


def method_class(recipe: Recipe) -> type[DistillMethod]:
    """Returns the class of a recipe's method.

    Args:
        recipe: names it.
    """
    return _class(recipe.method.class_path)


def _class(path: str) -> type[DistillMethod]:
    module, _, name = path.rpartition(".")
    kind: type[DistillMethod] = getattr(importlib.import_module(module), name)  # the parser has checked that it is one
    return kind


def with_other_method(path: str | Path, its: str | None, wanted: str | None) -> str | None:
    """Returns the text of a recipe whose method gives way to another one, with the arguments that were for the old one.

    The two may have arguments of one name that mean different things, such as a weight of another loss.

    Args:
        path: file of the recipe.
        its: import path of the method's class in the file; None if it names none.
        wanted: import path of the class that options name.

    Returns:
        YAML; None if the file names the wanted class or none.
    """
    import yaml

    if its is None or wanted is None or _class(its) is _class(wanted):
        return None
    root: Any = yaml.compose(Path(path).read_text(), Loader=yaml.SafeLoader)
    key, bare = (yaml.ScalarNode("tag:yaml.org,2002:str", text) for text in ("method", wanted))
    root.value = [*(pair for pair in root.value if pair[0].value != "method"), (key, bare)]  # it may be merged in
    text: str = yaml.serialize(root, Dumper=yaml.SafeDumper)
    return text


def fill_lengths(recipe: Recipe, given: Collection[str], stored: bool = False) -> None:
    """Takes the lengths that nobody gave from the schedule; null that was given stays null.

    A number of updates is only known where the data is: its argument is taken out of the recipe until then.

    Args:
        recipe: its method's arguments are changed in place.
        given: names of those that file or options name.
        stored: the recipe comes from the folder of a run and names all but those that were taken out.
    """
    arguments, schedule = recipe.method.init_args, recipe.schedule
    for name, what in method_class(recipe).lengths.items():
        if name in given:
            continue
        if what == "updates":
            arguments.pop(name, None)
        elif what == "epochs" and not stored:
            arguments[name] = schedule.epochs
        elif what == "last_epochs" and not stored and schedule.last_lr is not None:
            last = schedule.last_epochs
            arguments[name] = int(last) if last == int(last) else last


def check_lengths(recipe: Recipe) -> None:
    """Refuses a recipe whose method counts on another number of epochs than the schedule.

    Args:
        recipe: with all lengths that are counted in epochs.

    Raises:
        UserError: says which two keys differ.

    Example:
        >>> from .schema import MethodRecipe, Recipe
        >>> check_lengths(Recipe(method=MethodRecipe("fastmkd.MKD", {"epochs": 30})))
        Traceback (most recent call last):
        fastmkd.train.errors.UserError: method.epochs is 30, but schedule.epochs is 20; leave method.epochs out, and \
it is what the schedule has, or set it to null, which has no last epochs of another kind.
    """
    arguments, schedule = recipe.method.init_args, recipe.schedule
    names = {what: name for name, what in method_class(recipe).lengths.items()}
    epochs, last = (arguments.get(names.get(what, "")) for what in ("epochs", "last_epochs"))
    if epochs is None:
        return
    if epochs != schedule.epochs:
        raise UserError(
            f"method.{names['epochs']} is {epochs}, but schedule.epochs is {schedule.epochs}; leave "
            f"method.{names['epochs']} out, and it is what the schedule has, or set it to null, which has no last "
            "epochs of another kind."
        )
    if last is not None and schedule.last_lr is not None and last != schedule.last_epochs:
        raise UserError(
            f"method.{names['last_epochs']} is {last}, but schedule.last_lr is for the last {schedule.last_epochs:g} "
            f"epochs (schedule.last_epochs); leave method.{names['last_epochs']} out, and it is what the schedule has."
        )
    if last is not None and last >= epochs:
        raise UserError(
            f"schedule.epochs is {epochs}, and the last {last} epochs (method.{names['last_epochs']}) are of another "
            f"kind, which leaves none before them; train longer, lower method.{names['last_epochs']}, or set "
            f"method.{names['epochs']} to null, which has no such epochs."
        )


def left_out_updates(recipe: Recipe) -> list[str]:
    """Names the arguments that are to be the run's number of updates.

    Args:
        recipe: of a run.
    """
    lengths = method_class(recipe).lengths
    return [name for name, what in lengths.items() if what == "updates" and name not in recipe.method.init_args]


def settle_updates(method: DistillMethod, recipe: Recipe, updates: int) -> None:
    """Tells a method how many updates its run has, if the recipe leaves that to the run.

    Args:
        method: has an attribute for each such argument.
        recipe: that made it.
        updates: of the whole run.

    Raises:
        UserError: the recipe says another number.
    """
    for name, what in type(method).lengths.items():
        told: Any = recipe.method.init_args.get(name, updates)
        if what == "updates" and told not in (None, updates):
            raise UserError(
                f"method.{name} is {told}, but the run has {updates} updates, in {recipe.schedule.epochs} epochs; "
                f"leave method.{name} out, and it is what the run has."
            )
    for name in left_out_updates(recipe):
        setattr(method, name, updates)
