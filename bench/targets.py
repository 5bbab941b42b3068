"""What was asked of the speed, so that a page can say what was reached.

Every target is a ratio to a benchmark's baseline, measured on a CPU, that must be at least so much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["TARGETS", "Target"]


@dataclass(frozen=True)
class Target:
    """One number that was asked for.

    Args:
        sentence: what was asked, in words.
        benchmark: where it is measured.
        dtype: of the setting.
        panel: of the case; a prefix, so that the batch may differ.
        label: of the case.
        variant: whose ratio to the baseline counts.
        least: the ratio must be at least this.
        show: the ratio as a reader wants it.
    """

    sentence: str
    benchmark: str
    dtype: str
    panel: str
    label: str
    variant: str
    least: float
    show: Callable[[float], str] = "{:.2f}x".format

    def ratio(self, record: dict[str, Any]) -> float | None:
        """The ratio that counts if `record` is the right one, else None."""
        place = (record["benchmark"], record["dtype"], record["label"])
        if place != (self.benchmark, self.dtype, self.label) or not record["panel"].startswith(self.panel):
            return None
        found = [v["ratio"]["median"] for v in record["variants"] if v["name"] == self.variant and "ratio" in v]
        return found[0] if found else None


def _inverse(ratio: float) -> str:
    return f"{1 / ratio:.2f}x"


def _share(ratio: float) -> str:
    return f"{100 / ratio:.2f} %"


def _teacher(model: str, dtype: str, words: str, least: float) -> Target:
    sentence = f"masked {model} teacher, 50 % kept, {words}: at least {least}x the full model"
    return Target(sentence, "masked_teacher", dtype, model, "50 % kept", "fastmkd", least)


TARGETS = (
    _teacher("DeiT-S", "fp32", "fp32", 2.45),
    _teacher("DeiT-B", "fp32", "fp32", 2.2),
    _teacher("DeiT-S", "bf16", "bf16 autocast", 2.0),
    _teacher("DeiT-B", "bf16", "bf16 autocast", 2.0),
    Target(
        "saliency: under 1 % of the student's forward",
        benchmark="cls_saliency",
        dtype="fp32",
        panel="DeiT-Ti",
        label="share of the student",
        variant="auto",
        least=100.0,
        show=_share,
    ),
    Target(
        "import of fastmkd: under 1.5 times torch + timm",
        benchmark="import_time",
        dtype="fp32",
        panel="import",
        label="fresh process",
        variant="from fastmkd import MaskedViT, MaskedKD",
        least=1 / 1.5,
        show=_inverse,
    ),
)
