"""Moving averages of networks: kept in float32 at least, and how it is noticed that a network has been trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Self

import torch
from torch import Tensor, nn

__all__ = ["Averages", "at_least_float32", "fingerprint"]

HALF = (torch.float16, torch.bfloat16)
# Numbers of the width of a weight, and what they are summed in; wider sums would copy all the weights.
BITS = {
    1: (torch.int8, torch.int32),
    2: (torch.int16, torch.int32),
    4: (torch.int32, torch.int32),
    8: (torch.int64, torch.int64),
}


class Averages(nn.ModuleDict):
    """Copies of networks that are not trained, in eval mode, and never narrower than float32.

    A step of a moving average is a small share of a small difference. With the 8 bits of bfloat16 it is rounded away,
    and the average stands still; so ``half()``, ``bfloat16()`` and ``to(dtype)`` do not narrow these copies.

    Args:
        networks: what is averaged, by name.

    Example:
        >>> averages = Averages({"net": nn.Linear(2, 2).bfloat16()}).half()
        >>> averages["net"].weight.dtype
        torch.float32
    """

    def __init__(self, networks: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__({name: copy.deepcopy(network) for name, network in (networks or {}).items()})
        super()._apply(lambda tensor: tensor.float() if tensor.dtype in HALF else tensor)
        self.requires_grad_(False).eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(lambda tensor: at_least_float32(tensor, fn(tensor)), recurse)


def at_least_float32(before: Tensor, after: Tensor) -> Tensor:
    """Returns a tensor that was moved or cast, without the rounding if it was cast to half precision.

    Args:
        before: as it was.
        after: as it became.

    Example:
        >>> at_least_float32(torch.ones(1), torch.ones(1).half()).dtype
        torch.float32
    """
    narrowed = after.dtype in HALF and before.dtype not in HALF
    return before.to(after.device) if narrowed else after


@torch.no_grad()
def fingerprint(parameters: Iterable[Tensor]) -> Tensor:
    """Returns whole numbers that are others once a weight has changed by as little as its last bit.

    Weights are read as whole numbers. Vectors (biases, norms) are kept as they are, of larger tensors the sum is taken,
    modulo its width. Whole numbers are exact: no order of summation and no number of threads changes them, and a change
    is not too small to be seen. A step could only stay unseen if it left all vectors as they were and the changes of
    every larger tensor cancelled to the last bit. Nothing waits for the device, and in contrast to the counters of
    PyTorch's tensors (``_version``) it sees fused optimizers and whoever writes to ``p.data``.

    Args:
        parameters: of a network.

    Returns:
        int64; as many numbers as the vectors have elements, and one for each other tensor.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> before = fingerprint(layer.parameters())
        >>> layer.weight.data[1, 2] += 1e-6
        >>> before.shape, torch.equal(before, fingerprint(layer.parameters()))
        (torch.Size([3]), False)
    """
    found = []
    for parameter in parameters:
        kind, wide = BITS[parameter.element_size()]
        bits = parameter.detach().view(kind)
        found.append(bits if bits.dim() == 1 else bits.sum(dtype=wide).view(1))
    return torch.cat(found).to(torch.int64)
