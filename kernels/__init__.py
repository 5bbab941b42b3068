"""Triton kernels, one file per op family; installed as ``fastmkd.kernels``."""
