"""docs/gpu-status.md says what the registry and the committed records say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastmkd.bench import gpu_status


def test_page_is_up_to_date() -> None:
    assert gpu_status.PAGE.read_text() == gpu_status.render(), "run python -m fastmkd.bench.gpu_status"


@pytest.mark.parametrize(
    ("outcome", "expected"), [("right", "some-gpu (1 samples, torch 2.11)"), ("wrong", "unproven")]
)
def test_only_right_samples_prove_a_row(tmp_path: Path, outcome: str, expected: str) -> None:
    record = {"device": "some-gpu", "torch": "2.11", "op": "select_tokens", "backend": "triton", "outcome": outcome}
    folder = tmp_path / "some-gpu"
    folder.mkdir()
    (folder / "check.jsonl").write_text(json.dumps(record) + "\n")
    row = next(line for line in gpu_status.render(tmp_path).splitlines() if line.startswith("| select_tokens | triton"))
    assert expected in row
