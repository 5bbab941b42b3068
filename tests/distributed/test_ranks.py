"""Every method on 2 and 4 processes, DDP and FSDP2: losses and gradients are those of one with the global batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from agreement import FSDP, Found
from processes import CASES, QUICK, SPLIT, run_cases
from tiny_vits import tiny

from fastmkd.methods import DistillMethod, MaskedDINO, MoCoV3
from fastmkd.methods.dense_kd import DENSE_BASES
from fastmkd.train.errors import UserError
from fastmkd.train.sharding import name_units

# Sums in another order; ratios are float32.
CLOSE = {torch.float64: {"rtol": 1e-9, "atol": 1e-11}, torch.float32: {"rtol": 1e-5, "atol": 1e-6}}
Reports = tuple[list[dict[tuple[str, str], Found]], Path]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    return reports_of(2, tmp_path_factory, {"ddp": [*CASES], "blocks": QUICK})


@pytest.fixture(scope="module")
def two_split(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    return reports_of(2, tmp_path_factory, dict.fromkeys(FSDP, SPLIT))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    return reports_of(4, tmp_path_factory, {"ddp": [*CASES], **dict.fromkeys(FSDP, SPLIT)})


def reports_of(count: int, factory: pytest.TempPathFactory, plan: dict[str, list[str]]) -> Reports:
    folder = factory.mktemp("ranks")
    return run_cases(count, folder, plan), folder / "said.txt"


def check(reports: Reports, name: str, way: str = "ddp") -> None:
    (alone_all, *ranks_all), said = reports
    assert ("alone", name) in alone_all, said.read_text()[-6000:]
    for report in ranks_all:
        assert (way, name) in report, said.read_text()[-6000:]
    alone, ranks = alone_all["alone", name], [report[way, name] for report in ranks_all]
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


@pytest.mark.parametrize("name", QUICK)
def test_two_that_split_the_weights_equal_one(two: Reports, name: str) -> None:
    check(two, name, "blocks")


@pytest.mark.parametrize("method", [partial(MaskedDINO, local_crops=0), MoCoV3])
def test_methods_that_move_their_teacher_are_not_split(method: Callable[..., DistillMethod]) -> None:
    """The cases that FSDP2 does not get: their weights would be written where it forgets them."""
    with pytest.raises(UserError, match=r"moves weights by itself .* train it with DDP"):
        name_units(method(tiny(0), hidden=8))


@pytest.mark.long
@pytest.mark.parametrize("way", FSDP)
@pytest.mark.parametrize("name", SPLIT)
def test_two_that_split_the_weights_equal_one_in_every_case(two_split: Reports, name: str, way: str) -> None:
    check(two_split, name, way)


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_four_processes_equal_one(four: Reports, name: str) -> None:
    check(four, name)


@pytest.mark.long
@pytest.mark.parametrize("way", FSDP)
@pytest.mark.parametrize("name", SPLIT)
def test_four_that_split_the_weights_equal_one(four: Reports, name: str, way: str) -> None:
    check(four, name, way)
