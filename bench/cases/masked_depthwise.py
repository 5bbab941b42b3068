"""Depthwise convolutions on masked batches: the 7x7 layers of ConvNeXt-T and the 3x3 layers of MobileNetV2."""

from __future__ import annotations

from typing import Any

from ..masked_layers import DIRECTIONS, layers_case, layers_of, runs_here
from ..registry import Case, Setting, benchmark

NETWORKS = {"ConvNeXt-T 7x7": ("convnext_tiny", 7), "MobileNetV2 3x3": ("mobilenetv2_100", 3)}


def _grid(setting: Setting) -> list[dict[str, Any]]:
    if not runs_here(setting):
        return []
    shares = [75] if setting.quick else [10, 50, 75]
    directions = DIRECTIONS[1:] if setting.quick and not setting.on_gpu else DIRECTIONS
    return [{"network": n, "percent": p, "direction": d} for n in NETWORKS for d in directions for p in shares]


@benchmark("masked_depthwise", summary="depthwise layers under a block mask, against the dense twin", grid=_grid)
def masked_depthwise(setting: Setting, network: str, percent: int, direction: str) -> Case:
    """Random maps; all depthwise layers of the network."""
    layers = layers_of(*NETWORKS[network], depthwise=True)
    return layers_case(setting, layers, percent, direction, 256 if setting.on_gpu else 16, f"{network} depthwise")
