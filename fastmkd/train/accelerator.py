"""Hugging Face Accelerate, as a recipe wants it: device, precision, how networks are split."""

from __future__ import annotations

import os
from typing import Any

import torch

from .errors import UserError
from .schema import Recipe
from .sharding import settle_sharding

__all__ = ["make_accelerator", "refuse_precision"]


def refuse_precision(recipe: Recipe) -> None:
    """Refuses to train in a precision that the device of a run cannot do, before anything else is trained for it.

    Args:
        recipe: its part `run` counts.

    Raises:
        UserError: fp16 without a GPU, in place of which Accelerate would take float32 and say nothing.
    """
    from accelerate.utils import parse_flag_from_env

    on_cpu = recipe.run.device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
    if recipe.run.precision == "fp16" and (on_cpu or not torch.accelerator.is_available()):
        raise UserError(
            f"run.precision is fp16 and {recipe.name} is to be trained on the CPU, which has no such mixed "
            "precision; take bf16, or no for float32."
        )


def make_accelerator(recipe: Recipe) -> Any:
    """Returns an Accelerator with the recipe's device and precision.

    Args:
        recipe: its part `run` counts.

    Raises:
        UserError: the device cannot do the precision, or Accelerate is set to split networks in another way than FSDP2.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # A teacher trained in the same process may have used another precision, which Accelerate remembers globally.
    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(mixed_precision=recipe.run.precision, cpu=recipe.run.device == "cpu")
    except ValueError as error:
        raise UserError(f"run.precision is {recipe.run.precision!r}, which does not work here: {error}") from None
    settle_sharding(accelerator)
    if _old_store():
        accelerator.print(
            "warning: torchrun was given --max-restarts, but its restarts may fail: it keeps one store for all of "
            "them, in which new processes find the addresses of dead ones. Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "
            "and give torchrun --standalone or --rdzv-backend=c10d."
        )
    return accelerator


def _old_store() -> bool:
    """Whether processes that torchrun starts anew would meet in the store of those that died."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    return restarts > 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
