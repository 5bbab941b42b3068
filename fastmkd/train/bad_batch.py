"""What happens when a loss is infinite or NaN: the batch is kept for a look, the update may be left out and counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .checkpoint import save_tensors
from .errors import UserError

if TYPE_CHECKING:
    from ..methods import DistillOutput
    from .engine import Trainer

__all__ = ["Skips", "Tried", "keep_bad_batch"]


class Tried(NamedTuple):
    """A batch whose gradient there is.

    Attributes:
        loss: scalar.
        terms: scalars by name.
        size: how many images.
        batch: images and targets as the method got them, if the update may be left out.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    size: int
    batch: tuple[Any, Any] | None


class Skips:
    """Leaves out updates whose loss or gradient is not finite, as many as ``optim.skip_nonfinite`` allows.

    The update then changes nothing: neither weights nor the optimizer, nor buffers such as running statistics, which
    the forward pass has already changed. All processes leave out the same updates.

    Args:
        trainer: the run.

    Attributes:
        count: updates that were left out, of the whole run.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.allowed = trainer, trainer.recipe.optim.skip_nonfinite
        self.count = 0
        self._buffers: list[Tensor] = []

    def begin(self) -> None:
        """Notes the buffers as they are before an update."""
        if self.allowed:
            self._buffers = [buffer.clone() for buffer in self.trainer.method.buffers()]

    def tried(self, out: DistillOutput, images: Any, targets: Any) -> Tried:
        """Notes what is needed of a batch once the gradient of the whole update is there.

        Args:
            out: of the method.
            images: as the method got them.
            targets: as the method got them.
        """
        terms = {name: value.detach() for name, value in out.terms.items()}
        return Tried(out.loss.detach(), terms, len(images), (images, targets) if self.allowed else None)

    def leaves_out(self, batches: Sequence[Tried]) -> bool:
        """Whether the update, which counts as done but for the optimizer, is left out; then it is undone and counted.

        Args:
            batches: of the update.

        Raises:
            UserError: it is one more than allowed.
        """
        trainer, accelerator = self.trainer, self.trainer.accelerator
        if not self.allowed:
            return False
        good = torch.stack([batch.loss for batch in batches]).isfinite().all()
        if accelerator.scaler is None:  # which leaves out too large gradients itself and lowers its scale
            norm = torch.nn.utils.get_total_norm([p.grad for p in trainer.parameters if p.grad is not None])
            good &= getattr(norm, "full_tensor", lambda: norm)().isfinite()  # of FSDP, a DTensor
        if not bool(accelerator.reduce((~good).float())):
            return False
        trainer.optimizer.zero_grad()
        for buffer, before in zip(trainer.method.buffers(), self._buffers, strict=True):
            buffer.copy_(before)
        self.count += 1
        number = trainer.step
        said = f"the loss or gradient of update {number} of {trainer.total} is not finite."
        if self.count == 1:
            bad = [one for one in batches if not bool(one.loss.isfinite())] or batches
            assert bad[0].batch is not None
            said += _keep(trainer, *bad[0].batch, number)
        if self.count > self.allowed:
            raise UserError(
                f"{said} {self.count} updates were not, more than optim.skip_nonfinite, {self.allowed}: training has "
                "diverged. Lower optim.lr, lengthen schedule.warmup_epochs or set optim.clip_grad; the last checkpoint "
                "is intact."
            )
        accelerator.print(f"{said} It was left out, number {self.count} of at most {self.allowed}.")
        return True


def keep_bad_batch(trainer: Trainer, losses: Sequence[Tensor], epoch: int) -> str:
    """Writes the first batch whose loss is not finite to the run's folder, as the method got it.

    It is made again from its position, so that no step waits.

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
    accumulate = trainer.recipe.optim.accumulate
    number = trainer.step * accumulate - len(losses) + bad[0]  # of all batches of the run
    in_epoch = number - epoch * trainer.updates_per_epoch * accumulate
    step, micro = divmod(number, accumulate)
    batch = next(trainer.loader.batches(trainer.plan(epoch)[: in_epoch + 1], epoch, start=in_epoch))
    images, targets = trainer.finished(batch, step, micro)
    return _keep(trainer, images, targets, step + 1)


def _keep(trainer: Trainer, images: Any, targets: Any, number: int) -> str:
    path = trainer.run.path / f"bad_batch_{trainer.accelerator.process_index}.safetensors"
    tensors = dict(_named("images", images)) | dict(_named("targets", targets))
    save_tensors(path, tensors, {"format": "pt", "update": str(number)})
    return f" The batch of update {number} is in {path}."


def _named(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """A tensor as it is, those in lists and dicts as ``targets.0.boxes``."""
    if isinstance(value, Tensor):
        yield name, value
        return
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _named(f"{name}.{key}", part)
