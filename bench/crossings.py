"""Measures from which visible share on a masked convolution is faster dense, and writes the table that ``auto`` reads.

``python -m fastmkd.bench.crossings`` times layers as real networks have them, each on a masked batch, through the
packed op and the dense way in interleaved rounds, forward and backward and then forward alone: with nothing hidden, a
tenth, and on to more as long as dense wins. The crossing lies between the last share at which dense won and the next;
it goes into the part ``dense_from`` of ``fastmkd/ops/tables/<device>.json``, beside device, versions and date. Stop
other work first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmkd import block_mask
from fastmkd.nn.crossings import PART, TABLES, device_key, layer_class
from fastmkd.nn.dense_way import dense_convolve
from fastmkd.nn.plan import MaskPlan, Window
from fastmkd.ops.masked_conv2d import masked_conv2d

from .environment import describe
from .progress import bar
from .timing import Clock, Plan, make_clock, ratios, time_interleaved

__all__ = ["LAYERS", "Shape", "crossing", "main", "measure"]

GRID = 7
HIDDEN = (0.0, 0.1, 0.25, 0.53)  # with more hidden, rows save memory that a dense map would take back
ALWAYS = 2  # so many of HIDDEN are timed even if dense loses: with nothing hidden its loss may be by chance
MARGIN = 1.05  # dense must win by this much: a tie is packed, which needs less memory
PLAN = Plan(seconds=0.3, min_rounds=7, max_rounds=30, warmup_seconds=0.05)


class Shape(NamedTuple):
    """A layer: channels in and out, kernel, stride, groups, side of its input map, and images in the batch."""

    cin: int
    cout: int
    kernel: int
    stride: int
    groups: int
    size: int
    batch: int = 16

    def window(self) -> Window:
        """An odd kernel pads with half of it, an even one (patches) not at all."""
        k, s, p = self.kernel, self.stride, self.kernel // 2 if self.kernel % 2 else 0
        return Window((k, k), (s, s), (p, p), (1, 1))

    def named(self, dtype: torch.dtype, training: bool = True) -> str:
        """The class that this layer stands for."""
        cell = self.size // GRID
        return layer_class(dtype, (self.cin, self.cout), self.window(), (cell, cell), self.groups, training)


def _depthwise(kernel: int, stride: int, layers: dict[int, int]) -> list[Shape]:
    return [Shape(width, width, kernel, stride, width, size) for size, width in layers.items()]


LAYERS = [
    # stems: ResNet, MobileNet, VGG, CIFAR, ConvNeXt
    Shape(3, 64, 7, 2, 1, 224, 8),
    Shape(3, 32, 3, 2, 1, 224, 8),
    Shape(3, 64, 3, 1, 1, 224, 4),
    *(Shape(3, 16, 3, 1, 1, size, 64) for size in (56, 28)),
    Shape(3, 96, 4, 4, 1, 224, 8),
    # CIFAR's narrow networks, ResNet, VGG
    *(Shape(16, 16, 3, 1, 1, size, 64) for size in (56, 28, 14, 7)),
    *(Shape(32, 32, 3, 1, 1, size, 32) for size in (56, 28, 14, 7)),
    *(Shape(64, 64, 3, 1, 1, size, batch) for size, batch in {112: 4, 56: 16}.items()),
    *(Shape(128, 128, 3, 1, 1, size) for size in (28, 14, 7)),
    *(Shape(256, 256, 3, 1, 1, size) for size in (28, 14)),
    Shape(512, 512, 3, 1, 1, 7),
    *(Shape(16, 32, 3, 2, 1, size, 64) for size in (56, 28, 14)),
    *(Shape(32, 64, 3, 2, 1, size, 64) for size in (56, 28, 14)),
    *(Shape(64, 128, 3, 2, 1, size) for size in (56, 28, 14)),
    *(Shape(256, 256, 3, 2, 1, size) for size in (28, 14)),
    # ConvNeXt's down-sampling
    *(Shape(width, 2 * width, 2, 2, 1, size) for size, width in {56: 96, 28: 192, 14: 384}.items()),
    # MobileNet, EfficientNet, ConvNeXt
    *(Shape(32, 32, 3, 1, 32, size, batch) for size, batch in {112: 8, 56: 16, 28: 32}.items()),
    *_depthwise(3, 1, {56: 144, 28: 192, 14: 576, 7: 960}),
    *_depthwise(3, 2, {112: 96, 56: 144, 28: 192, 14: 576}),
    *_depthwise(5, 1, {28: 240, 14: 480, 7: 1152}),
    *_depthwise(5, 2, {56: 144, 14: 672}),
    *_depthwise(7, 1, {56: 96, 28: 192, 14: 384, 7: 768}),
    # ResNeXt
    *(Shape(width, width, 3, 1, 32, size) for size, width in {56: 128, 28: 256, 14: 512, 7: 1024}.items()),
    *(Shape(width, width, 3, 2, 32, size) for size, width in {56: 256, 28: 512, 14: 1024}.items()),
]


def ways(
    shape: Shape, hidden: float, device: torch.device, dtype: torch.dtype, training: bool
) -> dict[str, Callable[[], Any]]:
    """Returns a layer's pass, packed and dense: its output, or the gradients of values and weight (images get none).

    Args:
        shape: the layer.
        hidden: share of the cells that a block mask hides.
        device: where to run.
        dtype: of values and weight.
        training: forward and backward, not forward alone.
    """
    generator = torch.Generator().manual_seed(0)
    mask = block_mask(shape.batch, (GRID, GRID), hidden, generator=generator)
    plan, window = MaskPlan(mask.to(device)), shape.window()
    cell = (shape.size // GRID, shape.size // GRID)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    values = draw(plan.num_rows(cell), shape.cin).requires_grad_(training and shape.cin > 4)
    weight = draw(shape.cout, shape.cin // shape.groups, *window.kernel).requires_grad_(training)
    taps = plan.taps(cell, window)
    tables = (taps.forward, taps.backward, taps.forward_order, taps.backward_order)
    grad = draw(len(taps.forward), shape.cout)
    leaves = [leaf for leaf in (values, weight) if leaf.requires_grad]

    def passing(forward: Callable[[], Tensor]) -> Callable[[], Any]:
        return (lambda: torch.autograd.grad(forward(), leaves, grad)) if training else lambda: [forward()]

    return {
        "packed": passing(lambda: masked_conv2d(values, weight, None, *tables, shape.groups)),
        "dense": passing(lambda: dense_convolve(values, weight, None, plan, cell, window, shape.groups)),
    }


def measure(
    shape: Shape, clock: Clock, plan: Plan, device: torch.device, dtype: torch.dtype, training: bool = True
) -> dict[float, float]:
    """Returns how many times faster dense is, by visible share, down to the first share at which it loses.

    Args:
        shape: the layer.
        clock: how a sample is taken.
        plan: how long to measure.
        device: where to run.
        dtype: of values and weight.
        training: forward and backward, not forward alone.
    """
    gains: dict[float, float] = {}
    for number, hidden in enumerate(HIDDEN):
        times = time_interleaved(ways(shape, hidden, device, dtype, training), clock, plan)
        share = 1 - round(hidden * GRID**2) / GRID**2
        gains[share] = ratios(times, "packed")["dense"].median
        if gains[share] < MARGIN and number + 1 >= ALWAYS:
            break
    return gains


def crossing(gains: dict[float, float]) -> float | None:
    """Returns the least visible share from which dense wins, or None if it never does.

    Args:
        gains: how many times faster dense is, by visible share.

    Example:
        >>> crossing({1.0: 1.5, 0.9: 1.2, 0.7: 0.9}), crossing({1.0: 0.9, 0.9: 0.8})
        (0.8, None)
    """
    shares = sorted(gains)
    won = [share for share in shares if gains[share] >= MARGIN]
    if not won:
        return None
    place = shares.index(won[0])
    low = won[0]
    if place:  # in logarithms the gain is near a straight line between two measured shares
        below, above = (math.log(gains[shares[i]] / MARGIN) for i in (place - 1, place))
        low -= (low - shares[place - 1]) * above / (above - below)
    return math.floor(100 * low) / 100


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m fastmkd.bench.crossings``; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m fastmkd.bench.crossings", description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32"])
    parser.add_argument("--only", default="", help="regular expression: measure these classes, keep what is on record")
    parser.add_argument("--out", type=Path, default=TABLES, help="folder of the tables")
    arguments = parser.parse_args(argv)
    device, clock = arguments.device, make_clock(arguments.device, device_time=False)
    every = itertools.product(LAYERS, (getattr(torch, name) for name in arguments.dtype), (True, False))
    runs = {shape.named(dtype, training): (shape, dtype, training) for shape, dtype, training in every}
    runs = {named: run for named, run in runs.items() if re.search(arguments.only, named)}
    found: dict[str, float | None] = {}
    with bar(len(runs)) as shown:
        for named, run in runs.items():
            shown.start(named)
            gains = measure(run[0], clock, PLAN, device, *run[1:])
            found[named] = crossing(gains)
            gained = ", ".join(f"{gain:.2f}x at {share:.2f}" for share, gain in gains.items())
            print(f"{named:64} dense from {found[named] or 'never':5}  ({gained})", flush=True)
    path = arguments.out / f"{device_key(device)}.json"
    known = json.loads(path.read_text()) if path.is_file() else {"choices": {}}
    known[PART] = {**known.get(PART, {}), **found}
    about = {key: describe(device)[key] for key in ("date", "commit", "torch", "device", "threads")}
    known["measured"] = {**known.get("measured", {}), **dict.fromkeys(arguments.dtype, about)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
