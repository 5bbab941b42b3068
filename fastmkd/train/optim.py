"""Optimizer (from timm) and learning-rate schedule."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import nn

from .errors import UserError
from .schema import OptimRecipe, ScheduleRecipe

__all__ = ["Schedule", "build_optimizer"]


def build_optimizer(recipe: OptimRecipe, student: nn.Module, heads: nn.Module, images_per_update: int) -> Any:
    """Makes the optimizer of a student and of the method's own heads.

    Biases and norms get no weight decay. With `layer_decay` the student's layers get learning rates that shrink from
    the head down; the method's heads always get the full one.

    Args:
        recipe: the recipe's part `optim`.
        student: the network to train; its frozen parameters are left out.
        heads: the method's own parameters.
        images_per_update: over all processes.

    Raises:
        UserError: timm does not know the optimizer, refuses or ignores an argument, or nothing is to be trained; a run
            with this optimizer could not go on from a checkpoint.

    Example:
        >>> optimizer = build_optimizer(OptimRecipe(lr=0.1, lr_images=10), nn.Linear(2, 2), nn.ModuleDict(), 20)
        >>> optimizer.param_groups[0]["lr"]
        0.2
    """
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    lr = recipe.lr if recipe.lr_images is None else recipe.lr * images_per_update / recipe.lr_images
    says: Any = getattr(student, "no_weight_decay", set)  # timm's networks name parameters such as cls_token
    no_decay = says()
    if recipe.layer_decay is None:
        groups = list(param_groups_weight_decay(student, recipe.weight_decay, no_weight_decay_list=no_decay))
    else:
        groups = list(
            param_groups_layer_decay(
                student, recipe.weight_decay, no_weight_decay_list=no_decay, layer_decay=recipe.layer_decay
            )
        )
    groups += list(param_groups_weight_decay(heads, recipe.weight_decay))
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise UserError("the student has no parameter to train.")
    _refuse_ignored(recipe)
    optimizer = _make(recipe, groups, lr)
    _refuse_unsaved(recipe, groups[0]["params"][0].device)
    return optimizer


def _make(recipe: OptimRecipe, groups: list[dict[str, Any]], lr: float) -> Any:
    from timm.optim import create_optimizer_v2

    try:
        return create_optimizer_v2(groups, recipe.name, lr=lr, **recipe.kwargs)
    except (TypeError, ValueError, AssertionError, KeyError) as error:
        raise UserError(f"timm cannot make optim.name {recipe.name!r} with {recipe.kwargs}: {error}.") from None


def _info(recipe: OptimRecipe) -> Any:
    """What timm says about an optimizer; None if it does not know it, as making it will say."""
    from timm.optim import get_optimizer_info

    try:
        return get_optimizer_info(recipe.name.lower().split("_")[-1])
    except ValueError:
        return None


def _refuse_ignored(recipe: OptimRecipe) -> None:
    """Refuses what timm would take and drop: what belongs to parameter groups, which are made here, and what is unused.

    Raises:
        UserError: names the key and, where there is one, the key of the recipe that does it.
    """
    from timm.optim import create_optimizer_v2

    of_groups = inspect.signature(create_optimizer_v2).parameters.keys() - {"kwargs", "foreach", "momentum"}
    own = {"opt": "optim.name", "lr": "optim.lr", "weight_decay": "optim.weight_decay"}
    own["layer_decay"] = "optim.layer_decay"
    info = _info(recipe)
    for key in recipe.kwargs:
        if key in of_groups:
            advice = f"say {own[key]} instead" if key in own else "remove it, parameter groups are made without it"
            raise UserError(f"optim.kwargs has {key}, which would have no effect there; {advice}.")
        if info is not None and not getattr(info, f"has_{key}", True):
            raise UserError(
                f"optim.kwargs has {key}, which optim.name {recipe.name!r} does not use; remove it. Beside another "
                "name on the command line, --optim.kwargs={} drops those of the recipe."
            )


def _refuse_unsaved(recipe: OptimRecipe, device: torch.device) -> None:
    """Refuses an optimizer whose state no checkpoint can hold: tries one step of it on a parameter of no account.

    Raises:
        UserError: says so before hours of training are lost.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    info = _info(recipe)
    if info is not None and info.second_order:
        raise UserError(f"optim.name {recipe.name!r} needs second derivatives, which are not made here; take adamw.")
    device = torch.device("cpu") if device.type == "meta" else device  # networks without memory take no step
    tried = nn.ParameterDict({"weight": torch.ones(2, 2, device=device)})
    optimizer = _make(recipe, [{"params": list(tried.parameters())}], 0.1)
    tried["weight"].grad = torch.ones_like(tried["weight"])
    try:
        optimizer.step()
    except RuntimeError:
        return  # it runs on GPUs alone, and this is a rehearsal on the CPU
    optimizer.zero_grad()
    why = ""
    if optimizer.state_dict()["state"] and not optimizer.state:  # PyTorch would make another step to have one
        why = "another optimizer inside it holds it"
    else:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True)
        try:
            get_optimizer_state_dict(tried, optimizer, options=options)
        except (ValueError, TypeError, NotImplementedError) as error:
            why = " ".join(str(error).split()).removesuffix(".")
    if why:
        raise UserError(
            f"the state of optim.name {recipe.name!r} cannot be kept in a checkpoint ({why}), so no run could go on "
            "from one; take another, such as adamw."
        )


class Schedule:
    """Sets learning rates: warm-up, half a cosine or steps, and a rate of its own for the last epochs.

    It holds no state: a rate is a function of the update, so that a run that goes on meets the rates it would have met.

    Args:
        recipe: the recipe's part `schedule`.
        optimizer: whose rates are set; each group's own are taken for the full ones, a group's ``lr_scale`` (of layer
            decay) multiplies whatever is set.
        updates_per_epoch: to turn epochs into updates.

    Example:
        >>> optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)
        >>> steps = ScheduleRecipe(epochs=4, warmup_epochs=0, milestones=[1, 2], gamma=0.5, last_lr=2.0, last_epochs=1)
        >>> [Schedule(steps, optimizer, 1).rate(1.0, update) for update in range(4)]
        [1.0, 0.5, 0.25, 2.0]
    """

    def __init__(self, recipe: ScheduleRecipe, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> None:
        def updates(epochs: float) -> int:
            return round(epochs * updates_per_epoch)

        self.recipe, self.optimizer = recipe, optimizer
        self.warmup = updates(recipe.warmup_epochs)
        self.milestones = None if recipe.milestones is None else [updates(epoch) for epoch in recipe.milestones]
        self.last = updates(recipe.epochs - (0 if recipe.last_lr is None else recipe.last_epochs))
        self.full = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
        self.step_update(0)

    def rate(self, full: float, update: int) -> float:
        """Returns the learning rate of an update.

        Args:
            full: the highest one.
            update: updates done before.
        """
        recipe = self.recipe
        if recipe.last_lr is not None and update >= self.last:
            return recipe.last_lr
        if update < self.warmup:
            low = min(recipe.warmup_lr, full)
            return low + update * ((full - low) / self.warmup)
        if self.milestones is not None:
            return full * recipe.gamma ** sum(update >= milestone for milestone in self.milestones)
        length = max(1, self.last - self.warmup)
        gone = min(update - self.warmup, length)
        low = min(recipe.min_lr, full)  # a cosine falls, whatever rate is asked for
        return low + 0.5 * (full - low) * (1 + math.cos(math.pi * gone / length))

    def step_update(self, update: int) -> None:
        """Sets the rates for an update.

        Args:
            update: updates done before.
        """
        for group, full in zip(self.optimizer.param_groups, self.full, strict=True):
            group["lr"] = self.rate(full, update) * group.get("lr_scale", 1.0)
