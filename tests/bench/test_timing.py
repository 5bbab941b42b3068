"""The timing harness on stand-ins with known times."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastmkd.bench import roofline
from fastmkd.bench.timing import Clock, CpuClock, CudaClock, Plan, Spread, ratios, time_interleaved


class FakeClock(Clock):
    """Answers with the next number of a script and notes who asked."""

    def __init__(self, script: dict[str, list[float]]) -> None:
        self.script = {name: iter(times) for name, times in script.items()}
        self.asked: list[str] = []
        self.warmed: list[str] = []

    def warm_up(self, name: str, run: Callable[[], Any], seconds: float) -> None:
        self.warmed.append(name)

    def sample(self, name: str, run: Callable[[], Any]) -> float:
        self.asked.append(name)
        return next(self.script[name])


def nothing() -> None:
    pass


def test_every_round_times_every_variant_once_in_changing_order() -> None:
    clock = FakeClock({name: [1.0] * 30 for name in "abc"})
    times = time_interleaved(dict.fromkeys("abc", nothing), clock, Plan(0.0, 30, 30, 0.0))
    rounds = [clock.asked[i : i + 3] for i in range(0, 90, 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 3
    assert clock.warmed == ["a", "b", "c"]
    assert {name: len(t) for name, t in times.items()} == {"a": 30, "b": 30, "c": 30}


def test_ratios_pair_the_rounds_so_that_drift_cancels() -> None:
    # The machine slows down tenfold; in each round the fast variant still takes half the time of the slow one.
    drift = [1.0, 2.0, 4.0, 8.0, 10.0]
    found = ratios({"slow": drift, "fast": [t / 2 for t in drift]}, "slow")
    assert found["fast"] == Spread(2.0, 2.0, 2.0)
    assert found["slow"] == Spread(1.0, 1.0, 1.0)


def test_spread_is_median_and_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 3.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


@pytest.mark.parametrize(("plan", "rounds"), [(Plan(0.0, 4, 9, 0.0), 4), (Plan(1e9, 4, 9, 0.0), 9)])
def test_plan_bounds_the_rounds(plan: Plan, rounds: int) -> None:
    told: list[float] = []
    times = time_interleaved({"a": nothing}, FakeClock({"a": [1.0] * 9}), plan, on_round=told.append)
    assert len(times["a"]) == rounds
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_garbage_collection_is_off_while_timing_and_on_again_after() -> None:
    seen: list[bool] = []

    class Watching(FakeClock):
        def sample(self, name: str, run: Callable[[], Any]) -> float:
            seen.append(gc.isenabled())
            return 1.0

    time_interleaved({"a": nothing}, Watching({"a": []}), Plan(0.0, 2, 2, 0.0))
    assert seen == [False, False]
    assert gc.isenabled()


def test_cpu_clock_measures_one_call() -> None:
    clock = CpuClock(fill=0.02)
    clock.warm_up("sleep", lambda: time.sleep(0.004), 0.0)
    taken = clock.sample("sleep", lambda: time.sleep(0.004))
    assert 0.004 <= taken < 0.1  # one call, not the five or so of a sample


def test_bound_takes_the_slower_of_memory_and_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {torch.float32: 100.0, torch.bfloat16: 400.0}
    monkeypatch.setattr(roofline, "copy_rate", lambda device: 10.0)
    monkeypatch.setattr(roofline, "matmul_rate", lambda device, dtype: rates[dtype])
    cpu = torch.device("cpu")
    assert roofline.bound(1000.0, 50.0, cpu, torch.float32) == roofline.Bound(10.0, "compute")
    assert roofline.bound(1000.0, 50.0, cpu, torch.bfloat16) == roofline.Bound(5.0, "memory")
    assert roofline.bound(0.0, 0.0, cpu, torch.float32) is None
    # Where the lower precision has no units of its own, casting up is a way to compute it.
    rates[torch.bfloat16] = 1.0
    assert roofline.bound(1000.0, 0.0, cpu, torch.bfloat16) == roofline.Bound(10.0, "compute")


@pytest.mark.gpu
@pytest.mark.parametrize("device_time", [True, False])
def test_cuda_clock_agrees_with_a_known_copy(device_time: bool) -> None:
    device = torch.device("cuda", 0)
    source = torch.randint(0, 255, (1 << 28,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock = CudaClock(device, device_time)
    clock.warm_up("copy", lambda: target.copy_(source), 0.01)
    taken = min(clock.sample("copy", lambda: target.copy_(source)) for _ in range(5))
    assert 0.3 < 2 * (1 << 28) / taken / roofline.copy_rate(device) < 2.0
    assert torch.equal(source, target)


@pytest.mark.gpu
def test_device_time_hides_the_launch() -> None:
    device = torch.device("cuda", 0)
    small = torch.zeros(16, device=device)

    def slow_launch() -> None:
        end = time.perf_counter() + 300e-6
        while time.perf_counter() < end:
            pass
        small.add_(1)

    clock = CudaClock(device, device_time=True)
    clock.warm_up("add", slow_launch, 0.01)
    assert min(clock.sample("add", slow_launch) for _ in range(5)) < 100e-6
