"""Does a method's accuracy hold? Studies of settings x seeds, one record a run, and the tables of ``docs/evidence.md``.

    python -m fastmkd.bench.evidence recipes/evidence/NAME    trains what has no record yet, then writes the page
    python -m fastmkd.bench.evidence                          only writes the page

A study is a folder with a ``study.yaml`` (see `Study`) and the recipes that it names. It can be stopped at any time: a
run with a record is not trained again, and an unfinished one goes on from its checkpoint. Records go to
``bench/results/evidence/NAME.jsonl``; each holds the whole recipe, the scores and the curve of the training.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastmkd.methods import MaskedKD
from fastmkd.train.augment import Finisher
from fastmkd.train.build import assemble
from fastmkd.train.engine import train
from fastmkd.train.errors import UserError
from fastmkd.train.interrupt import RunInterrupted
from fastmkd.train.loading import Loader, eval_plan
from fastmkd.train.models import load_weights
from fastmkd.train.recipe import differences, identity, load_recipe, with_defaults
from fastmkd.train.rundir import RunDir
from fastmkd.train.schema import Recipe
from fastmkd.train.seeds import seed_all

from .environment import REPOSITORY, describe, results_folder
from .pages import add_page, keep_page, parse_page
from .report import fill_markers

__all__ = ["Study", "main", "render", "run"]

Record = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """What ``study.yaml`` says.

    Args:
        folder: where it lies; its name is the study's.
        recipe: file of the recipe that all settings share.
        seeds: of the runs of every setting.
        settings: changes to the recipe by dotted key, by the name of the setting.
        against: the setting from which the table takes differences.
        asked: what the study should show: ``{setting, over, least}``, the one at least so many points over the other.
        teachers: recipes of the teachers by the setting under which each is recorded; trained once for all seeds.
    """

    folder: Path
    recipe: str
    seeds: list[int]
    settings: dict[str, dict[str, Any]]
    against: str
    asked: list[dict[str, Any]]
    teachers: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Study:
        """Reads and checks ``study.yaml`` of a folder.

        Raises:
            UserError: the file is missing, or a key or a setting's name is wrong.
        """
        import yaml

        path = folder / "study.yaml"
        if not path.is_file():
            raise UserError(f"{folder} has no study.yaml; give the folder of a study, see recipes/evidence/.")
        try:
            study = cls(folder, **yaml.safe_load(path.read_text()))
        except (TypeError, yaml.YAMLError) as error:
            raise UserError(f"{path} is not a study: {error}.") from None
        named = {study.against, *(ask[key] for ask in study.asked for key in ("setting", "over"))}
        if unknown := sorted(named - set(study.settings)):
            raise UserError(f"{path} compares {', '.join(unknown)}; its settings are {', '.join(study.settings)}.")
        return study

    def runs(self, root: Path) -> list[tuple[str, Recipe]]:
        """All runs as (setting, recipe), teachers first, then seed by seed, so that a part of them is a whole table.

        Args:
            root: folder for the runs.
        """
        common = {"run.root": str(root), "run.tensorboard": False}
        runs = [(name, load_recipe(self.folder / file, changes=common)) for name, file in self.teachers.items()]
        for seed in self.seeds:
            for setting, options in self.settings.items():
                slug = re.sub(r"\W+", "_", setting).strip("_").lower()
                changes = {**options, **common, "seed": seed, "name": f"{self.folder.name}-{slug}-{seed}"}
                runs.append((setting, load_recipe(self.folder / self.recipe, changes=changes)))
        return runs


def changes(record: dict[str, Any], recipe: Recipe) -> str:
    """Says what a recipe has otherwise than the one a record was made with, or '' if nothing.

    Args:
        record: of a run.
        recipe: as it is now.
    """
    new = identity(recipe)
    return differences(with_defaults(record["recipe"], new, dataclasses.asdict(recipe)), new)


def run(study: Study, records: Path, root: Path) -> None:
    """Trains every run of a study that has no record yet and writes its record.

    Args:
        study: what to train.
        records: the study's file of records, appended to.
        root: folder for the runs.

    Raises:
        UserError: a record was made with another recipe; the keys that differ are named.
    """
    known = {(record["setting"], record["seed"]): record for record in load(records)}
    for setting, recipe in study.runs(root):
        if (record := known.get((setting, recipe.seed))) is not None:
            if changed := changes(record, recipe):
                raise UserError(
                    f"{records} has a record of {setting!r}, seed {recipe.seed}, from another recipe: {changed}. "
                    "Remove that line and the run's folder to train it again."
                )
            continue
        result = train(recipe)
        found = {
            "study": study.folder.name,
            "setting": setting,
            "seed": recipe.seed,
            **{key: result[key] for key in ("top1", "top5", "loss", "images", "updates", "seconds")},
            "teacher_top1": teacher_top1(recipe, result["weights"]),
            "recipe": identity(recipe),
            "curve": curve(RunDir(recipe.run_dir).metrics),
            "env": describe(torch.device("cpu")),
        }
        records.parent.mkdir(parents=True, exist_ok=True)
        with records.open("a") as file:
            file.write(json.dumps(found) + "\n")


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
    setup = assemble(recipe, train)
    method, source = setup.method.eval(), setup.source
    if not isinstance(method, MaskedKD):
        return None
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


def tables(study: Study, records: Sequence[Record]) -> str:
    """What was asked and what was measured, then all settings; means and sample deviations over the seeds."""
    top1: dict[str, dict[int, float]] = {}
    teacher: dict[str, list[float]] = {}
    for record in records:
        top1.setdefault(record["setting"], {})[record["seed"]] = record["top1"]
        if record["teacher_top1"] is not None:
            teacher.setdefault(record["setting"], []).append(record["teacher_top1"])
    parts = [caption(study, records), "| asked, in points | measured, ± standard error | |\n| --- | --- | --- |"]
    for ask in study.asked:
        gaps = paired(top1, ask["setting"], ask["over"])
        if gaps:
            margin = statistics.mean(gaps) - ask["least"]
            shown = "shown" if margin >= 0 else "**not shown**"
            if len(gaps) < 2 or abs(margin) < statistics.stdev(gaps) / len(gaps) ** 0.5:
                shown += ", within the error"
            measured = spread(gaps, signed=True, error=True)
            sentence = f"{ask['setting']} over {ask['over']}: at least {ask['least']:+.1f}"
            parts[-1] += f"\n| {sentence} | {measured} | {shown} |"
    head = ["setting", "test top-1", *(f"seed {seed}" for seed in study.seeds), f"against {study.against}"]
    head += ["teacher on what it is shown"] * bool(teacher)
    parts.append(line(head) + "\n" + line(["---"] * len(head)))
    for setting in (*study.teachers, *study.settings):
        scores = top1.get(setting)
        if scores is None:
            continue
        cells = [setting, spread(list(scores.values())), *[""] * (len(head) - 2)]
        if setting in study.settings:
            cells[2 : 2 + len(study.seeds)] = [f"{scores[s]:.2f}" if s in scores else "" for s in study.seeds]
            gaps = [] if setting == study.against else paired(top1, setting, study.against)
            cells[2 + len(study.seeds)] = spread(gaps, signed=True) if gaps else ""
            if setting in teacher:
                cells[-1] = spread(teacher[setting])
        parts[-1] += "\n" + line(cells)
    return "\n\n".join(parts)


def caption(study: Study, records: Sequence[Record]) -> str:
    """Where the numbers come from."""
    made = {
        f"{env['date'][:10]}, commit {(env['commit'] or 'unknown')[:10]}{' with changes' * bool(env['dirty'])}, "
        f"torch {env['torch']}, {env['device']}"
        for env in (record["env"] for record in records)
    }
    wanted = len(study.seeds) * len(study.settings) + len(study.teachers)
    count = f"{len(records)} runs" if len(records) == wanted else f"{len(records)} of {wanted} runs, **not finished**"
    command = f"`python -m fastmkd.bench.evidence recipes/evidence/{study.folder.name}`"
    return f"{command}: {count}; {'; '.join(sorted(made))}."


def paired(top1: dict[str, dict[int, float]], setting: str, over: str) -> list[float]:
    """Differences of two settings, seed by seed."""
    first, second = top1.get(setting, {}), top1.get(over, {})
    return [first[seed] - second[seed] for seed in first if seed in second]


def spread(values: Sequence[float], signed: bool = False, error: bool = False) -> str:
    """Mean ± sample deviation, or ± the standard error of the mean; a single value stands alone.

    Example:
        >>> spread([1.0, 2.0, 3.0]), spread([1.0, 2.0, 3.0], signed=True, error=True), spread([4.0])
        ('2.00 ± 1.00', '+2.00 ± 0.58', '4.00')
    """
    mean = f"{statistics.mean(values):{'+' if signed else ''}.2f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / (len(values) ** 0.5 if error else 1):.2f}"


def line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


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
    add_page(parser, "evidence.md")
    arguments = parse_page(parser, None if argv is None else list(argv))
    if arguments.study is not None:
        try:
            study = Study.read(arguments.study.resolve())
            run(study, arguments.results / f"{study.folder.name}.jsonl", arguments.runs)
        except UserError as error:
            parser.error(str(error))
        except RunInterrupted as stopped:
            print(stopped, file=sys.stderr)
            return 130
        print(tables(study, load(arguments.results / f"{study.folder.name}.jsonl")))
    return keep_page(arguments, parser.prog, lambda old: render(old, arguments.results, arguments.studies))


if __name__ == "__main__":
    sys.exit(main())
