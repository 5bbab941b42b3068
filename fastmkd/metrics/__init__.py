"""Similarity of representations: unbiased HSIC, minibatch CKA, comparison of two networks."""

from .cka import MinibatchCKA, cka_matrix, hsic1
from .comparison import Comparison, compare

__all__ = ["Comparison", "MinibatchCKA", "cka_matrix", "compare", "hsic1"]
