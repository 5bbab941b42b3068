"""How many pixels lie between two positions of a level, learnt from the sizes of its map."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .dense_networks import PROBE_SIDE, Form, probe_levels

__all__ = ["last_stage", "level_strides", "strides_of"]

Size = tuple[int, int]


def level_strides(network: nn.Module, form: Form, role: str, found: Mapping[str, Tensor], size: Size) -> dict[str, int]:
    """Returns the pixels between two positions of each level, and runs the network again where one image does not tell.

    Args:
        network: the network.
        form: of it.
        role: "student" or "teacher", for messages.
        found: its levels, from `probe_levels`.
        size: ``(H, W)`` of the image that made them.

    Raises:
        ValueError: a level of one position, of a network that takes no larger image or that says as much to it.
    """
    sizes = {level: (x.shape[2], x.shape[3]) for level, x in found.items()}
    strides = strides_of(sizes, size)
    unclear, why = [level for level, stride in strides.items() if stride is None], ""
    if unclear:
        larger = ((size[0] // PROBE_SIDE + 1) * PROBE_SIDE, (size[1] // PROBE_SIDE + 1) * PROBE_SIDE)
        try:
            again = probe_levels(network, form, role, unclear, larger)[0]
        except ValueError:  # as a Swin of one size
            why = ", and it takes no larger one"
            # What takes one size alone rounds up: an attention window is filled, not cut.
            strides |= strides_of({level: sizes[level] for level in unclear}, size, up=True)
        else:
            sizes, size = {level: (x.shape[2], x.shape[3]) for level, x in again.items()}, larger
            strides |= strides_of(sizes, size)
    known: dict[str, int] = {}
    for level, stride in strides.items():
        if stride is None and max(sizes[level]) == 1:
            raise ValueError(
                f"the level {level!r} of the {role} has one position for an image of {size[0]} x {size[1]} "
                f"pixels{why}, so its stride is unknown; give a larger image_size, or "
                "name a level before what pools over the image."
            )
        # No power of two fits where layers do not pad; the map is then a little smaller than its stride says.
        known[level] = stride or 2 ** max(0, round(math.log2(size[0] / sizes[level][0])))
    return known


def strides_of(sizes: Mapping[str, Size], size: Size, up: bool = False) -> dict[str, int | None]:
    """Returns the pixels between two positions of levels, powers of two; None where the sizes do not tell.

    Some layers round up and some down, so 40 pixels are 2 positions at a stride of 16 and of 32, and 1 at all above.

    Args:
        sizes: ``(h, w)`` of each level.
        size: ``(H, W)`` of the image.
        up: all layers are known to round up.

    Example:
        >>> sizes = {"c3": (5, 5), "c4": (3, 3), "c5": (2, 2)}
        >>> strides_of(sizes, (40, 40)), strides_of(sizes, (40, 40), up=True)
        ({'c3': 8, 'c4': 16, 'c5': None}, {'c3': 8, 'c4': 16, 'c5': 32})
    """
    found: dict[str, int | None] = {}
    for level, there in sizes.items():
        axes = list(zip(size, there, strict=True))
        powers = [2**power for power in range(max(size).bit_length() + 1)]
        fit = [s for s in powers if all((-(-n // s) if up else n // s) <= m <= -(-n // s) for n, m in axes)]
        found[level] = fit[0] if len(fit) == 1 else None
    return found


def last_stage(network: nn.Module, form: Form) -> tuple[list[str], int]:
    """Returns what tells how coarse the maps of the masked part become, beyond the levels that are compared.

    Args:
        network: the network.
        form: of it.

    Returns:
        Layers to try, and a stride that is known without; 1 if none is.

    Example:
        >>> import timm
        >>> from fastmkd.methods.dense_networks import form_of
        >>> network = timm.create_model("resnet18")
        >>> last_stage(network, form_of(network, "student"))
        ([], 32)
    """
    if form.part:
        return [form.part], 1
    stages: Any = getattr(network, "feature_info", None)
    if stages:
        return [], max(stages[i]["reduction"] for i in range(len(stages)))
    return list(form.layers), 1
