"""How timm renames a classifier's layers where it makes maps of one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

__all__ = ["names_of_timm"]


def names_of_timm(own: Iterable[str], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives weights of a classifier the names that they have in an encoder; what the encoder lacks is left out.

    Args:
        own: names in the encoder.
        weights: by the classifier's names.

    Example:
        >>> import torch
        >>> list(names_of_timm(["model.stages_0.conv.weight"], {"stages.0.conv.weight": torch.zeros(1)}))
        ['model.stages_0.conv.weight']
    """
    named = {}
    for name in own:
        plain = name.removeprefix("model.")
        layer, _, rest = plain.partition(".")
        # timm makes stages_0 of stages.0 where it takes a network apart, and model.x of x where it does not.
        for theirs in (plain, f"{'.'.join(layer.rsplit('_', 1))}.{rest}", plain.removeprefix("model.")):
            if theirs in weights:
                named[name] = weights[theirs]
                break
    return named
