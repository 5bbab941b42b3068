"""What was asked of the speed, so that a page can say what was reached.

Every target is a ratio that must be at least so much: to another variant of a case, or to the physical bound.
"""

from __future__ import annotations

from .cka import CKA, CKA_ON_GPU, IMPORT
from .convolutions import CONVOLUTIONS
from .distillation import DMAE, DPK, MKD
from .target import Target
from .vits import MASKEDKD, SALIENCY

__all__ = ["TARGETS", "Target"]

# In the order of the page.
TARGETS: tuple[Target, ...] = (*MASKEDKD, *DPK, *DMAE, *MKD, SALIENCY, *CKA, IMPORT, *CONVOLUTIONS, *CKA_ON_GPU)
