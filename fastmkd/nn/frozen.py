"""What of a network does not learn."""

from __future__ import annotations

from torch import nn

__all__ = ["frozen_parts"]


def frozen_parts(network: nn.Module) -> list[str]:
    """Names the largest parts of a network none of whose weights learn.

    Args:
        network: any.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
        >>> frozen_parts(net)
        ['0']
    """
    found: list[str] = []
    for name, part in network.named_modules():
        parameters = list(part.parameters())
        inside = any(name.startswith(f"{whole}.") for whole in found)
        if name and parameters and not inside and not any(p.requires_grad for p in parameters):
            found.append(name)
    return found
