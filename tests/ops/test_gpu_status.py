"""docs/gpu-status.md says what the registry and the committed records say."""

from __future__ import annotations

import json
import re
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


@pytest.mark.parametrize("test", gpu_status.BEYOND.values())
def test_what_is_beyond_ops_is_named_by_gpu_tests(test: str) -> None:
    path, function = test.split("::")
    text = (gpu_status.ROOT / path).read_text()
    assert re.search(rf"@pytest\.mark\.gpu\n(?:[@ )].*\n)*def {function}\(", text)


@pytest.mark.parametrize(
    ("outcomes", "proven"), [([""], True), (["", ""], True), (["", "<failure/>"], False), (["<skipped/>"], False)]
)
def test_a_row_beyond_ops_needs_all_cases_of_its_test(tmp_path: Path, outcomes: list[str], proven: bool) -> None:
    cases = "".join(
        f'<testcase classname="tests.methods.test_lanes" name="test_streams[{number}]">{outcome}</testcase>'
        for number, outcome in enumerate(outcomes)
    )
    other = '<testcase classname="tests.methods.test_lanes" name="test_other"><failure/></testcase>'
    folder = tmp_path / "some-gpu"
    folder.mkdir()
    (folder / "junit.xml").write_text(f"<testsuites><testsuite>{cases}{other}</testsuite></testsuites>")
    row = next(line for line in gpu_status.render(tmp_path).splitlines() if "test_lanes.py::test_streams" in line)
    assert row.endswith("| some-gpu |" if proven else "| **unproven** |")
