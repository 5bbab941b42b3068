"""Losses that methods share. All are computed in float32 (float64 for float64 input) whatever the autocast dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cross_entropy", "logit_kd", "squared_error", "wide"]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean cross-entropy against class indices or soft labels (mixup, cutmix, label smoothing).

    Args:
        logits: ``(B, K)`` floating point.
        targets: ``(B,)`` int64 class indices, or ``(B, K)`` floating-point class probabilities.

    Returns:
        Scalar in float32 (float64 for float64 logits).

    Raises:
        ValueError: shapes that do not fit, no images, or on a CPU a class index out of range.
        TypeError: class indices that are not int64.

    Example:
        >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2]))
        tensor(1.3863)
        >>> cross_entropy(torch.zeros(1, 4), torch.tensor([[0.5, 0.5, 0.0, 0.0]]))
        tensor(1.3863)
    """
    _check_logits("logits", logits)
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets is a {type(targets).__name__}; expected a tensor of class indices or soft labels.")
    if targets.device != logits.device:
        raise ValueError(f"targets is on {targets.device} but the logits are on {logits.device}; move one of them.")
    if targets.is_floating_point():
        if targets.shape != logits.shape:
            raise ValueError(
                f"targets has shape {tuple(targets.shape)}; soft labels need that of the logits, {tuple(logits.shape)}."
            )
        targets = targets.to(wide(logits).dtype)
    elif targets.dtype != torch.int64:
        raise TypeError(f"targets has dtype {targets.dtype}; expected int64 classes or floating-point soft labels.")
    elif targets.shape != logits.shape[:1]:
        raise ValueError(f"targets has shape {tuple(targets.shape)}; expected ({logits.shape[0]},), a class per image.")
    elif targets.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = targets.min().item(), targets.max().item()
        if low < 0 or high >= logits.shape[1]:
            raise ValueError(f"targets holds classes {low} to {high}; the logits have 0 to {logits.shape[1] - 1}.")
    return F.cross_entropy(wide(logits), targets)


def logit_kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Returns ``tau^2 * KL(teacher || student)`` of softened predictions, averaged over the batch (Hinton, 2015).

    .. math:: \frac{\tau^2}{B} \sum_{b,c} p^T_{bc} (\log p^T_{bc} - \log p^S_{bc}), \quad p = \mathrm{softmax}(z /
    \tau)

    Args:
        student_logits: ``(B, K)``; the gradient flows here.
        teacher_logits: ``(B, K)``; taken as a constant.
        temperature: tau, positive.

    Returns:
        Scalar in float32 (float64 for float64 logits).

    Raises:
        ValueError: shapes that differ, or no images.

    Example:
        >>> logit_kd(torch.zeros(2, 3), torch.zeros(2, 3))
        tensor(0.)
    """
    _check_logits("student_logits", student_logits)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits has shape {tuple(student_logits.shape)} but teacher_logits {tuple(teacher_logits.shape)}; "
            "student and teacher must tell apart the same classes."
        )
    student = F.log_softmax(wide(student_logits) / temperature, dim=1)
    teacher = F.log_softmax(wide(teacher_logits.detach()) / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the mean squared error of two tensors, which may differ in precision.

    Args:
        student: any shape, floating point.
        teacher: of the same shape.

    Returns:
        Scalar in the wider of both precisions, float32 at least.

    Example:
        >>> squared_error(torch.ones(2, 3).bfloat16(), torch.zeros(2, 3))
        tensor(1.)
    """
    # One dtype for both: PyTorch 2.11's mse_loss takes two but has no gradient for them.
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return F.mse_loss(student.to(dtype), teacher.to(dtype))


def _check_logits(name: str, logits: Tensor) -> None:
    if logits.dim() != 2:
        raise ValueError(
            f"{name} has shape {tuple(logits.shape)}; expected (B, classes). A model with global_pool='' gives "
            "logits for every token; choose another global_pool."
        )
    if logits.shape[0] == 0:
        raise ValueError(f"{name} has shape {tuple(logits.shape)}; a batch needs at least one image.")


def wide(x: Tensor) -> Tensor:
    """Returns a tensor in float32, float64 as it is.

    Args:
        x: any floating point.

    Example:
        >>> wide(torch.zeros(1, dtype=torch.bfloat16)).dtype, wide(torch.zeros(1).double()).dtype
        (torch.float32, torch.float64)
    """
    return x if x.dtype == torch.float64 else x.float()
