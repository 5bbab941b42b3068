"""ResNet-50's sixteen 3x3 convolutions on masked batches: all together, and the layers of each stride at 75 %."""

from __future__ import annotations

from typing import Any

from ..masked_layers import DIRECTIONS, layers_case, layers_of, runs_here
from ..registry import Case, Setting, benchmark

SIDE = 224
ALL = "ResNet-50's sixteen 3x3 layers"


def _grid(setting: Setting) -> list[dict[str, Any]]:
    if not runs_here(setting):
        return []
    small = setting.quick and not setting.on_gpu
    shares, strides = ([75], []) if small else ([10, 50, 75], [4, 8, 16, 32])
    alone = DIRECTIONS[:1] if setting.quick else DIRECTIONS
    whole = [{"stride": 0, "percent": p, "direction": d} for d in DIRECTIONS for p in shares]
    return whole + [{"stride": s, "percent": 75, "direction": d} for d in alone for s in strides]


@benchmark("masked_conv3x3", summary="ResNet-50's 3x3 layers under a block mask, against the dense twin", grid=_grid)
def masked_conv3x3(setting: Setting, stride: int, percent: int, direction: str) -> Case:
    """Random maps; `stride` picks the layers whose output has it, 0 takes all."""
    layers = layers_of("resnet50", 3, depthwise=False, side=SIDE)
    chosen = [layer for layer in layers if stride in (0, SIDE // layer.out_size)]
    panel = f"3x3 layers of stride {stride}" if stride else ALL
    return layers_case(setting, chosen, percent, direction, 256 if setting.on_gpu else 16, panel)
