"""From which visible share on a masked convolution is faster dense: a table of measured crossings.

The table is the part ``dense_from`` of ``fastmkd/ops/tables/<device>.json``, written by ``python -m
fastmkd.bench.crossings``: for each class of layers the visible share from which on the dense way
(`fastmkd.nn.dense_way`) wins, or null where it never does; once forward and backward together, and once for a forward
pass alone, of which copying takes a larger part. What is not in a table stays packed, as on an unknown device all does.

Nothing is measured at run time, and the share follows from numbers that the host knows.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .._native_loader import load
from ..ops import cache, choice
from .plan import MaskPlan, Pair, Window

__all__ = ["TABLES", "device_key", "goes_dense", "layer_class", "read_table"]

TABLES = Path(cache.__file__).parent / "tables"
PART = "dense_from"
WIDTHS = (4, 16, 32, 64, 256)  # a layer of 128 channels counts as one of 64
REBUILD = "rebuild it with `python -m fastmkd.bench.crossings`"


def goes_dense(values: Tensor, weight: Tensor, plan: MaskPlan, cell: Pair, window: Window, groups: int) -> bool:
    """Returns whether a convolution is to take the dense way.

    Never inside ``fastmkd.backend(...)`` of a name other than "auto", under ``torch.use_deterministic_algorithms``, or
    with a padding that differs before and after the map.

    Args:
        values: ``(N, Cin)`` rows.
        weight: ``(Cout, Cin / groups, kh, kw)``.
        plan: the batch's plan.
        cell: ``(ch, cw)`` of the input map.
        window: kernel, stride, padding and dilation.
        groups: as in `torch.nn.Conv2d`.

    Example:
        >>> plan, window = MaskPlan(torch.ones(1, 2, 2).bool()), Window((3, 3), (1, 1), (1, 1), (1, 1))
        >>> with choice.backend("eager"):
        ...     goes_dense(torch.zeros(16, 4), torch.zeros(4, 4, 3, 3), plan, (2, 2), window, 1)
        False
    """
    if choice.forced() != "auto" or torch.are_deterministic_algorithms_enabled() or window.padding_end is not None:
        return False
    training = torch.is_grad_enabled() and (values.requires_grad or weight.requires_grad)
    named = layer_class(values.dtype, (values.shape[1], weight.shape[0]), window, cell, groups, training)
    crossing = _crossing(values.device, named)
    if crossing is None:
        return False
    if torch.compiler.is_compiling():  # a mask made inside the graph: its count may have no value yet
        from torch.fx.experimental.symbolic_shapes import guard_or_false

        return guard_or_false(plan.visible_share >= crossing)
    return plan.visible_share >= crossing


def layer_class(
    dtype: torch.dtype, channels: Pair, window: Window, cell: Pair, groups: int, training: bool = True
) -> str:
    """Returns the class of layers that share a crossing.

    Args:
        dtype: of values and weight.
        channels: ``(Cin, Cout)``.
        window: kernel, stride, padding and dilation.
        cell: ``(ch, cw)`` of the input map.
        groups: as in `torch.nn.Conv2d`.
        training: a backward pass follows.

    Example:
        >>> layer_class(torch.float32, (64, 128), Window((3, 3), (2, 2), (1, 1), (1, 1)), (8, 8), 1)
        'float32/64 channels/3x3/stride 2/cell 8'
    """
    width = max([WIDTHS[0], *[step for step in WIDTHS if step <= min(channels)]])
    kind = "" if groups == 1 else "depthwise, " if groups == channels[0] else "grouped, "
    area, side = cell[0] * cell[1], 1
    while side < 32 and 4 * side * side <= area:
        side *= 2
    (kh, kw), stride = window.kernel, max(window.stride)
    name = f"{str(dtype).removeprefix('torch.')}/{kind}{width} channels/{kh}x{kw}/stride {stride}/cell {side}"
    return name if training else f"{name}/forward"


def device_key(device: torch.device) -> str:
    """Returns the name of a device's table; for a CPU it names the instruction set that the kernels use.

    Args:
        device: where the rows are.

    Example:
        >>> device_key(torch.device("cpu")).startswith("cpu-")
        True
    """
    if device.type != "cpu":
        return cache.device_name(device)
    status = load()
    return f"cpu-{status.isa or 'unknown'}" if status.cpu else "cpu-eager"


@lru_cache(maxsize=16)
def read_table(path: Path) -> dict[str, float | None]:
    """Reads the crossings of a device.

    Args:
        path: of its table; a file that does not exist, or says nothing about crossings, is an empty table.

    Raises:
        ValueError: something else than shares in (0, 1], or null, by class of layer.

    Example:
        >>> read_table(Path("no such table"))
        {}
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text()).get(PART, {})
        entries = list(found.items())
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a table of a device ({error}); {REBUILD}.") from None
    for named, share in entries:
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if share is not None and not (number and 0 < share <= 1):
            raise ValueError(
                f"{path} has {share!r} for {named!r} in {PART!r}; expected a visible share in (0, 1] or null. "
                f"Correct it, or {REBUILD}."
            )
    return dict(found)


@torch.compiler.assume_constant_result
def _crossing(device: torch.device, named: str) -> float | None:
    path = TABLES / f"{device_key(device)}.json"
    if not path.is_file() and path.stem == "cpu-avx512_bf16" and named.startswith("float32/"):
        path = TABLES / "cpu-avx512.json"  # the float32 kernels are the same code
    return read_table(path).get(named)
