"""A sliding window as the layers of a network describe it."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Pair", "Window"]

Pair = tuple[int, int]


class Window(NamedTuple):
    """A sliding window as `torch.nn.Conv2d` describes it; each entry is ``(vertical, horizontal)``.

    Attributes:
        kernel: taps.
        stride: steps.
        padding: what lies around the map, before it (above and left), and after it too unless `padding_end` says so.
        dilation: distance between taps.
        padding_end: what lies after the map (below and right) where that differs, as with an even kernel and "same".
    """

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    padding_end: Pair | None = None

    def output_size(self, size: Pair) -> Pair:
        """Returns the size of the output map.

        Args:
            size: ``(H, W)`` of the input map.

        Example:
            >>> Window((3, 3), (2, 2), (1, 1), (1, 1)).output_size((32, 64))
            (16, 32)
        """
        after = self.padding if self.padding_end is None else self.padding_end
        height, width = (
            (size[a] + self.padding[a] + after[a] - self.dilation[a] * (self.kernel[a] - 1) - 1) // self.stride[a] + 1
            for a in (0, 1)
        )
        return height, width
