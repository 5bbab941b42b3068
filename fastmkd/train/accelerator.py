"""Hugging Face Accelerate, as a recipe wants it: device, precision, how networks are split."""

from __future__ import annotations

from typing import Any

from .errors import UserError
from .schema import Recipe
from .sharding import settle_sharding

__all__ = ["make_accelerator"]


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
    return accelerator
