"""Training the classifier only, on a frozen backbone in eval mode (MaskedKD, Appendix C; DPK, Table 16)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor, nn

from .base import DistillMethod
from .views import classifier_of

__all__ = ["NormedLinear", "ProbingMethod", "all_but_classifier"]


def all_but_classifier(student: nn.Module) -> list[str]:
    """Names the parameters that a linear probe freezes.

    Args:
        student: a network of timm, or a `fastmkd.MaskedViT`.

    Raises:
        ValueError: the network has no classifier, or does not say which layer it is.

    Example:
        >>> import timm
        >>> frozen = all_but_classifier(timm.create_model("vit_tiny_patch16_224", depth=1))
        >>> "head.weight" in frozen, "pos_embed" in frozen
        (False, True)
    """
    if not hasattr(getattr(student, "model", student), "get_classifier"):
        raise ValueError(
            f"linear_probe needs a student with get_classifier(), as timm's; {type(student).__name__} has none."
        )
    trained = {id(p) for layer in classifier_of(student) for p in layer.parameters()}
    if not trained:
        raise ValueError("student has no classifier to train; create it with num_classes above 0.")
    return [name for name, p in student.named_parameters() if id(p) not in trained]


class NormedLinear(nn.Sequential):
    """Batch norm without weights before a linear classifier, as MAE's linear probe has it; the two make one linear map.

    Args:
        linear: the classifier; stays the same object.

    Example:
        >>> NormedLinear(nn.Linear(4, 3))(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    EPS = 1e-6

    def __init__(self, linear: nn.Linear) -> None:
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        norm = nn.BatchNorm1d(linear.in_features, eps=self.EPS, affine=False, **like)  # type: ignore[arg-type]
        assert norm.running_var is not None
        norm.running_var.fill_(1 - self.EPS)  # changes nothing before it has seen a batch
        super().__init__(norm, linear)

    @classmethod
    def fold(cls, weights: dict[str, Tensor], name: str) -> None:
        """Replaces both layers in a state dict by the linear one that computes the same in eval mode.

        Args:
            weights: changed in place.
            name: of the layer.
        """
        dtype = weights[f"{name}.1.weight"].dtype
        parts = ("0.running_mean", "0.running_var", "1.weight", "1.bias")
        mean, var, weight, bias = (weights.pop(f"{name}.{part}").double() for part in parts)
        del weights[f"{name}.0.num_batches_tracked"]
        weight = weight / (var + cls.EPS).sqrt()  # (K, D)
        weights[f"{name}.weight"], weights[f"{name}.bias"] = weight.to(dtype), (bias - weight @ mean).to(dtype)


class ProbingMethod(DistillMethod):
    """A method that can train the student's classifier alone.

    Args:
        student: the network to train.
        teacher: the network to learn from, or None.
        linear_probe: freeze all but the classifier, and keep it in eval mode.
        batch_norm: put a batch norm without weights before the classifier for as long as the method owns the student;
            `release` and `bare_weights` make the two one linear layer.
        teacher_device: keeps the teacher on this device.

    Raises:
        ValueError: `linear_probe` with a student that has no classifier, or does not say which layer it is;
            `batch_norm` without `linear_probe`, or before something else than a linear layer with a bias.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        linear_probe: bool = False,
        batch_norm: bool = False,
        teacher_device: torch.device | str | None = None,
    ) -> None:
        if batch_norm and not linear_probe:
            raise ValueError("batch_norm is true and linear_probe is not; it goes before the classifier of a probe.")
        self.linear_probe = linear_probe  # unreachable_parameters, which the base class calls, asks for it
        super().__init__(student, teacher, teacher_device=teacher_device)
        self._normed: list[str] = []
        if batch_norm:
            try:
                self._add_batch_norm()
            except ValueError:
                self.release()
                raise
        if linear_probe:
            self.train(self.training)

    def _add_batch_norm(self) -> None:
        layers = classifier_of(self.student)
        names = {id(module): name for name, module in self.student.named_modules()}
        for layer in layers:
            if not isinstance(layer, nn.Linear) or layer.bias is None:
                raise ValueError(f"batch_norm needs a linear classifier with a bias; that of the student is {layer}.")
        for layer in layers:
            name = names[id(layer)]
            self.student.set_submodule(name, NormedLinear(layer))  # type: ignore[arg-type]
            self._normed.append(name)

    def unreachable_parameters(self, student: nn.Module) -> Iterable[str]:
        """Names everything but the classifier if only that is trained.

        Args:
            student: the student, as passed.
        """
        return all_but_classifier(student) if self.linear_probe else ()

    def bare_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Folds the batch norm, if there is one, into the classifier.

        Args:
            weights: of the student as it is now.
        """
        weights = dict(weights)
        for name in self._normed:
            NormedLinear.fold(weights, name)
        return weights

    def release(self) -> nn.Module:
        """Gives student and teacher back as they came; a batch norm becomes a part of the classifier."""
        student = super().release()
        weights = self.bare_weights(student.state_dict())
        for name in self._normed:
            student.set_submodule(name, student.get_submodule(name)[1])  # type: ignore[index]
        if self._normed:
            student.load_state_dict(weights)
        self._normed = []
        return student

    def train(self, mode: bool = True) -> Self:
        """Sets the student's mode, of the classifier alone if only that is trained; the teacher stays in eval mode.

        Args:
            mode: True for training.
        """
        super().train(mode)
        if self.linear_probe:
            self.student.eval()
            for layer in classifier_of(self.student):
                layer.train(mode)
        return self
