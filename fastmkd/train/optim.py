"""Optimizer and learning-rate schedule, both from timm."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .errors import UserError
from .schema import OptimRecipe, ScheduleRecipe

__all__ = ["build_optimizer", "build_schedule"]


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


def build_schedule(recipe: ScheduleRecipe, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> Any:
    """Makes timm's cosine schedule, counted in updates; ``schedule.step_update(n)`` sets the rate of update n + 1.

    Args:
        recipe: the recipe's part `schedule`.
        optimizer: whose learning rates are set.
        updates_per_epoch: to turn epochs into updates.
    """
    from timm.scheduler import CosineLRScheduler

    warmup = round(recipe.warmup_epochs * updates_per_epoch)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, recipe.epochs * updates_per_epoch - warmup),
        warmup_t=warmup,
        warmup_lr_init=recipe.warmup_lr,
        warmup_prefix=True,
        lr_min=recipe.min_lr,
        t_in_epochs=False,
    )
