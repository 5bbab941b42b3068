"""One number that was asked for, and how such numbers are written down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Target", "inverse", "on_gpu", "share"]


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
        place = (record["benchmark"], record["dtype"], record["label"])
        if place != (self.benchmark, self.dtype, self.label) or not record["panel"].startswith(self.panel):
            return None
        if (record["clock"] != "cpu") != self.gpu:
            return None
        if self.of_bound:
            found = {v["name"]: v["bound"]["share"] for v in record["variants"] if v.get("bound")}
            if not self.against:
                return found.get(self.variant)
        else:
            found = {v["name"]: v["ratio"]["median"] for v in record["variants"] if "ratio" in v}
        against = self.against or record["baseline"]
        return found[self.variant] / found[against] if {self.variant, against} <= found.keys() else None


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
