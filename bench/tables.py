"""Records of a GPU to the table that ``auto`` ships with: ``fastmkd/ops/tables/<device>.json``.

``python -m fastmkd.bench.tables`` reads every record that times an op's backends (``params`` names the op and the size
class) and writes, for each op, dtype and size class, the fastest right backend as ``choices``. The table's other part,
``verified``, is `fastmkd.bench.gpu_status`'s and stays as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmkd.ops.registry import OPS

from .environment import REPOSITORY, results_folder
from .report import latest, load

__all__ = ["choices", "main"]


def choices(records: list[dict[str, Any]]) -> dict[str, str]:
    """The fastest right backend by ``"<op>/<dtype>/<size class>"``, the least mean logarithm of time over a class.

    Backends that ``auto`` may not take (declared with ``default=False``) are left out.

    Args:
        records: of one device.
    """
    times: dict[str, list[dict[str, float]]] = {}
    for record in records:
        about = record.get("params", {})
        if about.get("op") not in OPS:
            continue
        allowed = {name for name, backend in OPS[about["op"]].backends.items() if backend.default}
        right = {v["name"]: v["seconds"]["median"] for v in record["variants"] if v["name"] in allowed and "ratio" in v}
        times.setdefault("/".join((about["op"], about["op_dtype"], about["size_class"])), []).append(right)
    best = {}
    for key, runs in sorted(times.items()):
        everywhere = sorted(set.intersection(*(set(run) for run in runs)))
        if everywhere:
            best[key] = min(everywhere, key=lambda name, runs=runs: sum(math.log(run[name]) for run in runs))
    return best


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m fastmkd.bench.tables``; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m fastmkd.bench.tables", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=results_folder())
    parser.add_argument("--out", type=Path, default=REPOSITORY / "fastmkd" / "ops" / "tables")
    arguments = parser.parse_args(argv)
    records = [r for r in latest(load(arguments.results)) if r.get("clock") == "device"]
    for slug in sorted({r["env"]["slug"] for r in records}):
        path = arguments.out / f"{slug}.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        known["choices"] = choices([r for r in records if r["env"]["slug"] == slug])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
