"""A study of accuracy: what its ``study.yaml`` says, and the runs that follow from it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastmkd.train.errors import UserError
from fastmkd.train.finetune import DEFAULTS, tuning_recipe
from fastmkd.train.recipe import differences, identity, load_recipe, with_defaults
from fastmkd.train.rundir import RunDir
from fastmkd.train.scenes_command import ScenesRecipe
from fastmkd.train.schema import Recipe

__all__ = ["Ask", "Record", "Run", "SecondHalf", "Study"]

Record = dict[str, Any]


@dataclass(frozen=True)
class Ask:
    """What a study should show.

    Args:
        setting: the one that should be better.
        over: than this one.
        least: by so many points at least, on the mean over the seeds.
        then: after this second half; None in a study without.
    """

    setting: str
    over: str
    least: float
    then: str | None = None


@dataclass(frozen=True)
class SecondHalf:
    """A training that starts from what a setting's, or a teacher's, run has learnt.

    Args:
        command: "finetune" or "probe", whose defaults it has; seed, data and student are those of the run.
        changes: to these defaults, by dotted key.
        of: settings and teachers that it follows; None is all.
    """

    command: Literal["finetune", "probe"]
    changes: dict[str, Any] = field(default_factory=dict)
    of: list[str] | None = None


@dataclass(frozen=True)
class Run:
    """One training of a study.

    Args:
        setting: or the teacher.
        then: name of the second half; None for the training before.
        recipe: what is trained.
        first: recipe of the run whose weights a second half starts from; None otherwise.
        scenes: what the set that it sees was made with; None for any other data.
    """

    setting: str
    then: str | None
    recipe: Recipe
    first: Recipe | None = None
    scenes: dict[str, Any] | None = None

    def seeded(self, seed: int) -> Run:
        """The same with a seed, which the names of its folders end in.

        Args:
            seed: any.
        """

        def of(recipe: Recipe) -> Recipe:
            return dataclasses.replace(recipe, seed=seed, name=f"{recipe.name}-{seed}")

        recipe, first = of(self.recipe), None
        if self.first is not None:
            first = of(self.first)
            recipe.student = dataclasses.replace(recipe.student, backbone=str(RunDir(first.run_dir).weights))
        return dataclasses.replace(self, recipe=recipe, first=first)

    def identities(self) -> dict[str, dict[str, Any]]:
        """What makes the run what it is: its recipe, the first one, the made set, wherever their folders lie."""
        made = {} if self.scenes is None else {"scenes": self.scenes}
        own = identity(self.recipe)
        if self.first is None:
            return {"recipe": own, **made}
        return {"recipe": {**own, "student.backbone": self.first.name}, "first": identity(self.first), **made}

    def changes(self, record: Record) -> str:
        """Says what the run has otherwise than the one a record was made from, or '' if nothing.

        Args:
            record: of the same setting, second half and seed.
        """
        for part, new in self.identities().items():
            old = record.get(part, {})
            if part != "scenes":
                old = with_defaults(old, new, dataclasses.asdict(getattr(self, part)))
            if found := differences(old, new):
                return found
        return ""


@dataclass(frozen=True)
class Study:
    """What ``study.yaml`` says.

    Args:
        folder: where it lies; its name is the study's.
        recipe: file of the recipe that all settings share.
        seeds: of the runs of every setting.
        settings: changes to the recipe by dotted key, by the name of the setting. None trains nothing: what
            follows starts from random weights.
        against: the setting from which the table takes differences.
        asked: what the study should show.
        teachers: recipes of the teachers by the name under which each is recorded; trained once for all seeds.
        then: second halves by name, for studies whose settings pre-train.
        scenes: options of ``fastmkd scenes``, for studies on a set that it makes.
    """

    folder: Path
    recipe: str
    seeds: list[int]
    settings: dict[str, dict[str, Any] | None]
    against: str
    asked: list[Ask]
    teachers: dict[str, str] = field(default_factory=dict)
    then: dict[str, SecondHalf] = field(default_factory=dict)
    scenes: ScenesRecipe | None = None

    @classmethod
    def read(cls, folder: Path) -> Study:
        """Reads and checks ``study.yaml`` of a folder.

        Raises:
            UserError: the file is missing, or a key or a name in it is wrong.
        """
        import yaml

        path = folder / "study.yaml"
        if not path.is_file():
            raise UserError(f"{folder} has no study.yaml; give the folder of a study, see recipes/evidence/.")
        try:
            values = dict(yaml.safe_load(path.read_text()))
            asked = [Ask(**ask) for ask in values.pop("asked", ())]
            then = {name: SecondHalf(**half) for name, half in values.pop("then", {}).items()}
            made = values.pop("scenes", None)
            scenes = None if made is None else ScenesRecipe(**made)
            study = cls(folder, asked=asked, then=then, scenes=scenes, **values)
        except (AttributeError, TypeError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{path} is not a study: {error}.") from None
        study._check(path)
        return study

    def _check(self, path: Path) -> None:
        def known(names: Iterable[str], choices: Iterable[str], what: str) -> None:
            if unknown := sorted(set(names) - set(choices)):
                raise UserError(f"{path} {what} {', '.join(unknown)}; known are {', '.join(choices)}.")

        halves = self.then.values()
        known([self.against], self.settings, "takes differences from")
        known([name for ask in self.asked for name in (ask.setting, ask.over)], self.settings, "compares")
        known([str(ask.then) for ask in self.asked], list(self.then) or ["None"], "asks what is so after")
        known([half.command for half in halves], DEFAULTS, "has a second half by the command")
        known([name for half in halves for name in half.of or ()], [*self.teachers, *self.settings], "goes on from")
        if idle := [name for name in self.settings if not self.count(name)]:
            raise UserError(f"{path} trains nothing for {', '.join(idle)}: null, and no second half follows.")

    def halves(self, setting: str) -> dict[str, SecondHalf]:
        """The second halves that follow a setting or a teacher, by name.

        Args:
            setting: its name.
        """
        return {name: half for name, half in self.then.items() if half.of is None or setting in half.of}

    def pretrains(self, setting: str) -> bool:
        """Whether there is a training before the second halves.

        Args:
            setting: a setting's name, or a teacher's.
        """
        return setting in self.teachers or self.settings[setting] is not None

    def count(self, setting: str) -> int:
        """How many trainings a setting has for each seed, or a teacher in all.

        Args:
            setting: its name.
        """
        return self.pretrains(setting) + len(self.halves(setting))

    def runs(self, root: Path) -> list[Run]:
        """All runs, teachers first, then seed by seed, so that a part of them is a whole table.

        Args:
            root: folder for the runs.
        """
        common = {"run.root": str(root), "run.tensorboard": False}
        if self.scenes is not None:
            common["data.root"] = str(self.made_set(root))
        teachers: list[Run] = []
        chains: list[Run] = []  # parsing a recipe takes time: once for all seeds
        for teacher, file in self.teachers.items():
            teachers += self._chain(teacher, load_recipe(self.folder / file, changes=common), common)
        for setting, options in self.settings.items():
            changes = {**(options or {}), **common, "name": f"{self.folder.name}-{slug(setting)}"}
            chains += self._chain(setting, load_recipe(self.folder / self.recipe, changes=changes), common)
        return [*teachers, *(one.seeded(seed) for seed in self.seeds for one in chains)]

    def made_set(self, root: Path) -> Path:
        """The folder of the set that the study makes, whose name says what is in it.

        Args:
            root: folder for the runs.
        """
        assert self.scenes is not None
        return root / "-".join(["scenes", *map(str, made_with(self.scenes).values())])

    def _chain(self, setting: str, first: Recipe, common: dict[str, Any]) -> list[Run]:
        """The runs of a setting, or of a teacher, from its first recipe."""
        trained = self.pretrains(setting)
        scenes = None if self.scenes is None else made_with(self.scenes)
        found = [Run(setting, None, first, scenes=scenes)] if trained else []
        for then, half in self.halves(setting).items():
            changes = {**half.changes, **common, "name": f"{first.name}-{slug(then)}"}
            if not trained:
                changes["student.backbone"] = None
            recipe = tuning_recipe(half.command, first, changes=changes)
            found.append(Run(setting, then, recipe, first if trained else None, scenes))
        return found


def made_with(scenes: ScenesRecipe) -> dict[str, Any]:
    """The options that decide which set is made; not where its source lies.

    Example:
        >>> made_with(ScenesRecipe(images=8, size=64))
        {'source': 'fashion-mnist', 'images': 8, 'val_images': 2, 'size': 64, 'split': 'hard', 'seed': 0}
    """
    return {key: value for key, value in dataclasses.asdict(scenes).items() if key != "root"}


def slug(name: str) -> str:
    """A name as a part of a folder's name.

    Example:
        >>> slug("DMAE 75 %, top")
        'dmae_75_top'
    """
    return re.sub(r"\W+", "_", name).strip("_").lower()
