"""The gate itself: no headline ratio has fallen; and a gate that a fallen ratio would not close is no gate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastmkd.bench import gate
from fastmkd.bench.gate import HEADLINES, Headline, check, load, machine, main

NAMES = [headline.name for headline in HEADLINES]


def doubled(name: str = "double") -> Headline:
    """A way that takes half of the other's work and well under its time."""
    x = torch.randn(192, 192)
    return Headline(name, lambda: {"plain": lambda: x @ x @ x @ x @ x, "fastmkd": lambda: x @ x @ x})


@pytest.mark.parametrize("headline", HEADLINES, ids=NAMES)
def test_no_headline_has_fallen(headline: Headline) -> None:
    found = check(headline, load())
    assert not [str(ratio) for ratio in found if ratio.fallen]


def test_every_headline_has_committed_values() -> None:
    values = load()
    assert list(values) == NAMES
    for value in values.values():
        assert value["work"] > 1
        assert value["time"]


def test_a_fallen_ratio_is_seen_and_named() -> None:
    work, time = check(doubled(), {"double": {"work": 2.0, "time": {machine(): 1.2}}}, rounds=3)
    assert work.found == 2
    assert not work.fallen
    assert not time.fallen
    work, time = check(doubled(), {"double": {"work": 2.1, "time": {machine(): 50.0}}}, rounds=1)
    assert work.fallen
    assert time.fallen
    assert "double, work: 2.00x (committed 2.10x, fallen by more than 1%)" in str(work)


def test_a_ratio_that_falls_once_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = []

    def measured(headline: Headline, count: int) -> float:
        rounds.append(count)
        return (1.0, 1.9)[len(rounds) - 1]

    monkeypatch.setattr(gate, "measure_time", measured)
    _, time = check(doubled(), {"double": {"time": {machine(): 2.0}}}, rounds=4)
    assert rounds == [4, 8]
    assert time.found == 1.9
    assert not time.fallen


def test_another_machine_is_compared_by_work_alone() -> None:
    _, time = check(doubled(), {"double": {"work": 2.0, "time": {"VSX": 50.0}}}, rounds=1)
    assert time.committed is None
    assert not time.fallen
    assert "no value for this machine" in str(time)


def test_the_command_renews_and_then_agrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gate.json"
    path.write_text(json.dumps({"double": {"work": 9.0, "time": {"VSX": 3.0}}}))
    monkeypatch.setattr(gate, "HEADLINES", (doubled(),))
    assert main(["--values", str(path)]) == 1
    assert "fallen by more than 1%" in capsys.readouterr().out
    assert main(["--values", str(path), "--renew"]) == 0
    renewed = load(path)["double"]
    assert renewed["work"] == 2.0
    assert renewed["time"].keys() == {"VSX", machine()}
    assert main(["--values", str(path)]) == 0
