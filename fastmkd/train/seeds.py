"""Randomness as a function of counters.

Nothing in training draws from a generator whose state depends on what happened before: each consumer seeds the global
generators from (seed, purpose, position) right before it draws. A resumed run therefore needs no saved generator state,
and pictures come out the same for any number of worker processes.
"""

from __future__ import annotations

import random
import zlib

import numpy as np
import torch

__all__ = ["counter_seed", "generator", "seed_all"]


def counter_seed(seed: int, purpose: str, *position: int) -> int:
    """Mixes a seed, a purpose and a position into 63 bits that look unrelated for different inputs.

    Args:
        seed: of the run.
        purpose: what is drawn, so that two consumers at one position do not share numbers.
        position: non-negative counters, for example epoch and picture.

    Example:
        >>> len({counter_seed(0, "mix", 1), counter_seed(0, "mix", 1), counter_seed(0, "mix", 2)})
        2
    """
    entropy = [seed, zlib.crc32(purpose.encode()), *position]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) >> 1


def seed_all(seed: int, purpose: str, *position: int) -> None:
    """Seeds the global generators of random, numpy and torch (all devices) from counters.

    Args:
        seed: of the run.
        purpose: see `counter_seed`.
        position: see `counter_seed`.

    Example:
        >>> seed_all(0, "doc", 1); a = torch.rand(1); seed_all(0, "doc", 1); bool(a == torch.rand(1))
        True
    """
    value = counter_seed(seed, purpose, *position)
    random.seed(value)
    np.random.seed(value % 2**32)  # numpy's legacy generator, which timm's mixup draws from, takes 32 bits
    torch.manual_seed(value)


def generator(seed: int, purpose: str, *position: int) -> torch.Generator:
    """Returns a CPU generator seeded from counters; the global ones stay as they are.

    Args:
        seed: of the run.
        purpose: see `counter_seed`.
        position: see `counter_seed`.

    Example:
        >>> torch.randperm(3, generator=generator(0, "shuffle", 0)).shape
        torch.Size([3])
    """
    return torch.Generator().manual_seed(counter_seed(seed, purpose, *position))
