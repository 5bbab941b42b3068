"""``fastmkd cka RUN [OTHER]``: CKA between student and teacher, or between two students, as pictures and CSV."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..metrics.comparison import Comparison, compare
from ..metrics.cosine import compare_cosine
from ..metrics.figures import draw_curves, draw_heat_map, draw_ranked, write_table
from ..ops.devices import check_device
from .augment import Finisher
from .build import find_teacher, refuse_to_train, trained_student
from .checkpoint import load_checkpoint
from .data import DataSource, load_data
from .errors import UserError
from .loading import Loader, eval_plan
from .models import build_model, model_kwargs
from .parser_messages import parse
from .recipe import recipe_from_dict
from .rundir import RunDir
from .schema import ModelRecipe, Recipe
from .tasks import classification_only

__all__ = ["Batches", "curves", "main", "open_student", "open_teacher"]


@dataclass
class Batches:
    """Normalised test images in batches, as often as they are asked for.

    Attributes:
        recipe: names the data.
        source: the data.
        batch_size: images a minibatch; the paper takes 32.
        limit: how many test images, None for all.
        device: where they go.
    """

    recipe: Recipe
    source: DataSource
    batch_size: int
    limit: int | None
    device: torch.device

    def __iter__(self) -> Iterator[Tensor]:
        """Yields ``(B, C, H, W)``."""
        source = self.source
        loader = Loader(source.test, self.recipe.data, None, source.image_size, self.device, self.recipe.seed)
        finish = Finisher(source.mean, source.std, source.num_classes)
        count = len(source.test) if self.limit is None else min(self.limit, len(source.test))
        for batch in loader.batches(eval_plan(count, self.batch_size)):
            yield finish(batch.images, batch.targets)[0]


def open_student(run: RunDir, checkpoint: Path | None = None) -> nn.Module:
    """Rebuilds the student of a run, as it was at a checkpoint or at the end.

    Args:
        run: folder of the run; with a checkpoint it need not have finished.
        checkpoint: folder like ``step_00000123``; its moving average is taken where there is one, as at the end.

    Raises:
        UserError: not a run, not finished, or not a checkpoint of it.
    """
    if checkpoint is None:
        return trained_student(run)[0]
    description = _description(run)
    tensors = load_checkpoint(checkpoint).tensors
    state = tensors.get("ema") or {
        name.removeprefix("student."): value for name, value in tensors["method"].items() if name.startswith("student.")
    }
    with torch.random.fork_rng(devices=[]):
        student = build_model(ModelRecipe(description["student"]["name"]), description["student"]["kwargs"], "student")
    try:
        student.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"the checkpoint {checkpoint} does not fit the student of {run.path}: {error}") from None
    return student.eval()


def open_teacher(recipe: Recipe, source: DataSource) -> nn.Module:
    """Rebuilds the trained teacher of a recipe.

    Args:
        recipe: of the student.
        source: its data.

    Raises:
        UserError: the recipe has no teacher, or that has not been trained.
    """
    if recipe.teacher is None:
        raise UserError(f"{recipe.name} has no teacher; name the run to compare with: fastmkd cka RUN OTHER.")
    found = find_teacher(recipe, refuse_to_train)
    return build_model(found, model_kwargs(found, source), "teacher").eval()


def curves(
    run: RunDir, other: nn.Module, batches: Batches, layers: Any, pairs: Sequence[tuple[str, str]] | None = None
) -> tuple[list[int], dict[str, list[float]]]:
    """CKA with another network at each checkpoint of a run (DPK, Fig. 7).

    Args:
        run: its folder.
        other: what its student is compared with.
        batches: images.
        layers: see `fastmkd.metrics.compare`.
        pairs: which layer pairs; None takes layers of equal rank, or the last of each if they are not equally many.

    Returns:
        The checkpoints' updates, and a list of CKA values for each pair.

    Raises:
        UserError: there is no checkpoint.
    """
    folders = sorted(run.checkpoints.glob("step_*"))
    if not folders:
        raise UserError(f"{run.path} has no checkpoints; train with --run.keep=1000 to keep one of each epoch.")
    steps: list[int] = []
    values: dict[str, list[float]] = {}
    for folder in folders:
        found = compare(open_student(run, folder).to(batches.device), other, batches, layers)
        steps.append(load_step(folder))
        for a, b in pairs or _equal_ranks(found):
            value = found.cka[found.names_a.index(a), found.names_b.index(b)]
            values.setdefault(f"{a} - {b}", []).append(float(value))
    return steps, values


def load_step(folder: Path) -> int:
    """The update of a checkpoint's folder.

    Example:
        >>> load_step(Path("step_00000123"))
        123
    """
    return int(folder.name.removeprefix("step_"))


def main(argv: Sequence[str]) -> int:
    """Compares a run's student with its teacher or with another run's student, on the test pictures.

    Writes ``cka.csv`` and a heat map, ``batches.csv`` and the ranked map of one layer pair (DPK, Fig. 5 and 9), and
    with ``--cosine`` ``cosine.csv`` and the same map of cosines (Fig. 10), with ``--training`` ``training.csv`` and
    curves of CKA and of the mask ratio 1 - CKA (Fig. 7 and 8).

    Args:
        argv: after the command's name.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="fastmkd cka", exit_on_error=False, allow_abbrev=False, description=__doc__)
    parser.add_argument("run", type=str, help="folder of a run")
    parser.add_argument("other", type=str | None, nargs="?", help="folder of another run; left out: the run's teacher")
    parser.add_argument("--layers", type=list[str] | None, help="modules of the student, such as '[layer*.*]'")
    parser.add_argument("--other_layers", type=list[str] | None, help="modules of the other; left out: the same")
    parser.add_argument("--pair", type=tuple[str, str] | None, help="layers of the ranked map; left out: the last ones")
    parser.add_argument("--cosine", type=bool, default=False, help="also the ranked map of cosines of that pair")
    parser.add_argument("--training", type=bool, default=False, help="also curves over the run's checkpoints")
    parser.add_argument("--batch_size", type=int, default=32, help="images a minibatch")
    parser.add_argument("--limit", type=int | None, help="test pictures to use; left out: all")
    parser.add_argument("--root", type=str | None, help="folder of the data, if it is not where the run had it")
    parser.add_argument("--device", type=str, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--format", type=str, default="png", help="png, svg or pdf")
    parser.add_argument("--out", type=str | None, help="folder to write; left out: cka in the run's folder")
    arguments = parse(parser, argv)
    if arguments.batch_size < 4:
        raise UserError(f"--batch_size is {arguments.batch_size}; unbiased HSIC needs at least 4 images a minibatch.")
    if arguments.format not in ("png", "svg", "pdf"):
        raise UserError(f"--format is {arguments.format}; expected png, svg or pdf.")
    try:
        device = check_device("--device", arguments.device)
    except ValueError as error:
        raise UserError(str(error)) from None

    run = RunDir(Path(arguments.run))
    recipe = recipe_from_dict(_description(run)["recipe"])
    if arguments.root is not None:
        recipe.data.root = arguments.root
    source = load_data(recipe.data)
    classification_only(source, "fastmkd cka")
    batches = Batches(recipe, source, arguments.batch_size, arguments.limit, device)
    if arguments.other is None:
        other, labels = open_teacher(recipe, source), (f"student {recipe.name}", "teacher")
    else:
        other, labels = open_student(RunDir(Path(arguments.other))), (recipe.name, Path(arguments.other).name)
    other = other.to(device)
    layers = (arguments.layers, arguments.other_layers or arguments.layers)

    out = Path(arguments.out) if arguments.out else run.path / "cka"
    out.mkdir(parents=True, exist_ok=True)
    if run.result() is not None:
        student = open_student(run).to(device)
        found = compare(student, other, batches, layers)
        pair = _pair(found, arguments.pair)
        _write_comparison(found, out, arguments.format, labels, pair)
        if arguments.cosine:
            cosines = compare_cosine(student, other, batches, pair)
            _write_ranked(cosines, out, "cosine", arguments.format, pair, "cosine")
    elif not arguments.training:
        raise UserError(f"the run in {run.path} has not finished; --training=true draws what its checkpoints give.")
    if arguments.training:
        steps, values = curves(run, other, batches, layers, [arguments.pair] if arguments.pair else None)
        _write_curves(steps, values, out, arguments.format)
    sys.stdout.write(f"wrote {', '.join(sorted(path.name for path in out.iterdir()))} to {out}\n")
    return 0


def _pair(found: Comparison, asked: tuple[str, str] | None) -> tuple[str, str]:
    pair = asked or (found.names_a[-1], found.names_b[-1])
    for name, known in zip(pair, (found.names_a, found.names_b), strict=True):
        if name not in known:
            raise UserError(f"--pair names {name!r}, which is not among the compared layers {', '.join(known)}.")
    return pair


def _write_comparison(found: Comparison, out: Path, kind: str, labels: tuple[str, str], pair: tuple[str, str]) -> None:
    names_a, names_b = found.names_a, found.names_b
    rows = [[name, *values] for name, values in zip(names_a, found.cka.tolist(), strict=True)]
    write_table(["layer", *names_b], rows, out / "cka.csv")
    draw_heat_map(found.cka, names_a, names_b, out / f"cka.{kind}", "CKA", labels)
    values = found.per_batch[:, names_a.index(pair[0]), names_b.index(pair[1])]
    _write_ranked(values, out, "batches", kind, pair, "CKA")


def _write_ranked(values: Tensor, out: Path, name: str, kind: str, pair: tuple[str, str], quantity: str) -> None:
    label = " - ".join(pair)
    write_table(["batch", label], list(enumerate(values.tolist())), out / f"{name}.csv")
    draw_ranked(values, out / f"{name}.{kind}", label, quantity)


def _write_curves(steps: list[int], values: dict[str, list[float]], out: Path, kind: str) -> None:
    rows = [[step, *row] for step, *row in zip(steps, *values.values(), strict=True)]
    write_table(["step", *values], rows, out / "training.csv")
    draw_curves(steps, values, out / f"training_cka.{kind}", "CKA")
    # The mask ratio that DPK would take there: 1 - CKA (Eq. 5), within [0, 1].
    ratios = {label: [min(max(1 - value, 0.0), 1.0) for value in curve] for label, curve in values.items()}
    draw_curves(steps, ratios, out / f"training_ratio.{kind}", "mask ratio 1 - CKA")


def _equal_ranks(found: Comparison) -> list[tuple[str, str]]:
    if len(found.names_a) == len(found.names_b):
        return list(zip(found.names_a, found.names_b, strict=True))
    return [(found.names_a[-1], found.names_b[-1])]


def _description(run: RunDir) -> dict[str, Any]:
    description = run.description()
    if description is None:
        raise UserError(f"{run.path} is not the folder of a run: it has no recipe.json; train a recipe first.")
    return description
