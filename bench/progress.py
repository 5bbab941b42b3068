"""What a person sees during and after a run: a progress bar with the time left, and a table."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Tell", "bar", "describe_variant", "table"]

Tell = Callable[[float], None]


class _Lines:
    """Progress as one line a case, for logs and for machines without rich."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.begin = total, 0, time.monotonic()

    def start(self, title: str) -> None:
        passed = time.monotonic() - self.begin
        left = passed / self.done * (self.total - self.done) if self.done else float("nan")
        eta = f", about {left:.0f} s left" if self.done else ""
        print(f"[{self.done + 1}/{self.total}{eta}] {title}", file=sys.stderr, flush=True)
        self.done += 1

    def tell(self, share: float) -> None:
        """A share of a case is not worth a line."""


class _Bar:
    """A rich progress bar over cases; a case moves it while it is timed."""

    def __init__(self, shown: Any, total: int) -> None:
        self.shown, self.task, self.done = shown, shown.add_task("", total=total), -1

    def start(self, title: str) -> None:
        self.done += 1
        self.shown.update(self.task, description=title, completed=self.done)

    def tell(self, share: float) -> None:
        self.shown.update(self.task, completed=self.done + share)


@contextmanager
def bar(total: int) -> Iterator[_Lines | _Bar]:
    """Yields an object with ``start(title)`` for each case and ``tell(share)`` within it.

    Args:
        total: number of cases.
    """
    if not sys.stderr.isatty():
        yield _Lines(total)
        return
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        yield _Lines(total)
        return
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as shown:
        yield _Bar(shown, total)


def describe_variant(variant: dict[str, Any]) -> tuple[str, str, str]:
    """Time (or memory), ratio and share of the bound of a record's variant, as text for tables.

    Example:
        >>> describe_variant({"name": "cuda", "unavailable": "not built"})
        ('-', 'not built', '')
        >>> seconds = {"median": 2e-3, "low": 1.9e-3, "high": 2.1e-3}
        >>> describe_variant({"name": "a", "seconds": seconds, "ratio": {"median": 2.5, "low": 2.4, "high": 2.6}})
        ('2.000 ms (1.900 to 2.100)', '2.50x (2.40 to 2.60)', '')
    """
    if "unavailable" in variant:
        return "-", variant["unavailable"], ""
    taken = spread_of_time(variant["seconds"]) if "seconds" in variant else "-"
    taken = f"{variant['bytes'] / 2**20:.0f} MiB" if "bytes" in variant else taken
    check = variant.get("check", {"ok": True})
    if not check["ok"]:
        return taken, "WRONG: " + (check["detail"] or f"error {check['error']}, allowed {check['allowed']}"), ""
    ratio = variant.get("ratio")
    share = variant.get("bound")
    return (
        taken,
        f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "-",
        f"{100 * share['share']:.0f} % ({share['by']})" if share else "",
    )


def spread_of_time(seconds: dict[str, float]) -> str:
    """Median and quartiles in a unit that suits them.

    Example:
        >>> spread_of_time({"median": 3.2e-5, "low": 3e-5, "high": 4e-5})
        '32.00 us (30.00 to 40.00)'
    """
    unit, scale = ("us", 1e6) if seconds["median"] < 1e-3 else ("ms", 1e3)
    digits = 2 if unit == "us" else 3 if seconds["median"] < 0.01 else 1
    median, low, high = (f"{scale * seconds[part]:.{digits}f}" for part in ("median", "low", "high"))
    return f"{median} {unit} ({low} to {high})"


def table(records: list[dict[str, Any]]) -> None:
    """Prints the records' variants, one line each, on standard output."""
    rows = [("benchmark", "case", "variant", "time (quartiles)", "against the baseline", "of the bound")]
    for record in records:
        case = f"{record['panel']} {record['dtype']}, {record['label']}"
        rows += [(record["benchmark"], case, v["name"], *describe_variant(v)) for v in record["variants"]]
        if "broken" in record:
            rows.append((record["benchmark"], case, "-", "-", f"BROKEN: {record['broken']}", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
