"""One number that was asked for, and how such numbers are written down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..timing import Spread

__all__ = ["Measured", "Target", "inverse", "on_gpu", "share"]


class Measured(NamedTuple):
    """What a record says of a target.

    Args:
        median: the ratio.
        quartiles: of the rounds' ratios; None where the record has no rounds of both variants, or memory was measured.
        rounds: of timing; 0 for memory.
    """

    median: float
    quartiles: tuple[float, float] | None
    rounds: int

    @property
    def of_medians(self) -> bool:
        """True for a ratio made of medians, from a record that does not hold each round's times."""
        return self.quartiles is None and self.rounds > 0


@dataclass(frozen=True)
class Target:
    """One number that was asked for.

    Args:
        sentence: what was asked, in words.
        benchmark: where it is measured.
        dtype: of the setting.
        panel: of the case; a prefix, so that the batch may differ.
        label: of the case.
        variant: whose ratio counts.
        least: the ratio must be at least this.
        show: the ratio as a reader wants it.
        against: the variant that the ratio is to; empty for the case's baseline.
        gpu: measured on a GPU; otherwise on a CPU.
        of_bound: what counts is the variant's share of its physical bound; with `against`, over that variant's share.
    """

    sentence: str
    benchmark: str
    dtype: str
    panel: str
    label: str
    variant: str
    least: float
    show: Callable[[float], str] = "{:.2f}x".format
    against: str = ""
    gpu: bool = False
    of_bound: bool = False

    def ratio(self, record: dict[str, Any]) -> float | None:
        """The ratio that counts if `record` is the right one, else None."""
        measured = self.measured(record)
        return None if measured is None else measured.median

    def measured(self, record: dict[str, Any]) -> Measured | None:
        """The ratio that counts with its spread, if `record` is the right one and both variants were right, else None.

        Args:
            record: of a benchmark.
        """
        place = (record["benchmark"], record["dtype"], record["label"])
        if place != (self.benchmark, self.dtype, self.label) or not record["panel"].startswith(self.panel):
            return None
        if (record["clock"] != "cpu") != self.gpu:
            return None
        variants = {v["name"]: v for v in record["variants"] if v.get("check", {"ok": True})["ok"]}
        own, other = variants.get(self.variant), variants.get(self.against or record["baseline"])
        if own is not None and self.of_bound and not self.against:
            return _of_bound(own, None)
        if own is None or other is None:
            return None
        if self.of_bound:
            return _of_bound(own, other)
        if "ratio" not in own or "ratio" not in other:
            return None
        return _of_times(own, other, other["name"] == record["baseline"])

    def words(self, measured: Measured) -> str:
        """The ratio and its quartiles as a reader wants them, the smaller quartile first.

        Args:
            measured: what a record says.

        Example:
            >>> target = Target("", "", "", "", "", "", 2.0, share)
            >>> target.words(Measured(2.0, (1.0, 4.0), 9)), target.words(Measured(2.0, None, 9))
            ('50.00 % (25.00 % to 100.00 %)', '50.00 % (of medians)')
        """
        if measured.quartiles is None:
            return self.show(measured.median) + (" (of medians)" if measured.of_medians else "")
        low, high = measured.quartiles if self.show not in (inverse, share) else measured.quartiles[::-1]
        return f"{self.show(measured.median)} ({self.show(low)} to {self.show(high)})"

    def verdict(self, measured: Measured) -> str:
        """Whether the target was reached, and whether the other answer lies within the quartiles.

        Args:
            measured: what a record says.
        """
        reached = measured.median >= self.least
        words = "reached" if reached else "**not reached**"
        if measured.quartiles is None:
            return words + (", spread not recorded" if measured.of_medians else "")
        low, high = measured.quartiles
        return words + (", within the spread" if (low < self.least if reached else high >= self.least) else "")


def _of_times(own: dict[str, Any], other: dict[str, Any], baseline: bool) -> Measured:
    if baseline:
        known = own["ratio"]
        quartiles = (known["low"], known["high"]) if own.get("rounds") else None
        return Measured(known["median"], quartiles, own.get("rounds", 0))
    if "bytes" in own:
        return Measured(other["bytes"] / own["bytes"], None, 0)
    if "times" in own and "times" in other:
        return _of_rounds([theirs / mine for theirs, mine in zip(other["times"], own["times"], strict=True)])
    # Neither quotient of medians is the median of quotients; the worse one makes the smaller claim.
    of_times = other["seconds"]["median"] / own["seconds"]["median"]
    return Measured(min(of_times, own["ratio"]["median"] / other["ratio"]["median"]), None, own["rounds"])


def _of_bound(own: dict[str, Any], other: dict[str, Any] | None) -> Measured | None:
    """A variant's share of its bound, or that over another's."""
    if not own.get("bound") or (other is not None and not other.get("bound")):
        return None
    share, seconds = own["bound"]["share"], own["seconds"]
    if other is None:
        least = share * seconds["median"]
        return Measured(share, (least / seconds["high"], least / seconds["low"]), own["rounds"])
    share /= other["bound"]["share"]
    if "times" not in own or "times" not in other:
        return Measured(share, None, own["rounds"])
    least = share * seconds["median"] / other["seconds"]["median"]  # one bound over the other
    return _of_rounds([least * theirs / mine for theirs, mine in zip(other["times"], own["times"], strict=True)])


def _of_rounds(ratios: list[float]) -> Measured:
    spread = Spread.of(ratios)
    return Measured(spread.median, (spread.low, spread.high), len(ratios))


def inverse(ratio: float) -> str:
    """The other way about, for what was to be at most so much."""
    return f"{1 / ratio:.2f}x"


def share(ratio: float) -> str:
    """A part of the whole in percent."""
    return f"{100 / ratio:.2f} %"


def on_gpu(
    what: str, benchmark: str, panel: str, label: str, variant: str, least: float, against: str = "", **more: Any
) -> Target:
    """In bf16 on a GPU, to `against` or, without it, to the physical bound."""
    of_bound = more.setdefault("of_bound", not against)
    asked = f"{least:.3g}x {against}" if against else f"{least:.0%} of the bound".replace("%", " %")
    sentence = f"{what}, bf16 on a GPU: at least {asked}" + (
        ", as shares of their bounds" if against and of_bound else ""
    )
    return Target(sentence, benchmark, "bf16", panel, label, variant, least, against=against, gpu=True, **more)
