"""The measurement behind the table of crossings, with a clock that is told what to find."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from fastmkd.bench import crossings
from fastmkd.bench.timing import Clock, Plan
from fastmkd.nn.crossings import device_key, read_table

SMALL = crossings.Shape(8, 8, 3, 1, 1, 7, 1)
ONCE = Plan(seconds=0.0, min_rounds=1, max_rounds=1, warmup_seconds=0.0)


class ToldClock(Clock):
    """The packed way takes as long as there are rows, the dense way as long as it takes `dense_from` of them."""

    def __init__(self, dense_from: float) -> None:
        self.dense_from = dense_from

    def warm_up(self, name, run, seconds):
        self.share = len(run()[0]) / 49  # the gradient of the rows

    def sample(self, name, run):
        return self.share if name == "packed" else self.dense_from


def test_measures_down_to_the_first_loss():
    gains = crossings.measure(SMALL, ToldClock(0.8), ONCE, torch.device("cpu"), torch.float32)
    assert list(gains) == pytest.approx([1.0, 44 / 49, 37 / 49])
    assert list(gains.values()) == pytest.approx([share / 0.8 for share in gains])


def test_finds_the_crossing():
    for truth in (0.6, 0.7, 0.85, 0.93):
        gains = crossings.measure(SMALL, ToldClock(truth), ONCE, torch.device("cpu"), torch.float32)
        assert crossings.crossing(gains) == pytest.approx(truth * crossings.MARGIN, abs=0.02)
    assert crossings.crossing({1.0: 1.01, 0.9: 0.9}) is None, "a tie stays packed"
    assert crossings.crossing({1.0: 3.0, 0.9: 2.9, 0.75: 2.5, 0.51: 2.0}) == 0.51, "no further than was measured"


def test_every_layer_runs_and_has_a_class_of_its_own():
    names = Counter(shape.named(torch.float32) for shape in crossings.LAYERS)
    assert not [named for named, count in names.items() if count > 1]
    for shape in crossings.LAYERS:
        small = shape._replace(cin=min(shape.cin, 2 * shape.groups), cout=2 * shape.groups, batch=1)
        small = small._replace(size=crossings.GRID * shape.stride) if shape.groups == 1 else small._replace(size=14)
        for training in (True, False):
            made = crossings.ways(small, 0.1, torch.device("cpu"), torch.float32, training)
            packed, dense = (run() for run in made.values())
            assert packed[0].requires_grad is dense[0].requires_grad is False
            for p, d in zip(packed, dense, strict=True):
                torch.testing.assert_close(p, d, rtol=1e-3, atol=1e-3)


def test_writes_its_part_of_the_table(tmp_path, monkeypatch, capsys):
    path = tmp_path / f"{device_key(torch.device('cpu'))}.json"
    path.write_text(json.dumps({"choices": {"cls_saliency": "cpp"}, "verified": ["a/b"], "dense_from": {"old": 0.5}}))
    monkeypatch.setattr(crossings, "LAYERS", [SMALL, SMALL._replace(kernel=5)])
    monkeypatch.setattr(crossings, "make_clock", lambda device, device_time: ToldClock(0.8))
    monkeypatch.setattr(crossings, "PLAN", ONCE)
    assert crossings.main(["--device", "cpu", "--only", "3x3", "--out", str(tmp_path)]) == 0
    written = json.loads(path.read_text())
    assert written["choices"] == {"cls_saliency": "cpp"}
    assert written["verified"] == ["a/b"]
    assert written["measured"]["float32"]["torch"] == torch.__version__
    named, about = SMALL.named(torch.float32), pytest.approx(0.84, abs=0.02)
    assert read_table(path) == {"old": 0.5, named: about, f"{named}/forward": about}
    out = capsys.readouterr()
    assert named in out.out
    assert "[2/2" in out.err, "progress"
