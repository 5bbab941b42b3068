"""Headline ratios that must not fall: ``python -m fastmkd.bench.gate``; ``--renew`` commits to what it finds.

Each headline (`fastmkd.bench.gate_headlines`) runs two ways of one thing in one process, PyTorch's and fastmkd's, and
has up to three ratios:

* *work*, in floating-point operations: exact and the same on every machine, so a loss of `WORK_SHARE` is seen. It shows
  what is called and on how much. It does not show how: for an op of fastmkd its declared cost is counted, whatever the
  kernel does.
* *instructions* that the processor retires, kernels included, where the system lets a program count its own. Most
  virtual machines do not; then the gate says so.
* *time*, the median of ratios taken inside rounds, on one thread: kernels included, on any machine. A machine that
  others use too makes it vary, so it must fall by `TIME_SHARE` in each of `TRIES` tries, with twice the rounds of the
  one before, to count as fallen.

The last two are committed by processor and instruction set. On another processor with the same instruction set they may
fall by `FAR_SHARE` below the least committed one. What is compared with nothing is said in capitals: NOT HELD.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import instructions
from .counted import operations
from .environment import cpu_model, results_folder, slug
from .gate_headlines import HEADLINES, Headline
from .timing import CpuClock, Plan, ratios, time_interleaved

__all__ = ["Ratio", "check", "machine", "main", "measure_instructions", "measure_time", "measure_work"]

WORK_SHARE, INSTRUCTION_SHARE, TIME_SHARE, FAR_SHARE = 0.01, 0.05, 0.25, 0.5
TRIES, ROUNDS = 3, 5
VALUES = results_folder() / "gate.json"


@dataclass(frozen=True)
class Ratio:
    """What was found for a headline.

    Args:
        name: of the headline.
        kind: "work", "instructions" or "time".
        found: how many times as much the plain way takes.
        committed: the value on record; None where there is none to compare with.
        share: how far it may fall.
        elsewhere: True if the value is another processor's.
    """

    name: str
    kind: str
    found: float
    committed: float | None
    share: float
    elsewhere: bool = False

    @property
    def fallen(self) -> bool:
        """True when it lies further below its committed value than it may."""
        return self.committed is not None and self.found < self.committed * (1 - self.share)

    def __str__(self) -> str:
        if self.committed is None:
            return f"{self.name}, {self.kind}: {self.found:.2f}x (NOT HELD: no committed value for {machine()})"
        known = f"committed {self.committed:.2f}x" + (" on another processor" if self.elsewhere else "")
        verdict = f"FALLEN by more than {self.share:.0%}" if self.fallen else f"may fall by {self.share:.0%}"
        return f"{self.name}, {self.kind}: {self.found:.2f}x ({known}, {verdict})"


def machine() -> str:
    """Returns what values are kept by: the processor, PyTorch's instruction set and fastmkd's for float32."""
    try:
        from fastmkd import _native

        own = _native.active_isa().removesuffix("_bf16")  # the kernels of float32 are the same code with and without
    except ImportError:
        own = "none"
    return f"{slug(cpu_model())}, {torch.backends.cpu.get_cpu_capability()}, fastmkd {own}"


def measure_work(headline: Headline) -> float:
    """Returns how many times the operations of fastmkd's way the plain one runs.

    Args:
        headline: what to count.
    """
    found = headline.build()
    with _one_thread(headline):
        return operations(found["plain"]) / operations(found["fastmkd"])


def measure_instructions(headline: Headline) -> float | str:
    """Returns how many times the instructions of fastmkd's way the plain one takes, or why that cannot be counted.

    Args:
        headline: what to count, on one thread.
    """
    reason = instructions.count(lambda: None)
    if isinstance(reason, str):
        return reason
    with _one_thread(headline):
        least = {}
        for name, run in headline.build().items():
            run()  # what the first call alone does (choices of kernels, buffers) is no work of the second
            counts = [instructions.count(run) for _ in range(TRIES)]
            for found in counts:
                if isinstance(found, str):
                    return found
            least[name] = min(int(found) for found in counts)
    return least["plain"] / least["fastmkd"]


def measure_time(headline: Headline, rounds: int) -> float:
    """Returns how many times as long the plain way takes, on one thread.

    Args:
        headline: what to time.
        rounds: each holds one sample of both.
    """
    with _one_thread(headline):
        plan = Plan(seconds=0.0, min_rounds=rounds, max_rounds=rounds, warmup_seconds=0.0)
        times = time_interleaved(headline.build(), CpuClock(), plan)
    return ratios(times, "plain")["fastmkd"].median


@contextmanager
def _one_thread(headline: Headline) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.set_grad_enabled(headline.training):
            yield
    finally:
        torch.set_num_threads(threads)


def held_by(values: Mapping[str, float], here: str) -> tuple[float | None, bool]:
    """Returns the committed value that holds on a machine, and whether it is another processor's.

    Args:
        values: by machine.
        here: what `machine` returns.

    Example:
        >>> held_by({"a, AVX2, fastmkd avx2": 3.0, "b, AVX2, fastmkd avx2": 2.0}, "a, AVX2, fastmkd avx2")
        (3.0, False)
        >>> held_by({"a, AVX2, fastmkd avx2": 3.0, "b, AVX2, fastmkd avx2": 2.0}, "c, AVX2, fastmkd avx2")
        (2.0, True)
        >>> held_by({"a, AVX2, fastmkd avx2": 3.0}, "a, AVX2, fastmkd none")
        (None, False)
    """
    if here in values:
        return values[here], False
    alike = [value for known, value in values.items() if known.partition(", ")[2] == here.partition(", ")[2]]
    return (min(alike), True) if alike else (None, False)


def check(headline: Headline, values: dict[str, Any], rounds: int = ROUNDS) -> list[Ratio]:
    """Measures a headline against the committed values.

    Args:
        headline: what to measure.
        values: content of ``gate.json``.
        rounds: of the first try.

    Returns:
        Its work, its instructions where they can be counted, and its time, the best of as many tries as it took not to
        have fallen.
    """
    known, built = values.get(headline.name, {}), headline.build()
    headline = replace(headline, build=lambda: built)
    found = [Ratio(headline.name, "work", measure_work(headline), known.get("work"), WORK_SHARE)]
    counted = measure_instructions(headline)
    if not isinstance(counted, str):
        found.append(_here(headline, "instructions", counted, known, INSTRUCTION_SHARE))
    best = 0.0
    for attempt in range(TRIES):
        best = max(best, measure_time(headline, rounds << attempt))
        time = _here(headline, "time", best, known, TIME_SHARE)
        if not time.fallen:
            break
    return [*found, time]


def _here(headline: Headline, kind: str, found: float, known: dict[str, Any], share: float) -> Ratio:
    committed, elsewhere = held_by(known.get(kind, {}), machine())
    return Ratio(headline.name, kind, found, committed, FAR_SHARE if elsewhere else share, elsewhere)


def load(path: Path = VALUES) -> dict[str, Any]:
    """Returns the committed values: by headline ``work``, and ``instructions`` and ``time`` by machine.

    Args:
        path: the file.
    """
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _renewed(entry: dict[str, Any], found: list[Ratio]) -> dict[str, Any]:
    """A headline's entry with what was found here; what other machines found stays."""
    for ratio in found:
        if ratio.kind == "work":
            entry["work"] = round(ratio.found, 3)
        else:
            entry[ratio.kind] = {**entry.get(ratio.kind, {}), machine(): round(ratio.found, 2)}
    return entry


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m fastmkd.bench.gate``; returns 1 if a ratio has fallen."""
    parser = argparse.ArgumentParser(prog="python -m fastmkd.bench.gate", description=__doc__.splitlines()[0])
    parser.add_argument("--renew", action="store_true", help="write what is found, from five times the rounds")
    parser.add_argument("--values", type=Path, default=VALUES, help="file of the committed values")
    arguments = parser.parse_args(argv)
    values = load(arguments.values)
    reason = instructions.count(lambda: None)
    if isinstance(reason, str):
        print(f"INSTRUCTIONS ARE NOT COUNTED, what kernels really do is held by time alone: {reason}")
    ratios: list[Ratio] = []
    renewed: dict[str, Any] = {}
    for headline in HEADLINES:
        found = check(headline, {} if arguments.renew else values, ROUNDS * (5 if arguments.renew else 1))
        renewed[headline.name] = _renewed(values.get(headline.name, {}), found)
        ratios += found
        for ratio in found:
            print(f"{ratio.name}, {ratio.kind}: {ratio.found:.2f}x" if arguments.renew else ratio, flush=True)
    if arguments.renew:
        arguments.values.write_text(json.dumps(renewed, indent=1) + "\n")
        print(arguments.values)
        return 0
    loose = [ratio for ratio in ratios if ratio.committed is None]
    if loose:
        print(
            f"NOT HELD: {len(loose)} of {len(ratios)} ratios were compared with nothing, since no value is committed "
            f"for {machine()}; run python -m fastmkd.bench.gate --renew while the machine is quiet, and commit it."
        )
    return int(any(ratio.fallen for ratio in ratios))


if __name__ == "__main__":
    sys.exit(main())
