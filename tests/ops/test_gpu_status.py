"""docs/gpu-status.md says what the registry and the committed records say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fastmkd.bench import gpu_status


def test_page_is_up_to_date() -> None:
    assert gpu_status.PAGE.read_text() == gpu_status.render(), "run python -m fastmkd.bench.gpu_status"


def proof(folder: Path, name: str, records: list[dict[str, object]], row: str) -> str:
    """The row of the page that starts so, when these are the records of a GPU."""
    (folder / "some-gpu").mkdir()
    about = {"device": "some-gpu", "torch": "2.11"}
    text = "".join(json.dumps({**about, **record}) + "\n" for record in records)
    (folder / "some-gpu" / name).write_text(text)
    return next(line for line in gpu_status.render(folder).splitlines() if line.startswith(row))


def sample(number: int, outcome: str, of: int = 2) -> dict[str, object]:
    pair = {"op": "select_tokens", "backend": "triton", "dtype": "float32"}
    return {**pair, "sample": f"number {number}", "outcome": outcome, "of": of}


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([sample(1, "right"), sample(2, "right")], "some-gpu (2 samples, torch 2.11)"),
        ([sample(1, "right"), sample(2, "wrong")], "unproven"),
        ([sample(1, "right")], "unproven"),  # the run was stopped
        ([sample(1, "right"), sample(1, "right")], "unproven"),
        ([sample(1, "wrong"), sample(2, "right"), sample(1, "right")], "some-gpu (2 samples, torch 2.11)"),
    ],
)
def test_only_right_samples_and_all_of_them_prove_a_row(
    tmp_path: Path, records: list[dict[str, object]], expected: str
) -> None:
    assert expected in proof(tmp_path, "check.jsonl", records, "| select_tokens | triton")


@pytest.mark.parametrize(
    ("full", "tf32", "of", "expected"),
    [
        ("right", "right", 2, ["select_tokens/triton", "select_tokens/triton/tf32"]),
        ("right", "wrong", 2, ["select_tokens/triton"]),
        ("wrong", "right", 2, ["select_tokens/triton/tf32"]),
        ("right", "right", 3, []),  # the run was stopped
    ],
)
def test_tf32_is_verified_by_itself(tmp_path: Path, full: str, tf32: str, of: int, expected: list[str]) -> None:
    records = [sample(1, full, of), {**sample(1, tf32, of), "dtype": "tf32"}]
    row = proof(tmp_path, "check.jsonl", records, "| select_tokens | triton")
    assert row.endswith("| **unproven** |") is (len(expected) < 2)
    assert gpu_status.verified(tmp_path).get("some-gpu", []) == expected


@pytest.mark.parametrize("test", gpu_status.BEYOND.values())
def test_what_is_beyond_ops_is_named_by_gpu_tests(test: str) -> None:
    path, function = test.split("::")
    text = (gpu_status.ROOT / path).read_text()
    assert re.search(rf"@pytest\.mark\.gpu\n(?:[@ )].*\n)*def {function}\(", text)


def test_every_gpu_test_of_the_methods_and_networks_is_beyond_ops() -> None:
    named = {
        f"{path.relative_to(gpu_status.ROOT)}::{function}"
        for room in ("methods", "metrics", "nn", "train")
        for path in sorted((gpu_status.ROOT / "tests" / room).rglob("test_*.py"))
        for function in re.findall(r"@pytest\.mark\.gpu\n(?:[@ )].*\n)*def (\w+)\(", path.read_text())
    }
    assert named == set(gpu_status.BEYOND.values())


@pytest.mark.parametrize(
    ("outcomes", "proven"),
    [
        (["collected", "passed"], True),
        (["collected"], False),  # the run was stopped
        (["failed"], False),
        (["skipped"], False),
        (["passed", "failed"], False),  # while it was torn down
    ],
)
def test_a_row_beyond_ops_needs_all_cases_of_its_test(tmp_path: Path, outcomes: list[str], proven: bool) -> None:
    test = gpu_status.BEYOND["micro-batches on a side stream: the same losses and gradients"]
    records: list[dict[str, object]] = [
        {"test": f"{test}[1]", "outcome": "passed"},
        *({"test": f"{test}[2]", "outcome": outcome} for outcome in outcomes),
        {"test": f"{test}_of_another_kind", "outcome": "failed"},
    ]
    row = proof(tmp_path, "tests.jsonl", records, "| micro-batches on a side stream")
    assert row.endswith("| some-gpu |" if proven else "| **unproven** |")
