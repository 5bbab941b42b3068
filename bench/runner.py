"""``fastmkd bench``: runs benchmarks and writes one JSON line a case.

Each case is checked first (`fastmkd.bench.verify`) and timed afterwards (`fastmkd.bench.timing`). A wrong variant gets
no speed-up, and the exit status is 1. Records are appended case by case: a run cut short keeps what it has measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fastmkd.ops.accuracy import Verdict
from fastmkd.ops.devices import check_device

from . import environment, progress
from .memory import peak_bytes
from .registry import DTYPES, Benchmark, Case, Setting, Variant, benchmarks, find
from .roofline import bound
from .timing import Plan, Spread, make_clock, ratios, time_interleaved
from .verify import Oracle

__all__ = ["main", "measure", "write"]


def measure(case: Case, setting: Setting, plan: Plan, tell: progress.Tell) -> dict[str, Any]:
    """Checks and times the variants of a case.

    Args:
        case: what to compare.
        setting: where it was built.
        plan: how long to time.
        tell: receives the share that is done.

    Returns:
        The numbers of a record: label, panel, baseline, and for each variant its verdict, time and ratio.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # a case's compiled variants start fresh, within the recompilation limit
    entries: dict[str, dict[str, Any]] = {v.name: {"name": v.name} for v in case.variants}
    able: list[Variant] = []
    oracle = Oracle([v for v in case.variants if v.unavailable is None])
    for variant in case.variants:
        entry = entries[variant.name]
        if variant.unavailable is not None:
            entry["unavailable"] = variant.unavailable
            continue
        try:
            verdict = oracle.judge(variant)
        except Exception as error:
            # One variant that breaks (a compiler that is missing, memory) must not cost the others their numbers.
            traceback.print_exc()
            verdict = Verdict(False, float("nan"), 0.0, _sentence(error))
            entry["failed"] = True
        entry["check"] = asdict(verdict)
        if not entry.get("failed"):
            able.append(variant)
    if any(v.name == case.baseline for v in able):
        if case.quantity == "memory":
            _weigh(case, able, entries, setting)
        else:
            _time(case, able, entries, setting, plan, tell)
    return {
        "label": case.label,
        "panel": case.panel,
        "baseline": case.baseline,
        "items": case.items,
        "clock": ("device" if case.device_time else "step") if setting.on_gpu else "cpu",
        "params": case.params,
        "variants": list(entries.values()),
    }


def _time(
    case: Case,
    able: list[Variant],
    entries: dict[str, dict[str, Any]],
    setting: Setting,
    plan: Plan,
    tell: progress.Tell,
) -> None:
    clock = make_clock(setting.device, case.device_time)
    if case.min_rounds is not None:
        plan = replace(plan, min_rounds=min(plan.min_rounds, case.min_rounds))
    times = time_interleaved({v.name: v.run for v in able}, clock, plan, on_round=tell)
    against = ratios(times, case.baseline)
    right = {v.name: entries[v.name]["check"]["ok"] for v in able}
    for variant in able:
        entry, taken = entries[variant.name], Spread.of(times[variant.name])
        entry["seconds"] = asdict(taken)
        entry["rounds"] = len(times[variant.name])
        entry["times"] = times[variant.name]  # round by round, so that any two variants can be compared inside rounds
        if case.items:
            entry["items_per_second"] = case.items / taken.median
        least = bound(variant.answer.flops, variant.answer.bytes, setting.device, setting.torch_dtype)
        if least is not None:
            entry["bound"] = {**asdict(least), "share": least.seconds / taken.median}
        if right[variant.name] and right[case.baseline]:
            entry["ratio"] = asdict(against[variant.name])


def _weigh(case: Case, able: list[Variant], entries: dict[str, dict[str, Any]], setting: Setting) -> None:
    peaks = {v.name: peak_bytes(v.run, setting.device) for v in able}
    for name, peak in peaks.items():
        entries[name]["bytes"] = peak
        if entries[name]["check"]["ok"] and entries[case.baseline]["check"]["ok"]:
            entries[name]["ratio"] = asdict(Spread.of([peaks[case.baseline] / peak]))


def write(record: dict[str, Any], out: Path) -> Path:
    """Appends a record as one JSON line to ``out/<name>.jsonl``, or to `out` itself when that is a ``.jsonl`` file.

    Returns:
        The file written to.
    """
    path = out if out.suffix == ".jsonl" else out / f"{record['benchmark']}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        # NaN is not JSON: an error that could not be computed is written as null.
        file.write(json.dumps(_plain(record), sort_keys=True, allow_nan=False) + "\n")
    return path


def _sentence(error: Exception) -> str:
    # The first line, without the place where the repository happens to lie.
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}".replace(str(environment.REPOSITORY), ".")[:300]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if value == value and abs(value) != float("inf") else None
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastmkd bench", description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="benchmarks to run, such as masked_teacher or 'op.*'; default all"
    )
    parser.add_argument("--list", action="store_true", help="list the benchmarks and stop")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument(
        "--dtype", action="append", choices=tuple(DTYPES), help="may be repeated; default all that a benchmark has"
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument("--seconds", type=float, help="time spent on timing a case (default 20, 1 with --quick)")
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch; default as PyTorch chooses")
    parser.add_argument(
        "--out", type=Path, help="folder for records (default bench/results/<device>), or one .jsonl file"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``fastmkd bench``.

    Args:
        argv: arguments; those of the process by default.

    Returns:
        Exit status: 0, or 1 when a variant failed or was wrong, or 2 for arguments that make no sense.
    """
    arguments = _parser().parse_args(argv)
    if arguments.list:
        for entry in benchmarks().values():
            print(f"{entry.name:<22} {entry.summary} [{', '.join(entry.devices)}; {', '.join(entry.dtypes)}]")
        return 0
    try:
        device = check_device("--device", arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except ValueError as error:
        print(f"fastmkd bench: {error}", file=sys.stderr)
        return 2
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    try:
        chosen = find(arguments.names)
    except ValueError as error:
        print(f"fastmkd bench: {error}", file=sys.stderr)
        return 2
    work = _work(chosen, device, arguments.dtype, arguments.quick)
    if not work:
        print(f"fastmkd bench: none of the benchmarks asked for runs on {device.type} in this dtype.", file=sys.stderr)
        return 2
    plan = Plan.quick() if arguments.quick else Plan()
    if arguments.seconds is not None:
        plan = Plan(arguments.seconds, plan.min_rounds, plan.max_rounds, plan.warmup_seconds)
    out = arguments.out or environment.results_folder() / environment.device_slug(device)
    records = _run(work, plan, out)
    progress.table(records)
    print(f"{len(records)} records in {out}")
    return int(any(_broken(record) for record in records))


def _work(
    chosen: list[Benchmark], device: torch.device, dtypes: list[str] | None, quick: bool
) -> list[tuple[Benchmark, Setting, dict[str, Any]]]:
    return [
        (entry, setting, parameters)
        for entry in chosen
        for dtype in DTYPES
        if entry.runs_on(device.type, dtype) and (dtypes is None or dtype in dtypes)
        for setting in [Setting(device, dtype, quick)]
        for parameters in entry.grid(setting)
    ]


def _run(work: list[tuple[Benchmark, Setting, dict[str, Any]]], plan: Plan, out: Path) -> list[dict[str, Any]]:
    records = []
    known = environment.describe(work[0][1].device)
    with progress.bar(len(work)) as shown:
        for entry, setting, parameters in work:
            words = " ".join(str(value) for value in parameters.values())
            shown.start(f"{entry.name} {setting.dtype} {words}")
            try:
                torch.manual_seed(0)
                numbers = measure(entry.build(setting, **parameters), setting, plan, shown.tell)
            except Exception as error:
                # A case that cannot be built must not cost the other cases their records.
                traceback.print_exc()
                numbers = {"label": words, "panel": "", "variants": [], "broken": _sentence(error)}
            record = {"benchmark": entry.name, "dtype": setting.dtype, "quick": setting.quick, **numbers, "env": known}
            write(record, out)
            records.append(record)
            gc.collect()
            if setting.on_gpu:
                torch.cuda.empty_cache()
    return records


def _broken(record: dict[str, Any]) -> bool:
    return "broken" in record or any(not v.get("check", {"ok": True})["ok"] for v in record["variants"])
