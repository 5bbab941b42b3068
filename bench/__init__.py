"""Benchmarks: what is measured (`registry`), how (`verify`, `timing`, `roofline`), and what becomes of it (`report`).

``fastmkd bench`` runs them; `docs/benchmarks.md` shows the results and the commands that make them.
"""
