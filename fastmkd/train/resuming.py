"""How a run is saved and gone on with, by all its processes alike.

`save` writes a checkpoint. `resume` finds the one to go on from, on the main process, and every process takes up just
that one; if any cannot, all raise the same sentence. Those that the run does not go on from are set aside.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from .checkpoint import (
    Checkpoint,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    set_aside,
    state_digest,
)
from .errors import UserError, shorten
from .rundir import RunDir
from .together import by_all, from_main

if TYPE_CHECKING:
    from .engine import Trainer

__all__ = ["bad_pictures", "left_out_batches", "resume", "save"]

SHARED = "run.dir (and run.resume, if it is a path) must be a folder that all processes see"


def save(trainer: Trainer) -> None:
    """Writes a checkpoint; every process must call it.

    Args:
        trainer: the run.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True)
    method, optimizer = get_state_dict(trainer.method, trainer.optimizer.optimizer, options=options)
    moments = {key: value for key, value in optimizer.items() if isinstance(value, Tensor)}
    rest = {key: value for key, value in optimizer.items() if not isinstance(value, Tensor)}
    tensors: dict[str, Any] = {"method": method, "optimizer": moments}
    if trainer.ema is not None:
        tensors["ema"] = get_model_state_dict(trainer.ema.module, options=options)
    accelerator = trainer.accelerator
    state = {
        "images_per_update": trainer.images_per_update,
        "optimizer": rest,
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        "bad": bad_pictures(trainer),
        "skipped": trainer.skips.count,
        "left_out": left_out_batches(trainer),
        "from": trainer.origin,
    }
    if accelerator.is_main_process:
        save_checkpoint(trainer.run.checkpoints, trainer.step, tensors, state, trainer.recipe.run.keep)
    accelerator.wait_for_everyone()


def bad_pictures(trainer: Trainer) -> dict[str, str]:
    """Returns what any process of a run could not read so far, name to reason; every process must call it.

    Args:
        trainer: the run.
    """
    from accelerate.utils import gather_object

    mine = {**trainer.bad, **trainer.loader.bad, **trainer.test_loader.bad}
    return {name: reason for bad in gather_object([mine]) for name, reason in bad.items()}


def left_out_batches(trainer: Trainer) -> int:
    """Returns how many batches the method left out on any process so far; every process must call it.

    Args:
        trainer: the run.
    """
    from accelerate.utils import gather_object

    skipped: Any = getattr(trainer.setup.method, "skipped", None)  # not every method leaves batches out
    return trainer.left_out + sum(gather_object([0 if skipped is None else skipped.count]))


def resume(trainer: Trainer) -> list[str]:
    """Takes up the checkpoint that ``run.resume`` asks for, if there is one; every process must call it.

    Args:
        trainer: a run at its beginning.

    Returns:
        What is to be said: what was wrong with other checkpoints, where they are now, what has changed.

    Raises:
        UserError: on every process, if any of them cannot take up the checkpoint.
    """
    accelerator, run = trainer.accelerator, trainer.run
    here: list[Checkpoint] = []  # what the main process has read

    def find() -> _Choice | None:
        chosen = _choose(run, trainer.recipe.run.resume)
        if chosen is None:
            return None
        here.append(chosen[0])
        return chosen[1]

    choice = from_main(accelerator, find)
    said = [] if choice is None else list(choice.problems)
    if choice is not None:
        found = by_all(accelerator, lambda: here[0] if here else _read(run, choice))
        _take_up(trainer, found)
        trainer.origin = choice.origin
        moved = from_main(accelerator, lambda: [str(path) for path in set_aside(run.checkpoints, choice.path)])
        if moved:
            said.append(
                f"checkpoints that the run does not go on from were moved to {shorten(moved)}; remove them at will."
            )
    changed = from_main(accelerator, lambda: run.restate(trainer.setup.identity, trainer.setup.description))
    if changed and trainer.step:
        said.append(f"from update {trainer.step} on, updates are split otherwise than before: {changed}.")
    return said


class _Choice(NamedTuple):
    """Which checkpoint to take up, as the main process tells the others."""

    path: str
    own: bool  # lies in the folder of the run, which a process looks for where its own run.dir says
    digest: str
    origin: dict[str, str] | None  # path and digest of the one that the user has named, if the run came from it
    problems: list[str]


def _choose(run: RunDir, how: str) -> tuple[Checkpoint, _Choice] | None:
    """Finds and verifies the checkpoint that ``run.resume`` asks for."""
    named = how not in ("auto", "never")
    try:
        found, problems = newest_checkpoint(run.checkpoints)
    except UserError as error:
        if not named:
            raise
        found, problems = None, [str(error)]
    if found is not None and how == "never":
        raise UserError(f"{run.path} already has checkpoints and run.resume is never; choose another run.dir.")
    origin = found.state.get("from") if found is not None else None
    if named and not _is_origin(origin, Path(how)):
        found = load_checkpoint(how)
        origin = {"path": str(Path(how).resolve()), "sha256": found.digest}
    if found is None:
        return None
    return found, _Choice(str(found.path), found.path.parent == run.checkpoints, found.digest, origin, problems)


def _is_origin(origin: Any, path: Path) -> bool:
    """Whether a run came from the checkpoint at a path, which may be gone by now."""
    if not isinstance(origin, dict):
        return False
    digest = state_digest(path)
    return digest == origin.get("sha256") if digest else str(path.resolve()) == origin.get("path")


def _read(run: RunDir, choice: _Choice) -> Checkpoint:
    """Reads on another process what the main one has chosen."""
    path = run.checkpoints / Path(choice.path).name if choice.own else Path(choice.path)
    try:
        found = load_checkpoint(path)
    except UserError as error:
        raise UserError(f"process 0 goes on from {choice.path}. {error} {SHARED}.") from None
    if found.digest != choice.digest:
        raise UserError(f"{path} is another checkpoint than process 0 goes on from; {SHARED}.")
    return found


def _take_up(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Gives a run the state of a checkpoint of the same recipe on as many images per update.

    Raises:
        UserError: it was written with another number of images per update, or does not fit the networks.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_state_dict

    state = checkpoint.state
    parts = {"images_per_update", "optimizer", "scaler", "bad"}
    if not parts <= state.keys() or not {"method", "optimizer"} <= checkpoint.tensors.keys():
        raise UserError(f"the checkpoint at update {checkpoint.step} is not one of a training run; use another.")
    if state["images_per_update"] != trainer.images_per_update:
        raise UserError(
            f"the checkpoint was made with {state['images_per_update']} images per update and this run has "
            f"{trainer.images_per_update}; use as many processes as before, or change data.batch_size or "
            "optim.accumulate so that their product with the processes is what it was."
        )
    if checkpoint.step > trainer.total or (trainer.ema is not None) != ("ema" in checkpoint.tensors):
        raise UserError(f"the checkpoint at update {checkpoint.step} is of another recipe; change run.resume.")
    # JSON has no tuples; optimizers compare and unpack betas as one.
    rest: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in state["optimizer"].items()}
    tensors: dict[str, Any] = checkpoint.tensors
    missing = sorted(trainer.setup.method.state_dict().keys() - tensors["method"].keys())
    if missing:  # PyTorch would leave these as they are
        raise UserError(f"the checkpoint does not fit this recipe: it lacks {shorten(missing)}.")
    options = StateDictOptions(full_state_dict=True)
    optimizer: Any = trainer.optimizer.optimizer
    chosen = _hyperparameters(optimizer)
    try:
        set_state_dict(
            trainer.method,
            optimizer,
            model_state_dict=tensors["method"],
            optim_state_dict={**tensors["optimizer"], **rest},
            options=options,
        )
        if trainer.ema is not None:
            set_model_state_dict(trainer.ema.module, tensors["ema"], options=options)
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"the checkpoint does not fit this recipe: {error}") from None
    for group, own in zip(optimizer.param_groups, chosen, strict=True):
        group.update(own)
    scaler = trainer.accelerator.scaler
    if scaler is not None and state["scaler"] is not None:
        scaler.load_state_dict(state["scaler"])
    trainer.bad, trainer.skips.count = dict(state["bad"]), state.get("skipped", 0)
    trainer.left_out = state.get("left_out", 0)
    trainer.step = checkpoint.step


def _hyperparameters(optimizer: Any) -> list[dict[str, Any]]:
    """What the recipe has decided of each group, which a checkpoint of another recipe must not: rates, decay, betas.

    The rest of a group's keys are what the optimizer keeps there of its own, such as how many steps it has made.
    """
    base = getattr(optimizer, "_base_optimizer", optimizer)  # of timm's Lookahead
    arguments = inspect.signature(type(base)).parameters
    return [
        {
            key: value
            for key, value in group.items()
            if key != "params" and (key in arguments or key not in optimizer.defaults)
        }
        for group in optimizer.param_groups
    ]
