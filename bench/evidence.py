"""Does a method's accuracy hold? Studies of settings x seeds, one record a run, and the tables of ``docs/evidence.md``.

    python -m fastmkd.bench.evidence recipes/evidence/NAME    trains what has no record yet, then writes the page
    python -m fastmkd.bench.evidence                          only writes the page

A study is a folder with a ``study.yaml`` (see `Study`) and the recipes that it names. Where its settings pre-train,
second halves follow each of them: fine-tuning, linear probes, few labels. It can be stopped at any time: a run with a
record is not trained again, and an unfinished one goes on from its checkpoint; ``--seeds 0`` trains the teachers and
one seed first. A set that the study makes (`fastmkd scenes`) is made in the folder for the runs. Records go to
``bench/results/evidence/NAME.jsonl``; each holds the whole recipe, the scores and the curve of the training.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastmkd.methods import MaskedKD
from fastmkd.train.augment import Finisher
from fastmkd.train.build import assemble, method_class
from fastmkd.train.checkpoint import atomic_write
from fastmkd.train.engine import train
from fastmkd.train.errors import UserError
from fastmkd.train.interrupt import RunInterrupted
from fastmkd.train.loading import Loader, eval_plan
from fastmkd.train.models import load_weights
from fastmkd.train.rundir import RunDir
from fastmkd.train.scenes_command import write_scenes
from fastmkd.train.schema import Recipe
from fastmkd.train.seeds import seed_all

from .environment import REPOSITORY, describe, results_folder
from .evidence_tables import tables
from .pages import add_page, keep_page, parse_page
from .report import fill_markers
from .study import Record, Run, Study

__all__ = ["load", "main", "render", "run"]

# Of a result: what a record says otherwise, or what is of the machine.
NOT_SCORES = ("name", "weights", "epochs", "bad_pictures", "images_per_second", "milliseconds_per_update")


def run(study: Study, records: Path, root: Path, seeds: Iterable[int] | None = None) -> None:
    """Trains every run of a study that has no record yet and writes its record.

    Args:
        study: what to train.
        records: the study's file of records, which grows.
        root: folder for the runs.
        seeds: train the runs of these, and the teachers; None trains all.

    Raises:
        UserError: a record was made with another recipe; the keys that differ are named.
    """
    known = {(record["setting"], record.get("then"), record["seed"]): record for record in load(records)}
    missing = []
    for one in study.runs(root):
        record = known.get((one.setting, one.then, one.recipe.seed))
        if record is None:
            if seeds is None or one.setting in study.teachers or one.recipe.seed in seeds:
                missing.append(one)
        elif changed := one.changes(record):
            which = f"{one.setting!r}, {f'{one.then}, ' if one.then else ''}seed {one.recipe.seed}"
            raise UserError(
                f"{records} has a record of {which}, from another recipe: {changed}. "
                "Remove that line and the run's folder to train it again."
            )
    if missing and study.scenes is not None and not study.made_set(root).exists():
        root.mkdir(parents=True, exist_ok=True)
        write_scenes(study.made_set(root), study.scenes)
    for one in missing:
        if one.first is not None:
            train(one.first)  # has been, unless its folder was lost
        add(records, measure(study, one))


def measure(study: Study, one: Run) -> Record:
    """Trains a run, or goes on with it, and returns its record.

    Args:
        study: whose run it is.
        one: what to train.
    """
    result = train(one.recipe)
    return {
        "study": study.folder.name,
        "setting": one.setting,
        **({"then": one.then} if one.then else {}),
        "seed": one.recipe.seed,
        **{name: value for name, value in result.items() if name not in NOT_SCORES},
        "teacher_top1": teacher_top1(one.recipe, result["weights"]),
        **one.identities(),
        "curve": curve(RunDir(one.recipe.run_dir).metrics),
        "env": describe(torch.device("cpu")),
    }


@torch.no_grad()
def teacher_top1(recipe: Recipe, weights: str, images: int = 1000) -> float | None:
    """Top-1 of the teacher on what a trained student's MaskedKD shows it of test pictures, in percent.

    Args:
        recipe: of a finished run.
        weights: of its student.
        images: how many test pictures, the first ones.

    Returns:
        None for a method that asks no ViT teacher.
    """
    if not issubclass(method_class(recipe), MaskedKD):
        return None
    setup = assemble(recipe, train)
    method: Any = setup.method.eval()
    source = setup.source
    load_weights(setup.student, weights, "student")
    seed_all(recipe.seed, "teacher_top1")
    loader = Loader(source.test, recipe.data, None, source.image_size, torch.device("cpu"), recipe.seed)
    finish, hits, count = Finisher(source.mean, source.std, source.num_classes), 0, 0
    for batch in loader.batches(eval_plan(min(images, len(source.test)), 250)):
        pictures, targets = finish(batch.images, batch.targets)
        scores = method.patch_scores(pictures).values if method.hides_patches else None
        hits += int((method.teacher_logits(pictures, scores).argmax(1) == targets).sum())
        count += len(targets)
    return 100 * hits / count


def curve(metrics: Path) -> dict[str, list[list[float]]]:
    """``metrics.csv`` of a run as ``{name: [[update, value], ...]}``, without speeds and rates; four digits."""
    found: dict[str, list[list[float]]] = {}
    for row in csv.DictReader(metrics.open(newline="")):
        if row["name"].startswith(("train.", "test.")):
            found.setdefault(row["name"], []).append([int(row["step"]), float(f"{float(row['value']):.4g}")])
    return found


def load(records: Path) -> list[Record]:
    """The records of a study; none if the file does not exist."""
    return [json.loads(line) for line in records.read_text().splitlines()] if records.is_file() else []


def add(records: Path, record: Record) -> None:
    """Appends a record; whenever it is killed, the file is whole."""
    text = "".join(json.dumps(found) + "\n" for found in (*load(records), record))
    atomic_write(records, lambda part: part.write_text(text))


def render(page: str, results: Path, studies: Path) -> str:
    """Returns the page with everything between its markers made anew.

    Args:
        page: Markdown with ``<!-- begin: NAME -->`` for a study, ``<!-- begin: NAME.txt -->`` for a printed log.
        results: folder of the records and logs.
        studies: folder of the studies.
    """

    def body(name: str) -> str:
        if name.endswith(".txt"):
            path = results / name
            return f"```\n{path.read_text().strip()}\n```" if path.is_file() else ""
        records = load(results / f"{name}.jsonl")
        return tables(Study.read(studies / name), records) if records else ""

    return fill_markers(page, body)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m fastmkd.bench.evidence``.

    Args:
        argv: arguments; those of the process by default.

    Returns:
        Exit status: with ``--check``, 1 when the page is not what the records say.
    """
    parser = argparse.ArgumentParser(prog="python -m fastmkd.bench.evidence", description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, nargs="?", help="folder of a study to train")
    parser.add_argument("--results", type=Path, default=results_folder() / "evidence")
    parser.add_argument("--studies", type=Path, default=REPOSITORY / "recipes" / "evidence")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "evidence", help="folder for weights")
    parser.add_argument("--seeds", type=int, nargs="+", help="train these only, and the teachers")
    add_page(parser, "docs/evidence.md")
    arguments = parse_page(parser, None if argv is None else list(argv))
    if arguments.study is not None:
        try:
            study = Study.read(arguments.study.resolve())
            run(study, arguments.results / f"{study.folder.name}.jsonl", arguments.runs, arguments.seeds)
        except UserError as error:
            parser.error(str(error))
        except RunInterrupted as stopped:
            print(stopped, file=sys.stderr)
            return 130
        print(tables(study, load(arguments.results / f"{study.folder.name}.jsonl")))
    return keep_page(arguments, parser.prog, lambda old: render(old, arguments.results, arguments.studies))


if __name__ == "__main__":
    sys.exit(main())
