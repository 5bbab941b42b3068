"""From a recipe to the objects of a run: data, student, teacher, method."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..methods import DistillMethod
from ..nn import MaskedViT
from .data import DataSource, load_data
from .errors import UserError
from .loading import epoch_plan
from .method_keys import method_class, settle_updates
from .models import build_model, load_weights, method_arguments, model_kwargs
from .normalisation import Norm, norm_arguments, norm_of_pretrained, pretrained_note, takes_norms
from .optim import build_optimizer
from .recipe import identity, load_recipe
from .rundir import RunDir
from .schema import ModelRecipe, Recipe, StoredRecipe, TeacherRecipe
from .seeds import seed_all
from .tasks import task_of

__all__ = [
    "Setup",
    "assemble",
    "build_method",
    "describe",
    "find_teacher",
    "method_class",
    "open_run",
    "refuse_to_train",
    "rehearse",
    "teacher_recipe",
    "trained_student",
]


@dataclass
class Setup:
    """The objects of a run.

    Attributes:
        recipe: where they come from.
        source: data set.
        student: the network to train.
        teacher: the network to learn from, or None.
        method: holds both.
        identity: what the run is, including which teacher weights.
        description: what the run's folder keeps so that the student can be rebuilt without the data.

    Raises:
        UserError: the student is a `fastmkd.MaskedViT`.
    """

    recipe: Recipe
    source: DataSource
    student: nn.Module
    teacher: nn.Module | None
    method: DistillMethod
    identity: dict[str, Any]
    description: dict[str, Any]

    def __post_init__(self) -> None:
        if any(isinstance(part, MaskedViT) for part in self.method.modules()):
            raise UserError(
                "the student is a MaskedViT, whose parameters have other names than its weights on the disk, and which "
                "does not tell the optimizer its layers; pass its .model to the method and here. MaskedKD and "
                "MaskedDINO wrap it by themselves."
            )


# Keys of a run's identity that depend on files, which a run that is still to come may write.
FOUND_LATER = ("teacher.weights", "student.backbone")


def assemble(recipe: Recipe, train: Callable[[Recipe], Any], weights: str | Path | None = None) -> Setup:
    """Makes data, networks and method; the student's first weights depend on the seed alone.

    Args:
        recipe: what to make.
        train: called with the teacher's recipe if that has to be trained first, once `rehearse` has found no mistake.
        weights: of the student, in place of the first ones.

    Raises:
        UserError: anything in the recipe that does not fit.
    """
    source = load_data(recipe.data)
    task_of(source).check(recipe, method_class(recipe).tasks)
    teacher, norm = None, None
    own_identity = identity(recipe)
    if recipe.teacher is not None:
        rehearse(recipe, source)
        found = find_teacher(recipe, train)
        teacher = build_model(found, model_kwargs(found, source), "teacher")
        norm = _norm_of_run(recipe)
        if norm is None and takes_norms(method_class(recipe)):
            norm = norm_of_pretrained(found, teacher)
        elif norm is None:
            source.notes += pretrained_note("teacher", found, teacher, source)
        if found.weights is not None:
            own_identity["teacher.weights"] = _digest(found.weights)
    seed_all(recipe.seed, "student")
    kwargs = model_kwargs(recipe.student, source)
    student = build_model(recipe.student, kwargs, "student")
    source.notes += pretrained_note("student", recipe.student, student, source)
    if recipe.student.backbone is not None:
        own_identity["student.backbone"] = _digest(recipe.student.backbone)
    if weights is not None:
        load_weights(student, weights, "student")
    seed_all(recipe.seed, "method")
    method = build_method(recipe, student, teacher, source, norm)
    description = {
        "recipe": dataclasses.asdict(recipe),
        "student": {"name": recipe.student.name, "kwargs": kwargs},
        "data": {
            "name": recipe.data.name,
            "task": source.task,
            "classes": source.classes,
            "channels": source.channels,
            "image_size": source.image_size,
            "mean": source.mean,
            "std": source.std,
        },
    }
    return Setup(recipe, source, student, teacher, method, own_identity, description)


def rehearse(recipe: Recipe, source: DataSource) -> None:
    """Makes what would be made after the teacher's training and throws it away, so that mistakes show before it.

    Of a chain of teachers that are all to be trained each link is made. Teachers have no weights here. Random numbers
    are seeded anew for what is made to stay.

    Args:
        recipe: of the student; nothing is done if its teacher need not be trained.
        source: its data.

    Raises:
        UserError: student, method, optimizer or batch size of a recipe do not fit, its folder is that of another one,
            or the chain is a circle.
    """
    chain = [recipe]
    while (following := _untrained_teacher(chain[-1])) is not None:
        if following.run_dir in [link.run_dir for link in chain]:
            names = " <- ".join(link.name for link in [*chain, following])
            raise UserError(f"the teachers {names} wait for each other; give one of them teacher.weights.")
        chain.append(following)
    awaited = [link.run_dir.resolve() for link in chain[1:]]
    for link, of_teacher in itertools.pairwise(chain):
        RunDir(link.run_dir).check(identity(link), unknown=FOUND_LATER)
        next_source = load_data(of_teacher.data)
        task_of(next_source).check(of_teacher, method_class(of_teacher).tasks)
        bare = ModelRecipe(of_teacher.student.name, of_teacher.student.kwargs)
        teacher = build_model(bare, model_kwargs(bare, next_source), "teacher")
        if not _reads_from([link.student.weights, link.student.backbone, link.method.init_args], awaited):
            student = build_model(link.student, model_kwargs(link.student, source), "student")
            method = build_method(link, student, teacher, source, Norm(next_source.mean, next_source.std))
            build_optimizer(link.optim, student, method.heads, 1)
            group, world = link.optim.accumulate, int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun says it
            plan = epoch_plan(len(source.train), link.data.batch_size, link.seed, 0, world=world, group=group)
            settle_updates(method, link, link.schedule.epochs * (len(plan) // group))
        source = next_source


def _untrained_teacher(recipe: Recipe) -> Recipe | None:
    """The teacher's recipe, if the teacher is to be its student and has no finished run."""
    of_teacher = teacher_recipe(recipe)
    given = recipe.teacher is not None and recipe.teacher.weights is not None
    return None if of_teacher is None or given or RunDir(of_teacher.run_dir).result() else of_teacher


def _reads_from(value: Any, folders: Sequence[Path]) -> bool:
    """Whether a file in one of these folders, which is yet to come, is named anywhere in a value."""
    if isinstance(value, dict | list | tuple):
        parts = value.values() if isinstance(value, dict) else value
        return any(_reads_from(part, folders) for part in parts)
    return isinstance(value, str) and any(folder in Path(value).resolve().parents for folder in folders)


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def _norm_of_run(recipe: Recipe) -> Norm | None:
    """What the teacher's finished run normalised its pictures with; None if the teacher comes from no run."""
    of_teacher = teacher_recipe(recipe)
    if of_teacher is None or recipe.teacher is None or recipe.teacher.weights is not None:
        return None
    description = RunDir(of_teacher.run_dir).description() or {}
    data = description.get("data", {})
    return Norm(data["mean"], data["std"]) if data.get("mean") and data.get("std") else None


def build_method(
    recipe: Recipe, student: nn.Module, teacher: nn.Module | None, source: DataSource, norm: Norm | None = None
) -> DistillMethod:
    """Makes the method of a recipe around its networks.

    Args:
        recipe: names the method.
        student: the network to train.
        teacher: the network to learn from, or None.
        source: the data, for a method that asks for their size or classes and whose recipe is silent.
        norm: what the teacher's pictures were normalised with, if that is known.

    Raises:
        UserError: the method refuses its arguments or the networks, or has no use for the recipe's moving average.
    """
    kind: Any = method_class(recipe)
    arguments = dict(recipe.method.init_args)
    # Of a detector the data's size is the shorter side alone, and its transform tells a method the whole.
    size = None if source.task == "detection" else source.image_size
    for name, value in {"image_size": size, "train_labels": source.train.labels}.items():
        if name in inspect.signature(kind).parameters and arguments.get(name) is None:
            arguments[name] = value
    networks = method_arguments(kind, student, teacher)
    arguments |= norm_arguments(kind, arguments, source, norm)
    try:
        method = kind(**networks, **arguments)
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"method {kind.__name__} does not fit: {error}") from error
    assert isinstance(method, DistillMethod)
    if method.pretrains and recipe.ema is not None:
        raise UserError(
            f"ema averages a student for its tests, and {type(method).__name__} tests what it pre-trains by its loss; "
            "remove ema, or give it to the recipe that fine-tunes."
        )
    return method


def teacher_recipe(recipe: Recipe) -> Recipe | None:
    """Returns the recipe that trains the teacher of a recipe, None if the teacher does not come from one.

    The teacher's run lies in the same root and runs on the same device; it finds its data where this one does.

    Args:
        recipe: of the student.
    """
    teacher = recipe.teacher
    if teacher is None or teacher.recipe is None:
        return None
    loaded = load_recipe(teacher.recipe, changes=teacher.options, stored=isinstance(recipe, StoredRecipe))
    loaded.run.root = recipe.run.root
    loaded.run.device = recipe.run.device
    loaded.run.tensorboard = recipe.run.tensorboard
    loaded.data.workers = recipe.data.workers
    if loaded.data.name == recipe.data.name:
        loaded.data.root = loaded.data.root or recipe.data.root
        loaded.data.download = loaded.data.download or recipe.data.download
    return loaded


def find_teacher(recipe: Recipe, train: Callable[[Recipe], Any]) -> TeacherRecipe | ModelRecipe:
    """Returns name, arguments and weights of the teacher; trains it first if its recipe has no finished run.

    Args:
        recipe: of the student.
        train: called with the teacher's recipe if that has to be trained.

    Raises:
        UserError: the teacher has no weights, or the folder of its run belongs to another recipe.
    """
    teacher = recipe.teacher
    assert teacher is not None
    of_teacher = teacher_recipe(recipe)
    if of_teacher is None:
        if teacher.weights is None and not teacher.pretrained:
            raise UserError(
                f"the teacher {teacher.name} has no weights: give teacher.weights, or teacher.recipe (a recipe that "
                "trains it), or teacher.pretrained: true to let timm download them."
            )
        return teacher
    weights, kwargs = teacher.weights, of_teacher.student.kwargs
    if weights is None:
        train(of_teacher)  # says so, and returns at once if that run has finished
        run = RunDir(of_teacher.run_dir)
        description = run.description()
        assert description is not None
        # With what its own data decided, such as a larger image size than this recipe's.
        weights, kwargs = str(run.weights), description["student"]["kwargs"]
    return ModelRecipe(of_teacher.student.name, kwargs, weights)


def trained_student(run: RunDir, weights: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuilds the student of a finished run without its data.

    Args:
        run: folder of the run.
        weights: other weights than the run's own.

    Returns:
        The student in eval mode, and the run's ``recipe.json``.

    Raises:
        UserError: the folder is not that of a run, or it has not finished.
    """
    description = describe(run, finished=weights is None)
    recipe = ModelRecipe(description["student"]["name"], weights=weights or str(run.weights))
    with torch.random.fork_rng(devices=[]):
        student = build_model(recipe, description["student"]["kwargs"], "student")
    return student.eval(), description


def describe(run: RunDir, finished: bool = True) -> dict[str, Any]:
    """Returns the content of ``recipe.json`` of a run.

    Args:
        run: folder of the run.
        finished: refuse a run without a result.

    Raises:
        UserError: the folder is not that of a run, or it has not finished.
    """
    description = run.description()
    if description is None:
        raise UserError(f"{run.path} is not the folder of a run: it has no recipe.json; train a recipe first.")
    if finished and run.result() is None:
        raise UserError(f"the run in {run.path} has not finished; the command that began it goes on with it.")
    return description


def open_run(recipe: Recipe) -> Setup:
    """Makes data, networks and method of a finished run, with its trained student.

    Args:
        recipe: of the run.

    Raises:
        UserError: the run or its teacher's run has not finished.
    """
    run = RunDir(recipe.run_dir)
    if run.result() is None:
        raise UserError(f"{recipe.name} has no finished run in {run.path}; fastmkd train it first.")
    setup = assemble(recipe, refuse_to_train, run.weights)
    if setup.method.pretrains or (setup.method.heads and run.heads.is_file()):
        load_weights(setup.method.heads, run.heads, "method's heads")
    return setup


def refuse_to_train(recipe: Recipe) -> None:
    """Stands in for training where a command only looks at what has been trained.

    Args:
        recipe: of a teacher.

    Raises:
        UserError: its run has not finished.
    """
    if RunDir(recipe.run_dir).result() is None:
        raise UserError(f"the teacher's run {recipe.run_dir} has not finished; fastmkd train its recipe first.")
