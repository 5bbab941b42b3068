"""What a GPU has proven and what not: writes ``docs/gpu-status.md`` and the ``verified`` part of the shipped tables.

A row is proven when a committed record of ``fastmkd check --json`` (``bench/results/<gpu>/check.jsonl``) holds samples
of that op and backend and every one of them is right. Run it with ``python -m fastmkd.bench.gpu_status``.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from fastmkd.ops import OPS
from fastmkd.ops.registry import Backend

__all__ = ["render", "write"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "gpu-status.md"
TABLES = ROOT / "fastmkd" / "ops" / "tables"

WITHOUT_GPU = {
    "triton": "numerics in Triton's interpreter; compiled ahead of time for sm_80, sm_90, sm_100 (no spills)",
    "cuda": "the same source runs on the CPU through a shim; compiled by nvcc where it is installed",
}
INTRO = """# GPU status

What a GPU has confirmed, per op and backend, and what it has not. This page is generated from the op registry and the
committed records by `python -m fastmkd.bench.gpu_status`; a test fails when it is out of date. A row becomes proven by
running `bench/gpu.sh` on a machine with the GPU and committing `bench/results/<gpu>/check.jsonl`.

| op | backend | in `auto` | proven without a GPU by | proven on |
|---|---|---|---|---|
"""


def records(results: Path = RESULTS) -> dict[tuple[str, str], dict[str, list[dict[str, Any]]]]:
    """Returns the check records as ``{(op, backend): {device: [record, ...]}}``."""
    found: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(results.glob("*/check.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if record["outcome"] != "unavailable":
                found[record["op"], record["backend"]][record["device"]].append(record)
    return found


def proven(rows: list[dict[str, Any]]) -> bool:
    """True when there are samples and every one is right."""
    return bool(rows) and all(row["outcome"] == "right" for row in rows)


def render(results: Path = RESULTS) -> str:
    """Returns the text of ``docs/gpu-status.md``."""
    known = records(results)
    lines = [_row(op.name, backend, known) for op in OPS.values() for backend in _gpu_backends(op.backends)]
    unproven = sum(line.endswith("| **unproven** |") for line in lines)
    total = f"{unproven} of {len(lines)} rows are unproven." if unproven else "Every row is proven."
    return INTRO + "\n".join(lines) + f"\n\n{total}\n"


def write() -> None:
    """Writes the page, and which pairs are verified into the table of each device on record."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render())
    verified: dict[str, list[str]] = defaultdict(list)
    for (op, backend), devices in records().items():
        for device, rows in devices.items():
            if device != "cpu" and backend != "eager" and proven(rows):
                verified[device].append(f"{op}/{backend}")
    for device, pairs in verified.items():
        path = TABLES / f"{device}.json"
        table = json.loads(path.read_text()) if path.is_file() else {"choices": {}}
        path.write_text(json.dumps({**table, "verified": sorted(pairs)}, indent=1) + "\n")


def _gpu_backends(backends: dict[str, Backend]) -> list[Backend]:
    return [backend for backend in backends.values() if backend.device == "cuda"]


def _row(op: str, backend: Backend, known: dict[tuple[str, str], dict[str, list[dict[str, Any]]]]) -> str:
    devices = [
        f"{device} ({len(rows)} samples, torch {rows[0]['torch']})"
        for device, rows in known.get((op, backend.name), {}).items()
        if proven(rows)
    ]
    in_auto = "yes" if backend.default else "no"
    return (
        f"| {op} | {backend.name} | {in_auto} | {WITHOUT_GPU[backend.name]} | {', '.join(devices) or '**unproven**'} |"
    )


if __name__ == "__main__":
    write()
