"""What mean and deviation a network was trained with, against those of the pictures that it gets here.

A method that takes `student_norm` and `teacher_norm` shows a teacher the pictures as it knows them; the others give
both networks the same ones.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .data import DataSource
from .errors import UserError
from .schema import ModelRecipe, TeacherRecipe

__all__ = ["Norm", "norm_arguments", "norm_of_pretrained", "pretrained_note", "takes_norms"]

ARGUMENTS = ("student_norm", "teacher_norm")


class Norm(NamedTuple):
    """What pictures are normalised with.

    Attributes:
        mean: per channel.
        std: per channel.

    Example:
        >>> str(Norm((0.5,), (0.25,)))
        'mean [0.5] and std [0.25]'
    """

    mean: Sequence[float]
    std: Sequence[float]

    def __str__(self) -> str:
        return f"mean {[round(x, 4) for x in self.mean]} and std {[round(x, 4) for x in self.std]}"

    def fits(self, other: Norm) -> bool:
        """Whether both are the same to four digits; those of other numbers of channels cannot be compared and fit.

        Args:
            other: another one.
        """
        mine, theirs = [*self.mean, *self.std], [*other.mean, *other.std]
        return len(mine) != len(theirs) or all(
            math.isclose(a, b, abs_tol=5e-5) for a, b in zip(mine, theirs, strict=True)
        )


def norm_of_pretrained(recipe: ModelRecipe | TeacherRecipe, network: Any) -> Norm | None:
    """Returns what the weights that timm has downloaded were trained with; None for other weights.

    Args:
        recipe: of the network.
        network: the network.
    """
    config = getattr(network, "pretrained_cfg", None) or {}
    replaced = recipe.weights is not None or getattr(recipe, "backbone", None) is not None
    if not recipe.pretrained or replaced or not (config.get("mean") and config.get("std")):
        return None
    return Norm(tuple(config["mean"]), tuple(config["std"]))


def takes_norms(kind: type) -> bool:
    """Whether a method shows its teacher the pictures with another mean and deviation.

    Args:
        kind: a DistillMethod.

    Example:
        >>> import fastmkd
        >>> takes_norms(fastmkd.MaskedKD), takes_norms(fastmkd.DPK)
        (True, False)
    """
    return set(ARGUMENTS) <= inspect.signature(kind).parameters.keys()


def norm_arguments(kind: type, given: Mapping[str, Any], source: DataSource, norm: Norm | None) -> dict[str, Any]:
    """Returns the arguments with which a method shows a teacher the pictures as it knows them, if that is needed.

    Args:
        kind: a DistillMethod.
        given: arguments of the recipe; their norms win.
        source: the data of the student.
        norm: what the teacher was trained with; None if nobody knows.

    Raises:
        UserError: the method has no such arguments.
    """
    own = Norm(source.mean, source.std)
    # A detector gets pictures as they are and normalises them by itself; the method compares the two.
    if norm is None or source.task == "detection" or own.fits(norm):
        return {}
    if not takes_norms(kind):
        raise UserError(
            f"the teacher was trained on pictures with {norm}, and this recipe has {own}; {kind.__name__} gives both "
            "networks the same pictures, so set data.mean and data.std to the teacher's, or train the teacher with "
            "these."
        )
    if any(given.get(name) is not None for name in ARGUMENTS):
        return {}
    return {"student_norm": tuple(own), "teacher_norm": tuple(norm)}


def pretrained_note(role: str, recipe: ModelRecipe | TeacherRecipe, network: Any, source: DataSource) -> list[str]:
    """Says that downloaded weights see other pictures than they were trained on.

    Args:
        role: "student" or "teacher".
        recipe: of the network.
        network: the network.
        source: the data.

    Returns:
        One sentence, or none.
    """
    own, norm = Norm(source.mean, source.std), norm_of_pretrained(recipe, network)
    if norm is None or source.task != "classification" or own.fits(norm):
        return []
    return [
        f"the pretrained weights of the {role} {recipe.name} were trained on pictures with {norm}, and get pictures "
        f"with {own}; data.mean and data.std say otherwise."
    ]
