"""The same computations as plain, obvious PyTorch: the oracle of the tests and the eager baseline of the benchmarks."""

from .dense import DenseTwin, dense_twin
from .vit import masked_vit_forward, masked_vit_intermediates, masked_vit_saliency

__all__ = ["DenseTwin", "dense_twin", "masked_vit_forward", "masked_vit_intermediates", "masked_vit_saliency"]
