"""What is measured: benchmarks, the cases of a benchmark, and the variants that a case compares.

A benchmark is a function that builds one `Case` from a `Setting` (device, dtype, quick) and a few parameters; the
decorator `benchmark` gives it a name, its grid of parameters and the devices and dtypes that it can run on. A case
holds variants that run on the same inputs, the baseline among them, and for each function that the variants compute an
`Answer`: how to compute it in float64 and what it must cost. Two variants with the same answer must agree; a speed-up
is only reported for a variant that does (`fastmkd.bench.verify`).

Entries for ops are generated from the op registry (`fastmkd.bench.op_entries`); those for whole models are in
`fastmkd.bench.cases`.
"""

from __future__ import annotations

import fnmatch
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

__all__ = ["DTYPES", "Answer", "Benchmark", "Case", "Setting", "Variant", "benchmark", "benchmarks", "find"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """Where and how a benchmark runs.

    Args:
        device: the device that holds the inputs.
        dtype: ``"fp32"``, ``"bf16"`` or ``"fp16"``; whole models run under autocast for the last two.
        quick: fewer cases and rounds, for a smoke test or a machine that is lent for minutes.
    """

    device: torch.device
    dtype: str = "fp32"
    quick: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as PyTorch names it."""
        return DTYPES[self.dtype]

    @property
    def on_gpu(self) -> bool:
        """True on a CUDA device."""
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Answer:
    """A function that variants compute: one answer for all variants that must agree.

    Args:
        exact: computes it in float64 (or any way that is exact); None when there is nothing to compare with.
        flops: floating-point operations that any way of computing it must do, for the physical bound; 0 if not counted.
        bytes: bytes that any way must move, inputs once and outputs once; 0 if not counted.
        floor: relative error that is allowed on top of twice plain PyTorch's own, for all tensors of the result or one
            for each; 0 is right for everything but a result that depends on a discrete choice (which tokens are kept).
    """

    exact: Callable[[], Any] | None = None
    flops: float = 0.0
    bytes: float = 0.0
    floor: float | tuple[float, ...] = 0.0


@dataclass(frozen=True)
class Variant:
    """One way to do the work of a case.

    Args:
        name: label in tables and plots.
        run: does the work once and returns the result (a tensor, a tuple of tensors, or None).
        answer: the function it computes.
        plain: True for the PyTorch implementation whose error sets the bar for the others with the same answer.
        unavailable: None, or a sentence that says why this variant cannot run here; it is listed and not run.
        read: brings what `run` returned into the form in which variants are compared; not timed.
    """

    name: str
    run: Callable[[], Any]
    answer: Answer
    plain: bool = False
    unavailable: str | None = None
    read: Callable[[Any], Any] = lambda result: result


@dataclass
class Case:
    """Variants on the same inputs.

    Args:
        label: names the case within its panel, such as ``"50 % kept"``.
        panel: cases with the same panel share a plot, such as ``"DeiT-S, batch 8"``.
        variants: what is compared.
        baseline: name of the variant that ratios are against.
        items: images per call, for throughput; 0 when that means nothing.
        device_time: on a GPU, measure the time of the device alone with the launch hidden (right for one kernel);
            False measures from an idle device to the end, as a user's step sees it.
        quantity: what is measured of a call: its time, or the peak of the memory that it allocates.
        min_rounds: so many rounds of timing are enough; for calls that take seconds, whose relative spread is small.
        params: numbers that describe the inputs, written to the record.
    """

    label: str
    panel: str
    variants: list[Variant]
    baseline: str
    items: int = 0
    device_time: bool = False
    quantity: Literal["time", "memory"] = "time"
    min_rounds: int | None = None
    params: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [v.name for v in self.variants]
        if self.baseline not in names:
            raise ValueError(f"baseline={self.baseline!r} of case {self.label!r} is not among its variants {names}.")
        if len(set(names)) != len(names):
            raise ValueError(f"case {self.label!r} has two variants of one name: {names}.")


@dataclass(frozen=True)
class Benchmark:
    """A registered benchmark; see `benchmark` for the meaning of the fields."""

    name: str
    summary: str
    build: Callable[..., Case]
    grid: Callable[[Setting], list[dict[str, Any]]]
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]

    def runs_on(self, device: str, dtype: str) -> bool:
        """True when it can run on this device type and dtype; float16 is for GPUs only (CPUs emulate it)."""
        return device in self.devices and dtype in self.dtypes and (dtype != "fp16" or device == "cuda")


_REGISTERED: dict[str, Benchmark] = {}


def benchmark(
    name: str,
    *,
    summary: str,
    grid: Callable[[Setting], list[dict[str, Any]]],
    devices: Iterable[str] = ("cpu", "cuda"),
    dtypes: Iterable[str] = ("fp32", "bf16"),
) -> Callable[[Callable[..., Case]], Callable[..., Case]]:
    """Registers the decorated function ``build(setting, **parameters) -> Case`` as a benchmark.

    Args:
        name: what ``fastmkd bench NAME`` calls it; also the name of its record file.
        summary: one line for ``--list``.
        grid: the parameters of its cases for a setting; cheap, since the runner counts cases before it starts.
        devices: device types that it runs on.
        dtypes: names of `DTYPES` that it runs in.

    Raises:
        ValueError: the name is taken.

    Example:
        >>> answer = Answer(exact=lambda: torch.ones(3, dtype=torch.float64))
        >>> @benchmark("doctest_ones", summary="ones", grid=lambda setting: [{"size": 3}])
        ... def ones(setting, size):
        ...     return Case("3", "ones", [Variant("torch", lambda: torch.ones(size), answer, plain=True)], "torch")
        >>> _REGISTERED.pop("doctest_ones").runs_on("cpu", "fp32")
        True
    """

    def register(build: Callable[..., Case]) -> Callable[..., Case]:
        if name in _REGISTERED:
            raise ValueError(f"there are two benchmarks called {name!r}; give one of them another name.")
        _REGISTERED[name] = Benchmark(name, summary, build, grid, tuple(devices), tuple(dtypes))
        return build

    return register


def benchmarks() -> dict[str, Benchmark]:
    """All benchmarks by name: those of `fastmkd.bench.cases`, then one for each op of the op registry."""
    from . import cases, op_entries

    for module in pkgutil.iter_modules(cases.__path__):
        importlib.import_module(f"{cases.__name__}.{module.name}")
    return {**_REGISTERED, **op_entries.generate()}


def find(patterns: list[str]) -> list[Benchmark]:
    """Benchmarks whose name matches one of the patterns (``op.*``), in the order of the patterns; all for none.

    An op's name stands for its generated benchmark unless one of that name is written by hand.

    Raises:
        ValueError: a pattern matches nothing; the message lists the names.
    """
    known = benchmarks()
    names: dict[str, None] = {}
    for pattern in patterns or ["*"]:
        matching = fnmatch.filter(known, pattern) or fnmatch.filter(known, f"op.{pattern}")
        if not matching:
            raise ValueError(f"no benchmark is called {pattern!r}; the benchmarks are {', '.join(known)}.")
        names.update(dict.fromkeys(matching))
    return [known[name] for name in names]
