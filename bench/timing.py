"""Interleaved timing: every round times each variant once, in a fresh random order.

A shared or warming machine drifts over seconds; two variants timed one after the other would differ by the drift. Here
a ratio is taken inside each round, between samples that lie close together, and the median of the rounds' ratios is
reported with its quartiles. CPU samples use ``perf_counter``; GPU samples use CUDA events after a flush of the L2.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Clock", "CpuClock", "CudaClock", "Plan", "Spread", "make_clock", "ratios", "time_interleaved"]


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Args:
        seconds: stop after this long, once `min_rounds` are done.
        min_rounds: never fewer rounds; each holds one sample of every variant.
        max_rounds: never more.
        warmup_seconds: warm-up of each variant, at least two calls.
    """

    seconds: float = 20.0
    min_rounds: int = 9
    max_rounds: int = 200
    warmup_seconds: float = 0.3

    @classmethod
    def quick(cls) -> Plan:
        """A plan for smoke tests and lent machines."""
        return cls(seconds=1.0, min_rounds=5, max_rounds=100, warmup_seconds=0.05)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a list of numbers.

    Example:
        >>> Spread.of([3.0, 1.0, 2.0])
        Spread(median=2.0, low=1.5, high=2.5)
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The spread of one or more numbers."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


class Clock:
    """Times calls; `warm_up` comes first and may set up what `sample` needs."""

    def warm_up(self, name: str, run: Callable[[], Any], seconds: float) -> None:
        """Calls `run` at least twice and for about `seconds`."""
        raise NotImplementedError

    def sample(self, name: str, run: Callable[[], Any]) -> float:
        """Seconds of one call of `run`."""
        raise NotImplementedError


class CpuClock(Clock):
    """``perf_counter`` around enough calls to fill `fill` seconds, so that the timer's own cost disappears."""

    def __init__(self, fill: float = 2e-3) -> None:
        self.fill = fill
        self._calls: dict[str, int] = {}

    def warm_up(self, name: str, run: Callable[[], Any], seconds: float) -> None:
        """Calls `run` at least twice and finds how many calls make one sample."""
        run()
        taken: list[float] = []
        while not taken or sum(taken) < seconds:
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
        self._calls[name] = max(1, round(self.fill / max(statistics.median(taken), 1e-9)))

    def sample(self, name: str, run: Callable[[], Any]) -> float:
        """Seconds of one call, as the mean of one sample's calls."""
        calls = self._calls[name]
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls


class CudaClock(Clock):
    """CUDA events around one call, after writing a buffer of several times the L2 cache.

    Args:
        device: the CUDA device.
        device_time: keep the device busy while the host launches, so that the host's share disappears (one kernel);
            False starts from an idle device, as a user's step does.
    """

    def __init__(self, device: torch.device, device_time: bool) -> None:
        self.device_time = device_time
        properties = torch.cuda.get_device_properties(device)
        size = max(256 << 20, 4 * int(getattr(properties, "L2_cache_size", 0)))
        self._flush = torch.empty(size // 4, dtype=torch.int32, device=device)
        self._spin: dict[str, int] = {}
        self._cycles_per_second = self._measure_spin() if device_time else 0.0

    def _measure_spin(self) -> float:
        cycles = 10_000_000
        taken = []
        for _ in range(3):
            start, end = _events()
            start.record()
            torch.cuda._sleep(cycles)
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) * 1e-3)
        return cycles / min(taken)

    def warm_up(self, name: str, run: Callable[[], Any], seconds: float) -> None:
        """Calls `run` at least twice and learns how long the host takes to launch it."""
        run()
        torch.cuda.synchronize()
        launches: list[float] = []
        begin = time.perf_counter()
        while not launches or time.perf_counter() - begin < seconds:
            start = time.perf_counter()
            run()
            launches.append(time.perf_counter() - start)
            torch.cuda.synchronize()
        self._spin[name] = int((1.5 * statistics.median(launches) + 30e-6) * self._cycles_per_second)

    def sample(self, name: str, run: Callable[[], Any]) -> float:
        """Seconds between two events around one call."""
        start, end = _events()
        self._flush.zero_()
        if self.device_time:
            torch.cuda._sleep(self._spin[name])
        else:
            torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def make_clock(device: torch.device, device_time: bool) -> Clock:
    """The clock for a device; see `CudaClock` for `device_time`."""
    return CudaClock(device, device_time) if device.type == "cuda" else CpuClock()


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def time_interleaved(
    runs: Mapping[str, Callable[[], Any]],
    clock: Clock,
    plan: Plan,
    seed: int = 0,
    on_round: Callable[[float], None] | None = None,
) -> dict[str, list[float]]:
    """Times all of `runs` in turn, round after round, in a new random order each round.

    Args:
        runs: name to callable.
        clock: how one sample is taken.
        plan: when to stop.
        seed: of the order.
        on_round: called after each round with the share of the plan that is done, in [0, 1].

    Returns:
        Name to seconds per call, one number a round; equal positions belong to the same round.

    Example:
        >>> times = time_interleaved({"a": lambda: None, "b": lambda: None}, CpuClock(1e-5), Plan(0.0, 3, 3, 0.0))
        >>> [len(t) for t in times.values()]
        [3, 3]
    """
    for name, run in runs.items():
        clock.warm_up(name, run, plan.warmup_seconds)
    order, shuffle = list(runs), random.Random(seed).shuffle
    times: dict[str, list[float]] = {name: [] for name in runs}
    with _no_collection():
        begin = time.perf_counter()
        for done in range(1, plan.max_rounds + 1):
            shuffle(order)
            for name in order:
                times[name].append(clock.sample(name, runs[name]))
            passed = time.perf_counter() - begin
            if on_round is not None:
                by_time = min(done / plan.min_rounds, passed / plan.seconds if plan.seconds else 1.0)
                on_round(min(1.0, max(done / plan.max_rounds, by_time)))
            if done >= plan.min_rounds and passed >= plan.seconds:
                break
    return times


def ratios(times: Mapping[str, list[float]], baseline: str) -> dict[str, Spread]:
    """How many times faster than `baseline` each variant is: the spread of the rounds' own ratios.

    Example:
        >>> ratios({"slow": [2.0, 4.0], "fast": [1.0, 1.0]}, "slow")["fast"].median
        3.0
    """
    return {
        name: Spread.of([base / own for base, own in zip(times[baseline], taken, strict=True)])
        for name, taken in times.items()
    }
