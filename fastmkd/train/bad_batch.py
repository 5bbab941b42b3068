"""What happens when a loss is infinite or NaN: the batch is kept for a look, the update may be left out and counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .checkpoint import save_tensors
from .errors import UserError, shorten

if TYPE_CHECKING:
    from ..methods import DistillOutput
    from .engine import Trainer

__all__ = ["Skips", "Tried", "keep_bad_batch"]

GRADIENT, LOSS = 1.0, 2.0  # what is not finite; a bad loss of one process is a bad gradient of all


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
    the forward pass has already changed. All processes leave out the same updates, even if only one has a bad batch.

    Args:
        trainer: the run.

    Attributes:
        count: updates that were left out, of the whole run.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.allowed = trainer, trainer.recipe.optim.skip_nonfinite
        self.count = 0
        self._names = set(trainer.method.state_dict()) if self.allowed else set()
        self._before: list[Tensor] = []

    def begin(self) -> None:
        """Notes the buffers as they are before an update."""
        if not self.allowed:
            return
        if self._before:
            _copy(self._before, self._buffers())
        else:
            self._before = [buffer.clone() for buffer in self._buffers()]

    def _buffers(self) -> list[Tensor]:
        """Those of a checkpoint: what is in none is a constant, or resumed runs would not end as whole ones do."""
        return [buffer for name, buffer in self.trainer.method.named_buffers() if name in self._names]

    def tried(self, out: DistillOutput, images: Any, targets: Any) -> Tried:
        """Notes what is needed of a batch once the gradient of the whole update is there.

        Args:
            out: of the method.
            images: as the method got them.
            targets: as the method got them.
        """
        terms = {name: value.detach() for name, value in out.terms.items()}
        return Tried(out.loss.detach(), terms, len(images), (images, targets) if self.allowed else None)

    def leaves_out(self, batches: Sequence[Tried], norm: Tensor | None) -> bool:
        """Whether the update, which counts as done but for the optimizer, is left out; then it is undone and counted.

        Args:
            batches: of the update.
            norm: of their gradient; None leaves that to the scaler, which looks at it and lowers its scale.

        Raises:
            UserError: it is one more than allowed.
        """
        trainer, accelerator = self.trainer, self.trainer.accelerator
        if not self.allowed:
            return False
        bad = ~torch.stack([batch.loss for batch in batches]).isfinite().all()
        verdict = bad.float() * LOSS
        if norm is not None:
            whole: Tensor = getattr(norm, "full_tensor", lambda: norm)()  # of FSDP, a DTensor
            verdict = torch.where(bad, verdict, (~whole.isfinite()).float() * GRADIENT)
        verdicts = accelerator.gather(verdict[None]).tolist()  # of all processes: the one wait of an update
        if not any(verdicts):
            return False
        trainer.optimizer.zero_grad()
        _copy(self._buffers(), self._before)
        self.count += 1
        number = trainer.step
        said = f"the loss or gradient of update {number} of {trainer.total} is not finite."
        if self.count == 1:
            guilty = [rank for rank, verdict in enumerate(verdicts) if verdict == max(verdicts)]
            if accelerator.process_index in guilty:
                one = next((one for one in batches if not bool(one.loss.isfinite())), batches[0])
                assert one.batch is not None
                _keep(trainer, *one.batch, number)
            said += _where(trainer, guilty, number)
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
    _keep(trainer, images, targets, step + 1)
    return _where(trainer, [trainer.accelerator.process_index], step + 1)


def _keep(trainer: Trainer, images: Any, targets: Any, number: int) -> None:
    tensors = dict(_named("images", images)) | dict(_named("targets", targets))
    path = _path(trainer, trainer.accelerator.process_index)
    save_tensors(path, tensors, {"format": "pt", "update": str(number)})


def _where(trainer: Trainer, ranks: Sequence[int], number: int) -> str:
    return f" The batch of update {number} is in {shorten([str(_path(trainer, rank)) for rank in ranks])}."


def _path(trainer: Trainer, rank: int) -> Path:
    return trainer.run.path / f"bad_batch_{rank}.safetensors"


def _copy(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """Copies tensors, all of one type at once: batch norms have hundreds of small ones."""
    for kind in {tensor.dtype for tensor in to}:
        ours, theirs = ([x for x in side if x.dtype == kind] for side in (to, source))
        torch._foreach_copy_(ours, theirs)


def _named(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """A tensor as it is, those in lists and dicts as ``targets.0.boxes``."""
    if isinstance(value, Tensor):
        yield name, value
        return
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _named(f"{name}.{key}", part)
