"""Normalisation of packed maps: statistics are taken over the visible positions, hidden ones are left alone.

Batch norm is a layer here, since its layer holds the choice of statistics; layer norm and group norm are functions, so
every layer that calls `torch.nn.functional.layer_norm` or ``group_norm`` takes packed maps as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .masked_conv import fixed_order
from .packed import PackedFeatures
from .where import where

__all__ = ["MaskedBatchNorm2d", "MaskedSyncBatchNorm", "VisibleStatistics", "group_norm", "layer_norm"]


class VisibleStatistics:
    """What masked batch norms share; a mixin that stands before a subclass of `torch.nn.BatchNorm2d`.

    Attributes:
        stats: ``"visible"``, means and variances over visible positions; ``"all"``, hidden positions count as zeros.

    Example:
        >>> issubclass(MaskedBatchNorm2d, VisibleStatistics)
        True
    """

    stats: str = "visible"

    def normalise(self, x: PackedFeatures) -> PackedFeatures:
        """Normalises a packed map as the layer's own forward does a dense one, running statistics included.

        Args:
            x: ``(B, C, H, W)``, packed.

        Raises:
            ValueError: a wrong number of channels, or channels last.
        """
        norm: Any = self  # a torch.nn.BatchNorm2d
        if x.channels_last or x.shape[1] != norm.num_features:
            raise ValueError(
                f"a batch norm got a packed map of shape {tuple(x.shape)}{where()}; expected {norm.num_features} "
                "channels in dimension 1."
            )
        momentum = 0.0 if norm.momentum is None else norm.momentum
        if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if norm.momentum is None:
                momentum = 1.0 / float(norm.num_batches_tracked)
        from_batch = norm.training or (norm.running_mean is None and norm.running_var is None)
        tracked = not norm.training or norm.track_running_stats
        mean, var = (norm.running_mean, norm.running_var) if tracked else (None, None)
        group = self.ranks()
        pytorchs = not from_batch or (group is None and self.stats == "visible")
        if pytorchs and not fixed_order(x.values):
            rows = F.batch_norm(x.values, mean, var, norm.weight, norm.bias, from_batch, momentum, norm.eps)
            return x.with_values(rows)
        if from_batch:
            hidden = 0 if self.stats == "visible" else x.plan.batch * x.size_hw[0] * x.size_hw[1] - len(x.values)
            if group is None and len(x.values) + hidden == 1:
                raise ValueError(
                    f"a batch norm got 1 value per channel{where()}; expected more than 1 value per channel."
                )
            centre, spread, count = _batch_statistics(x.values, hidden, group)
            if mean is not None and var is not None and norm.training:
                with torch.no_grad():
                    mean.lerp_(centre.to(mean.dtype), momentum)
                    var.lerp_((spread * count / (count - 1)).to(var.dtype), momentum)
        else:
            centre, spread = norm.running_mean, norm.running_var
        scale = (spread + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight
        rows = (x.values - centre) * scale
        rows = rows if norm.bias is None else rows + norm.bias
        return x.with_values(rows.to(x.dtype))

    def ranks(self) -> Any:
        """Returns the process group over which to take batch statistics, None for this process alone."""
        return None


class MaskedBatchNorm2d(VisibleStatistics, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` that also takes packed maps.

    Example:
        >>> from fastmkd.nn.packed import pack
        >>> x = pack(torch.tensor([[[[1.0, 3.0, 9.0, 9.0]]]]), torch.tensor([[[True, False]]]))
        >>> norm = MaskedBatchNorm2d(1)
        >>> norm(x).values.flatten()
        tensor([-1.0000,  1.0000], grad_fn=<ViewBackward0>)
        >>> norm.running_mean  # a tenth of the way to 2
        tensor([0.2000])
    """

    def forward(self, input: Any) -> Any:
        """Normalises a packed map, or a dense one as `torch.nn.BatchNorm2d` does.

        Args:
            input: `PackedFeatures` or ``(B, C, H, W)``.
        """
        return self.normalise(input) if isinstance(input, PackedFeatures) else super().forward(input)


class MaskedSyncBatchNorm(VisibleStatistics, nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` that also takes packed maps; ranks weigh by how many positions they see.

    Packed maps may be on a CPU too.

    Example:
        >>> from fastmkd.nn.packed import pack
        >>> x = pack(torch.tensor([[[[1.0, 3.0, 9.0, 9.0]]]]), torch.tensor([[[True, False]]]))
        >>> MaskedSyncBatchNorm(1)(x).values.flatten()  # one process: as MaskedBatchNorm2d
        tensor([-1.0000,  1.0000], grad_fn=<ViewBackward0>)
    """

    def forward(self, input: Any) -> Any:
        """Normalises a packed map, or a dense one as `torch.nn.SyncBatchNorm` does.

        Args:
            input: `PackedFeatures` or ``(B, C, H, W)``.
        """
        return self.normalise(input) if isinstance(input, PackedFeatures) else super().forward(input)

    def ranks(self) -> Any:
        """Returns the layer's process group if there is more than one process and the layer trains."""
        if not self.training or not dist.is_available() or not dist.is_initialized():
            return None
        group = self.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None


def layer_norm(
    input: PackedFeatures,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> PackedFeatures:
    """`torch.nn.functional.layer_norm` over the channels of a packed map in channels-last order.

    Args:
        input: ``(B, H, W, C)``, packed, as after ``permute(0, 2, 3, 1)``.
        normalized_shape: ``(C,)``.
        weight: ``(C,)`` or None.
        bias: ``(C,)`` or None.
        eps: added to the variance.

    Raises:
        ValueError: a norm over anything else than the channels.
    """
    if not input.channels_last or tuple(normalized_shape) != (input.shape[3],):
        raise ValueError(
            f"layer_norm over {tuple(normalized_shape)} got a packed map of shape {tuple(input.shape)}{where()}; it "
            "can normalise the channels when they are last: permute(0, 2, 3, 1) first."
        )
    return input.with_values(F.layer_norm(input.values, tuple(normalized_shape), weight, bias, eps))


def group_norm(
    input: PackedFeatures,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> PackedFeatures:
    """`torch.nn.functional.group_norm` over the visible positions of each image and the channels of each group.

    Args:
        input: ``(B, C, H, W)``, packed.
        num_groups: number of groups G.
        weight: ``(C,)`` or None.
        bias: ``(C,)`` or None.
        eps: added to the variance.

    Raises:
        ValueError: groups that do not divide the channels, or channels last.
    """
    if input.channels_last or input.shape[1] % num_groups:
        raise ValueError(
            f"group_norm with {num_groups} groups got a packed map of shape {tuple(input.shape)}{where()}; the groups "
            "must divide the channels, in dimension 1."
        )
    plan = input.plan
    wide = torch.promote_types(input.dtype, torch.float32)
    x = input.values.to(wide).view(plan.num_cells, -1, num_groups, input.shape[1] // num_groups)  # (V, P, G, C / G)

    def image_mean(t: Tensor) -> Tensor:  # for each cell, the mean over its image: (V, 1, G, 1)
        per_image = torch.segment_reduce(t.mean((1, 3)), "mean", lengths=plan.cells_per_image, unsafe=True)  # (B, G)
        return per_image[plan.image_of_cells][:, None, :, None]

    centred = x - image_mean(x)
    rows = (centred * (image_mean(centred.square()) + eps).rsqrt()).view(input.values.shape)
    rows = rows if weight is None else rows * weight
    rows = rows if bias is None else rows + bias
    return input.with_values(rows.to(input.dtype))


def _batch_statistics(rows: Tensor, hidden: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance ``(C,)`` and count, over rows, `hidden` zeros and all ranks; two passes, so exact."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    count = rows.new_tensor([len(rows) + hidden])
    total = _over_ranks(torch.cat((rows.sum(0), count)), group)
    mean, count = total[:-1] / total[-1], total[-1].detach()
    squares = (rows - mean).square().sum(0) + hidden * mean.square()
    return mean, _over_ranks(squares, group) / count, count


def _over_ranks(tensor: Tensor, group: Any) -> Tensor:
    return tensor if group is None else _SumOverRanks.apply(tensor, group)


class _SumOverRanks(torch.autograd.Function):
    """Sum over processes; its gradient is the same sum."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
