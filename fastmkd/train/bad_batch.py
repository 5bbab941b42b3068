"""The batch that made a loss infinite or NaN, kept for a look; made again from its position, so that no step waits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .checkpoint import save_tensors

if TYPE_CHECKING:
    from .engine import Trainer

__all__ = ["keep_bad_batch"]


def keep_bad_batch(trainer: Trainer, losses: Sequence[Tensor], epoch: int) -> str:
    """Writes the first batch whose loss is not finite to the run's folder, as the method got it.

    Args:
        trainer: right after the last of these batches.
        losses: of the last batches of this process, the newest last.
        epoch: theirs.

    Returns:
        A sentence that says where it is; nothing if only another process has such a batch.
    """
    bad = [i for i, loss in enumerate(losses) if not bool(loss.isfinite())]
    if not bad:
        return ""
    accumulate, rank = trainer.recipe.optim.accumulate, trainer.accelerator.process_index
    number = trainer.step * accumulate - len(losses) + bad[0]  # of all batches of the run
    in_epoch = number - epoch * trainer.updates_per_epoch * accumulate
    step, micro = divmod(number, accumulate)
    batch = next(trainer.loader.batches(trainer.plan(epoch)[: in_epoch + 1], epoch, start=in_epoch))
    images, targets = trainer.finished(batch, step, micro)
    path = trainer.run.path / f"bad_batch_{rank}.safetensors"
    tensors = dict(_named("images", images)) | dict(_named("targets", targets))
    save_tensors(path, tensors, {"format": "pt", "update": str(step + 1)})
    return f" The batch of update {step + 1} is in {path}."


def _named(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """A tensor as it is, those in lists and dicts as ``targets.0.boxes``."""
    if isinstance(value, Tensor):
        yield name, value
        return
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _named(f"{name}.{key}", part)
