"""Benchmarks written by hand, one file each: whole models, and ops at the sizes that training uses."""
