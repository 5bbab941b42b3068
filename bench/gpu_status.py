"""What a GPU has proven and what not: writes ``docs/gpu-status.md`` and the ``verified`` part of the shipped tables.

An op's row is proven when a committed record of ``fastmkd check --json`` (``bench/results/<gpu>/check.jsonl``) holds
all samples and tiles of that op and backend and every one of them is right; what is more than an op, when every case of
its GPU test passed in the committed ``bench/results/<gpu>/tests.jsonl`` (`fastmkd.bench.outcomes`); a number, when a
committed benchmark record has it. What time did not reach is not proven. Run it with
``python -m fastmkd.bench.gpu_status``.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastmkd.ops import OPS
from fastmkd.ops.registry import Backend

from .report import latest, load
from .targets import TARGETS

__all__ = ["render", "verified", "write"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "gpu-status.md"
TABLES = ROOT / "fastmkd" / "ops" / "tables"

WITHOUT_GPU = {
    "triton": "numerics in Triton's interpreter; compiled ahead of time for sm_80, sm_90, sm_100 (no spills)",
    "cuda": "the same source runs on the CPU through a shim; compiled by nvcc where it is installed",
}
# What only a GPU can show and no sample of an op does, and the test that shows it (`bench/gpu.sh` runs all of them, by
# what stands here between quotes).
BEYOND = {
    "the teacher's CUDA graph gives the same step": "tests/methods/test_teacher_call.py::test_cuda_graphs",
    "micro-batches on a side stream: the same losses and gradients": "tests/methods/test_lanes.py::test_streams",
    "a MaskedKD step never waits for the GPU": "tests/methods/test_no_sync.py::test_a_step_does_not_wait_for_the_gpu",
    "a DMAE step never waits for the GPU": (
        "tests/methods/test_no_sync.py::test_a_step_of_dmae_does_not_wait_for_the_gpu"
    ),
    "steps of MaskedDINO and MoCo v3 never wait for the GPU": (
        "tests/methods/test_no_sync.py::test_a_step_of_self_distillation_does_not_wait_for_the_gpu"
    ),
    "a DPK step never waits for the GPU": "tests/methods/test_dpk.py::test_a_step_does_not_wait_for_the_gpu",
    "FGD's term never waits for the GPU": "tests/methods/test_fgd.py::test_a_step_does_not_wait_for_the_gpu",
    "student on the GPU, teacher pinned elsewhere": "tests/methods/test_maskedkd.py::test_pinned_teacher_on_the_cpu",
    "token merging: as on the CPU, and repeatable": (
        "tests/nn/test_token_merging.py::test_on_a_gpu_it_is_the_same_and_repeatable"
    ),
    "a masked ViT's forward can be captured in a graph": (
        "tests/nn/test_vit_use.py::test_masked_gpu_forward_can_be_captured_in_a_graph"
    ),
    "a masked ViT's forward never waits for the GPU": "tests/nn/test_vit_use.py::test_no_host_sync_on_a_gpu",
    "a packed CNN's step reads nothing back": (
        "tests/nn/test_convert.py::test_a_training_step_on_the_gpu_reads_nothing_back"
    ),
    "a mask drawn with a CPU generator is the same on a GPU": (
        "tests/nn/test_masks.py::test_cpu_generator_gives_the_same_masks_on_a_gpu"
    ),
    "plans are built on the GPU without reading back": (
        "tests/nn/test_plan.py::test_built_on_the_gpu_without_reading_back"
    ),
}

INTRO = """# GPU status

What a GPU has confirmed and what it has not: per op and backend, beyond single ops, and the numbers asked for. This
page is generated from the op registry and the committed records by `python -m fastmkd.bench.gpu_status`; a test fails
when it is out of date. A row becomes proven by running `bench/gpu.sh` on a machine with the GPU and committing what it
leaves in `bench/results/<gpu>`: `check.jsonl`, `tests.jsonl`, `records.jsonl`.

## Ops

| op | backend | in `auto` | proven without a GPU by | proven on |
|---|---|---|---|---|
"""
BEYOND_INTRO = """## Beyond single ops

Two GPUs (student on one, teacher on the other) are in no test: the same code ran with the teacher on the CPU.

| what | test | proven on |
|---|---|---|
"""
NUMBERS_INTRO = """## Numbers

The bound is bytes over the measured copy rate or FLOPs over the measured matmul rate, whichever takes longer; of a
masked convolution only the taps that are present count.

| asked | measured |
|---|---|
"""


def records(results: Path = RESULTS) -> dict[tuple[str, str], dict[str, list[dict[str, Any]]]]:
    """Returns the check records as ``{(op, backend): {device: [record, ...]}}``, of each sample the last one."""
    found: dict[tuple[str, str], dict[str, dict[tuple[str, str], dict[str, Any]]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for record in _lines_of(results, "check.jsonl"):
        if record["outcome"] != "unavailable":
            found[record["op"], record["backend"]][record["device"]][record["dtype"], record["sample"]] = record
    return {pair: {device: list(rows.values()) for device, rows in devices.items()} for pair, devices in found.items()}


def proven(rows: list[dict[str, Any]]) -> bool:
    """True when no sample is missing (the run may have been stopped) and every one is right."""
    return _whole(rows) and all(row["outcome"] == "right" for row in rows)


def _whole(rows: list[dict[str, Any]]) -> bool:
    return bool(rows) and len(rows) >= rows[-1]["of"]


def passed(test: str, results: Path = RESULTS) -> list[str]:
    """Devices on whose committed ``tests.jsonl`` every case of a test passed, none left out.

    Args:
        test: ``path/of/file.py::function``.
        results: folder of the records.
    """
    outcomes: dict[str, dict[str, str]] = defaultdict(dict)
    for record in _lines_of(results, "tests.jsonl"):
        if record["test"].split("[")[0] == test:
            outcomes[record["device"]][record["test"]] = record["outcome"]
    return [device for device, cases in outcomes.items() if set(cases.values()) == {"passed"}]


def _lines_of(results: Path, name: str) -> Iterator[dict[str, Any]]:
    for path in sorted(results.glob(f"*/{name}")):
        yield from map(json.loads, path.read_text().splitlines())


def render(results: Path = RESULTS) -> str:
    """Returns the text of ``docs/gpu-status.md``."""
    known = records(results)
    ops = [_row(op.name, backend, known) for op in OPS.values() for backend in _gpu_backends(op.backends)]
    beyond = [
        f"| {what} | `{test.removeprefix('tests/')}` | {', '.join(passed(test, results)) or '**unproven**'} |"
        for what, test in BEYOND.items()
    ]
    numbers = _numbers(results)
    return "\n".join([INTRO + _lines(ops), BEYOND_INTRO + _lines(beyond), NUMBERS_INTRO + _lines(numbers)])


def _lines(rows: list[str]) -> str:
    unproven = sum(row.endswith("| **unproven** |") for row in rows)
    total = f"{unproven} of {len(rows)} rows are unproven." if unproven else "Every row is proven."
    return "\n".join(rows) + f"\n\n{total}\n"


def _numbers(results: Path) -> list[str]:
    measured = latest(load(results))
    rows = []
    for target in (target for target in TARGETS if target.gpu):
        ratios = [(record["env"]["device"], target.ratio(record)) for record in measured]
        found = [f"{target.show(ratio)} ({device})" for device, ratio in ratios if ratio is not None]
        rows.append(f"| {target.sentence} | {', '.join(found) or '**unproven**'} |")
    return rows


def verified(results: Path = RESULTS) -> dict[str, list[str]]:
    """What needs no verdict on a device, as `fastmkd.ops.cache.verified` reads it.

    Args:
        results: folder of the records.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for (op, backend), devices in records(results).items():
        for device, rows in devices.items():
            if device == "cpu" or backend == "eager" or not _whole(rows):
                continue
            for part in ("", "/tf32"):  # products as TF32 have a verdict of their own
                if {row["outcome"] for row in rows if (row["dtype"] == "tf32") == bool(part)} == {"right"}:
                    found[device].append(f"{op}/{backend}{part}")
    return found


def write() -> None:
    """Writes the page, and what is verified into the table of each device on record."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render())
    for device, pairs in verified().items():
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
