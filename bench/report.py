"""Records to pages: the tables of ``docs/benchmarks.md`` and the plots in ``docs/figures``.

``python -m fastmkd.bench.report`` rewrites what stands between the page's markers ``<!-- begin: PATTERN -->`` and
``<!-- end: PATTERN -->``, where PATTERN is a benchmark's name, a pattern of names (``op.*``), or ``targets``. Text
outside the markers is written by hand and stays. Running it twice changes nothing.
"""

from __future__ import annotations

import fnmatch
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .pages import page_command
from .progress import describe_variant
from .targets import TARGETS

__all__ = ["fill_markers", "latest", "load", "main", "render"]

Record = dict[str, Any]
_MARKED = re.compile(r"(<!-- begin: (?P<pattern>\S+) -->\n).*?(<!-- end: (?P=pattern) -->)", re.DOTALL)


def load(results: Path) -> list[Record]:
    """All records of a results folder (``<device>/<name>.jsonl``), in order of device, file and line.

    Lines that are no benchmark records (the op checks of a GPU run) are passed over.

    Raises:
        ValueError: a line is not JSON; the message names the file and line.
    """
    records = []
    for path in sorted(results.glob("*/*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, is not a JSON record: {error}.") from error
            if "benchmark" in record:
                records.append(record)
    return records


def latest(records: Iterable[Record]) -> list[Record]:
    """For each device and case the newest full record, or the newest quick one where there is no full one.

    Records of cases that could not be built are left out.

    Example:
        >>> base = {"benchmark": "b", "dtype": "fp32", "panel": "p", "label": "l"}
        >>> old = {**base, "quick": False, "env": {"slug": "cpu", "date": "2026-01-01"}}
        >>> new = {**base, "quick": True, "env": {"slug": "cpu", "date": "2026-02-01"}}
        >>> latest([old, new]) == [old]
        True
    """
    kept: dict[tuple[str, ...], Record] = {}
    for record in (r for r in records if "broken" not in r):
        key = (record["env"]["slug"], *(record[part] for part in ("benchmark", "dtype", "panel", "label")))
        known = kept.get(key)
        if known is None or _rank(record) >= _rank(known):
            kept[key] = record
    return list(kept.values())


def _rank(record: Record) -> tuple[bool, str]:
    return not record["quick"], record["env"]["date"]


def render(page: str, records: list[Record]) -> str:
    r"""Returns the page with everything between its markers made anew from `records`.

    Args:
        page: Markdown with markers.
        records: what `latest` gives.

    Raises:
        ValueError: a record's benchmark has no place between any markers.

    Example:
        >>> render("<!-- begin: none -->\nold\n<!-- end: none -->", [])
        '<!-- begin: none -->\n\nNo record yet.\n\n<!-- end: none -->'
    """
    patterns = [found["pattern"] for found in _MARKED.finditer(page)]
    for name in dict.fromkeys(record["benchmark"] for record in records):
        if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            raise ValueError(
                f"benchmark {name!r} has records but no place on the page; add <!-- begin: {name} --> and its end."
            )

    return fill_markers(page, lambda name: _targets(records) if name == "targets" else _section(records, name))


def fill_markers(page: str, body: Callable[[str], str]) -> str:
    """Returns the page with what stands between its markers made anew.

    Args:
        page: Markdown with markers.
        body: from the name in a pair of markers to what belongs between them, "" where there is no record.
    """

    def fill(found: re.Match[str]) -> str:
        return f"{found[1]}\n{body(found['pattern']) or 'No record yet.'}\n\n{found[3]}"

    return _MARKED.sub(fill, page)


def _section(records: list[Record], pattern: str) -> str:
    mine = [r for r in records if fnmatch.fnmatch(r["benchmark"], pattern)]
    devices = dict.fromkeys(r["env"]["slug"] for r in mine)
    return "\n\n".join(_device([r for r in mine if r["env"]["slug"] == slug], pattern) for slug in devices)


def _device(records: list[Record], pattern: str) -> str:
    parts = [f"**{records[0]['env']['device']}**", _caption(records, pattern)]
    if figure_name(records) is not None:
        parts.append(f"![{pattern} on {records[0]['env']['device']}](figures/{figure_name(records)})")
    rows = [
        "| case | variant | time (quartiles) | against the baseline | of the bound |",
        "| --- | --- | --- | --- | --- |",
    ]
    for record in records:
        case = f"{record['panel']}, {record['dtype']}, {record['label']}"
        for variant in record["variants"]:
            name = variant["name"] + (" (baseline)" if variant["name"] == record["baseline"] else "")
            rows.append(f"| {case} | {name} | " + " | ".join(describe_variant(variant)) + " |")
            case = ""
    return "\n\n".join([*parts, "\n".join(rows)])


def _caption(records: list[Record], pattern: str) -> str:
    environments = {json.dumps(_about(r), sort_keys=True): _about(r) for r in records}
    kind = "cuda" if records[0]["env"]["driver"] and records[0]["clock"] != "cpu" else "cpu"
    quick = " --quick" if any(r["quick"] for r in records) else ""
    name = f"'{pattern}'" if "*" in pattern else pattern
    made = f"`fastmkd bench {name} --device {kind}{quick}`"
    return f"Made by {made}: " + "; ".join(_sentence(about) for about in environments.values()) + "."


def _about(record: Record) -> dict[str, Any]:
    env = record["env"]
    keys = ("commit", "dirty", "sources", "torch", "triton", "cuda", "driver", "threads", "features")
    return {"date": env["date"][:10], "clock": record["clock"], **{key: env[key] for key in keys}}


def _sentence(about: dict[str, Any]) -> str:
    commit = f"commit {about['commit'][:10]}" if about["commit"] else f"sources {about['sources']}"
    words = [about["date"], commit + (" with changes" if about["dirty"] else ""), f"torch {about['torch']}"]
    if about["clock"] == "cpu":
        words += [f"{about['threads']} threads", " ".join(about["features"])]
    else:
        words += [f"triton {about['triton']}", f"CUDA {about['cuda']}", f"driver {about['driver']}"]
        words.append(
            "device time of one call" if about["clock"] == "device" else "time of one call from an idle device"
        )
    return ", ".join(words)


def _targets(records: list[Record]) -> str:
    rows = ["| asked | device | measured (quartiles) | rounds | |", "| --- | --- | --- | --- | --- |"]
    for target in TARGETS:
        for record in records:
            measured = target.measured(record)
            if measured is not None:
                found = target.words(measured) + (", quick run" if record["quick"] else "")
                where, rounds = record["env"]["device"], measured.rounds or "-"
                rows.append(f"| {target.sentence} | {where} | {found} | {rounds} | {target.verdict(measured)} |")
    return "\n".join(rows) if len(rows) > 2 else ""


def figure_name(records: list[Record]) -> str | None:
    """File name of one benchmark's plot on one device; None where a plot adds nothing (ops, few cases)."""
    names = {r["benchmark"] for r in records}
    enough = sum(any("ratio" in v for v in r["variants"]) for r in records) > 2
    if len(names) > 1 or not enough or next(iter(names)).startswith("op."):
        return None
    return f"{next(iter(names))}-{records[0]['env']['slug']}.svg"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m fastmkd.bench.report``; returns the exit status, see `page_command`."""

    def draw(page: Path, results: Path) -> None:
        try:
            from .figures import draw_all
        except ImportError as error:
            print(f"tables are written, plots are not: {error}; pip install matplotlib", file=sys.stderr)
            return
        for path in draw_all(latest(load(results)), page.parent / "figures"):
            print(path)

    return page_command(
        "report", __doc__, "docs/benchmarks.md", lambda page, results: render(page, latest(load(results))), argv, draw
    )


if __name__ == "__main__":
    sys.exit(main())
