"""Similarity of representations: unbiased HSIC, minibatch CKA, comparison of two networks."""

from .cka import MinibatchCKA, cka_matrix, hsic1
from .comparison import Comparison, compare
from .cosine import compare_cosine

__all__ = ["Comparison", "MinibatchCKA", "cka_matrix", "compare", "compare_cosine", "hsic1"]
