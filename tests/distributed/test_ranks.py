"""Every method on 2 and 4 processes: losses and gradients are those of one process with the global batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import CASES, run_cases

from fastmkd.methods.dense_kd import DENSE_BASES

# Sums in another order; ratios are float32.
CLOSE = {torch.float64: {"rtol": 1e-9, "atol": 1e-11}, torch.float32: {"rtol": 1e-5, "atol": 1e-6}}
Reports = tuple[list[dict], Path]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    folder = tmp_path_factory.mktemp("two")
    return run_cases(2, folder), folder / "said.txt"


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    folder = tmp_path_factory.mktemp("four")
    return run_cases(4, folder), folder / "said.txt"


def check(reports: Reports, name: str) -> None:
    for report in reports[0]:
        assert name in report, reports[1].read_text()[-6000:]
    alone, *ranks = (report[name] for report in reports[0])
    assert alone.mean or alone.same
    for rank in ranks:
        assert rank.same.keys() == alone.same.keys()
        assert rank.mean.keys() == alone.mean.keys()
        for key, value in alone.same.items():
            compare(rank.same[key], value, key)
    for key, value in alone.mean.items():
        compare(torch.stack([rank.mean[key] for rank in ranks]).mean(0), value, key)


def compare(found: torch.Tensor, expected: torch.Tensor, key: str) -> None:
    assert expected.isfinite().all(), key
    close = CLOSE.get(expected.dtype, {"rtol": 0, "atol": 0})
    torch.testing.assert_close(found, expected, **close, msg=lambda text: f"{key}: {text}")


def test_every_dense_base_has_a_case() -> None:
    assert {name.removeprefix("dense_") for name in CASES if name.startswith("dense_")} == set(DENSE_BASES)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(two: Reports, name: str) -> None:
    check(two, name)


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_four_processes_equal_one(four: Reports, name: str) -> None:
    check(four, name)
