"""Outputs of layers as they were returned, though a later layer may work on them in place.

A hook is handed the very tensor that the network goes on with: of a ResNet's ``layer4.1.bn2`` it holds, once the
forward pass is over, what ``x += shortcut`` and an in-place ReLU have made of it. Which layers that happens to is
learned from the black image that a method runs when it is made; of these alone a copy is read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

__all__ = ["keep_output", "overwritten", "refuse_overwritten"]


def keep_output(name: str, output: Tensor, copied: Collection[str], versions: dict[str, int]) -> Tensor:
    """Returns what a hook has to hold of a layer: the output, or a copy where a later layer writes over it.

    Args:
        name: of the layer.
        output: as the layer has just returned it.
        copied: layers of which a copy is needed.
        versions: gets how often the others' outputs have been written to so far.

    Example:
        >>> x, versions = torch.ones(2), {}
        >>> one, two = keep_output("one", x, ["one"], versions), keep_output("two", x, ["one"], versions)
        >>> x += 1
        >>> one, two, overwritten({"one": one, "two": two}, versions)
        (tensor([1., 1.]), tensor([2., 2.]), ('two',))
    """
    if name in copied:
        return output.clone()
    # A compiler has no such counts, and inference mode keeps none.
    if not torch.compiler.is_compiling() and not output.is_inference():
        versions[name] = output._version
    return output


def overwritten(found: Mapping[str, Tensor], versions: Mapping[str, int]) -> tuple[str, ...]:
    """Names the layers whose output has been written to since it was kept.

    Args:
        found: what `keep_output` returned, by the layer's name.
        versions: what it noted.
    """
    return tuple(name for name, version in versions.items() if found[name]._version != version)


def refuse_overwritten(found: Mapping[str, Tensor], versions: Mapping[str, int]) -> None:
    """Raises if what was kept is not what the layers returned.

    Args:
        found: what `keep_output` returned, by the layer's name.
        versions: what it noted.

    Raises:
        ValueError: a later layer works in place, and did not when the method was made.
    """
    for name in overwritten(found, versions):
        raise ValueError(
            f"the output of the layer {name!r} was overwritten by a later one, which did not happen when the method "
            "was made: an in-place dropout, say, or a head. Make that one inplace=False, or name another layer."
        )
