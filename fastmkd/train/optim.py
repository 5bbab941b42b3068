"""Optimizer (from timm) and learning-rate schedule."""

from __future__ import annotations

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
        UserError: timm does not know the optimizer or refuses an argument, or nothing is to be trained.

    Example:
        >>> optimizer = build_optimizer(OptimRecipe(lr=0.1, lr_images=10), nn.Linear(2, 2), nn.ModuleDict(), 20)
        >>> optimizer.param_groups[0]["lr"]
        0.2
    """
    from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay

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
    try:
        return create_optimizer_v2(groups, recipe.name, lr=lr, **recipe.kwargs)
    except (TypeError, ValueError, AssertionError, KeyError) as error:
        raise UserError(f"timm cannot make optim.name {recipe.name!r} with {recipe.kwargs}: {error}.") from None


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
            return recipe.warmup_lr + update * ((full - recipe.warmup_lr) / self.warmup)
        if self.milestones is not None:
            return full * recipe.gamma ** sum(update >= milestone for milestone in self.milestones)
        length = max(1, self.last - self.warmup)
        gone = min(update - self.warmup, length)
        return recipe.min_lr + 0.5 * (full - recipe.min_lr) * (1 + math.cos(math.pi * gone / length))

    def step_update(self, update: int) -> None:
        """Sets the rates for an update.

        Args:
            update: updates done before.
        """
        for group, full in zip(self.optimizer.param_groups, self.full, strict=True):
            group["lr"] = self.rate(full, update) * group.get("lr_scale", 1.0)
