"""Headline ratios that must not fall: ``python -m fastmkd.bench.gate``; ``--renew`` commits to what it finds.

Each headline runs two ways of one thing, the plain one and fastmkd's, and has two ratios. *Work* counts the operations
that both really run; it is the same on every machine, so a loss of `WORK_SHARE` is seen. *Time* is the median of ratios
taken inside rounds, on one thread; a machine that others use too makes it vary, so it must fall by `TIME_SHARE` in each
of `TRIES` tries, with twice the rounds of the one before, to count as fallen. Times are committed for each instruction
set that they were measured on; on another one only work is compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

import fastmkd
from fastmkd.nn.cifar import ResNet

from .cases.cka import pairwise
from .counted import operations
from .crossings import Shape, ways
from .environment import results_folder
from .timing import CpuClock, Plan, ratios, time_interleaved

__all__ = ["HEADLINES", "Headline", "Ratio", "check", "machine", "main", "measure_time", "measure_work"]

WORK_SHARE, TIME_SHARE = 0.01, 0.25
TRIES, ROUNDS = 3, 5
VALUES = results_folder() / "gate.json"

Ways = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Headline:
    """Two ways to do one thing.

    Args:
        name: what it stands for.
        build: makes both, ``{"plain": ..., "fastmkd": ...}``.
        training: whether they want gradients.
    """

    name: str
    build: Callable[[], Ways]
    training: bool = False


@dataclass(frozen=True)
class Ratio:
    """What was found for a headline.

    Args:
        name: of the headline.
        kind: "work" or "time".
        found: how many times as much the plain way takes.
        committed: the value on record; None where this machine has none.
        share: how far it may fall.
    """

    name: str
    kind: str
    found: float
    committed: float | None
    share: float

    @property
    def fallen(self) -> bool:
        """True when it lies further below its committed value than it may."""
        return self.committed is not None and self.found < self.committed * (1 - self.share)

    def __str__(self) -> str:
        known = "no value for this machine" if self.committed is None else f"committed {self.committed:.2f}x"
        verdict = f", fallen by more than {self.share:.0%}" if self.fallen else ""
        return f"{self.name}, {self.kind}: {self.found:.2f}x ({known}{verdict})"


def _teacher() -> Ways:
    """A frozen ViT on half of its patches."""
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", depth=6).eval()
    masked, images = fastmkd.MaskedViT(model), torch.randn(4, 3, 224, 224)
    keep = torch.rand(4, 196).argsort(1)[:, :98].sort(1).values
    return {"plain": lambda: model(images), "fastmkd": lambda: masked(images, keep=keep)}


def _step() -> Ways:
    """A MaskedKD step: forward and backward, the teacher on half of the patches or on all."""
    torch.manual_seed(0)
    images, targets = torch.randn(2, 3, 112, 112), torch.tensor([1, 2])

    def step(keep_ratio: float) -> Callable[[], Any]:
        student, teacher = (
            timm.create_model(f"deit_{size}_patch16_224", depth=4, img_size=112, num_classes=10)
            for size in ("tiny", "small")
        )
        method = fastmkd.MaskedKD(student, teacher, keep_ratio=keep_ratio)
        return lambda: method(images, targets).loss.backward()

    return {"plain": step(1.0), "fastmkd": step(0.5)}


def _convolution() -> Ways:
    """One of ResNet-50's 3x3 layers, forward and backward, three quarters hidden."""
    found = ways(Shape(128, 128, 3, 1, 1, 28, 4), 0.75, torch.device("cpu"), torch.float32, training=True)
    return {"plain": found["dense"], "fastmkd": found["packed"]}


def _network() -> Ways:
    """A whole CNN, forward and backward, three quarters hidden, against the unmasked one."""
    torch.manual_seed(0)
    plain, packed = (ResNet(20, num_classes=10).train() for _ in range(2))
    fastmkd.convert_cnn(packed)
    images = torch.randn(8, 3, 56, 56)
    visible = fastmkd.random_mask(8, (7, 7), 0.75)
    return {
        "plain": lambda: plain(images).sum().backward(),
        "fastmkd": lambda: packed(fastmkd.pack(images, visible)).sum().backward(),
    }


def _cka() -> Ways:
    """All pairs of six and six layers, against Eq. 6 of DPK pair by pair."""
    torch.manual_seed(0)
    xs, ys = ([torch.randn(32, 64, 14, 14) for _ in range(6)] for _ in range(2))
    return {"plain": lambda: pairwise(xs, ys), "fastmkd": lambda: fastmkd.cka_matrix(xs, ys)}


HEADLINES = (
    Headline("masked teacher, half of the patches", _teacher),
    Headline("MaskedKD step, half of the patches", _step, training=True),
    Headline("3x3 convolution, three quarters hidden", _convolution, training=True),
    Headline("ResNet step, three quarters hidden", _network, training=True),
    Headline("CKA of 6 x 6 layers", _cka),
)


def machine() -> str:
    """Returns what times are kept by: PyTorch's instruction set and fastmkd's."""
    try:
        from fastmkd import _native

        own = _native.active_isa()
    except ImportError:
        own = "none"
    return f"{torch.backends.cpu.get_cpu_capability()}, fastmkd {own}"


def measure_work(headline: Headline) -> float:
    """Returns how many times the operations of fastmkd's way the plain one runs.

    Args:
        headline: what to count.
    """
    found = headline.build()
    return operations(found["plain"]) / operations(found["fastmkd"])


def measure_time(headline: Headline, rounds: int) -> float:
    """Returns how many times as long the plain way takes, on one thread.

    Args:
        headline: what to time.
        rounds: each holds one sample of both.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.set_grad_enabled(headline.training):
            plan = Plan(seconds=0.0, min_rounds=rounds, max_rounds=rounds, warmup_seconds=0.0)
            times = time_interleaved(headline.build(), CpuClock(), plan)
    finally:
        torch.set_num_threads(threads)
    return ratios(times, "plain")["fastmkd"].median


def check(headline: Headline, values: dict[str, Any], rounds: int = ROUNDS) -> list[Ratio]:
    """Measures a headline against the committed values.

    Args:
        headline: what to measure.
        values: content of ``gate.json``.
        rounds: of the first try.

    Returns:
        Its work and its time, the best of as many tries as it took not to have fallen.
    """
    known = values.get(headline.name, {})
    work = Ratio(headline.name, "work", measure_work(headline), known.get("work"), WORK_SHARE)
    committed = known.get("time", {}).get(machine())
    best = Ratio(headline.name, "time", 0.0, committed, TIME_SHARE)
    for attempt in range(TRIES):
        found = max(best.found, measure_time(headline, rounds << attempt))
        best = Ratio(headline.name, "time", found, committed, TIME_SHARE)
        if not best.fallen:
            break
    return [work, best]


def load(path: Path = VALUES) -> dict[str, Any]:
    """Returns the committed values: by headline, ``work`` and by machine ``time``.

    Args:
        path: the file.
    """
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m fastmkd.bench.gate``; returns 1 if a ratio has fallen."""
    parser = argparse.ArgumentParser(prog="python -m fastmkd.bench.gate", description=__doc__.splitlines()[0])
    parser.add_argument("--renew", action="store_true", help="write what is found, from five times the rounds")
    parser.add_argument("--values", type=Path, default=VALUES, help="file of the committed values")
    arguments = parser.parse_args(argv)
    values = load(arguments.values)
    fallen = 0
    for headline in HEADLINES:
        for ratio in check(headline, {} if arguments.renew else values, ROUNDS * (5 if arguments.renew else 1)):
            print(ratio, flush=True)
            fallen += ratio.fallen
            entry = values.setdefault(ratio.name, {}) if arguments.renew else {}
            if ratio.kind == "work":
                entry["work"] = round(ratio.found, 3)
            else:
                entry["time"] = {**entry.get("time", {}), machine(): round(ratio.found, 2)}
    if arguments.renew:
        arguments.values.write_text(json.dumps(values, indent=1) + "\n")
        print(arguments.values)
    return int(fallen > 0)


if __name__ == "__main__":
    sys.exit(main())
