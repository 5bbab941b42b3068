"""The few numbers that the README shows, taken from the same records as ``docs/benchmarks.md``.

``python -m fastmkd.bench.headlines`` rewrites what stands between the README's markers; a test fails when they differ.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .pages import page_command
from .report import fill_markers, latest, load
from .targets import Target

__all__ = ["main", "table"]


def _headline(what: str, against: str, benchmark: str, panel: str, label: str, baseline: str = "") -> Target:
    place = (benchmark, "fp32", panel, label)
    return Target(f"{what} | {against}", *place, "fastmkd", 1.0, "{:.2f}".format, against=baseline)


HEADLINES = (
    _headline("DeiT-B teacher, half of the patches", "all patches", "masked_teacher", "DeiT-B", "50 % kept"),
    _headline(
        "MaskedKD step, DeiT-S from DeiT-B, half of the patches",
        "distilling with all patches",
        "maskedkd_step",
        "DeiT-S from DeiT-B",
        "50 % kept",
    ),
    _headline(
        "DMAE step, ViT-B from ViT-L, batch 16, 75 % hidden",
        "the public code's way",
        "dmae_step",
        "ViT-B from ViT-L, batch 16",
        "75 % hidden",
    ),
    _headline(
        "MKD step, RetinaNet R50 from R101, 30 % hidden",
        "multiplying by the mask",
        "mkd_step",
        "training step",
        "30 % hidden",
        "multiplied",
    ),
    _headline(
        "DPK step, ResNet-18 from ResNet-34", "eager PyTorch", "dpk_step", "ResNet-18 from ResNet-34", "224 pixels"
    ),
    _headline(
        "ResNet-50 training step, 75 % hidden",
        "the whole image",
        "masked_resnet",
        "ResNet-50 training step",
        "75 % hidden",
        "plain, unmasked",
    ),
)


def table(records: Sequence[dict[str, Any]]) -> str:
    """Returns the README's table, "" where there is no record.

    Args:
        records: what `latest` gives.

    Example:
        >>> table([])
        ''
    """
    if not records:
        return ""
    rows = [
        "| what, in float32 | against | on | times as fast (quartiles) | rounds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for headline in HEADLINES:
        known = [(record, headline.measured(record)) for record in records]
        found = [(record["env"], measured) for record, measured in known if measured is not None]
        for env, measured in found:
            where = f"{env['threads']} threads of {env['device']}"
            rows.append(f"| {headline.sentence} | {where} | {headline.words(measured)} | {measured.rounds} |")
        if not found:
            rows.append(f"| {headline.sentence} | - | no record yet | - |")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m fastmkd.bench.headlines``; returns the exit status, see `page_command`."""

    def render(page: str, results: Path) -> str:
        return fill_markers(page, lambda _: table(latest(load(results))))

    return page_command("headlines", __doc__, "README.md", render, argv)


if __name__ == "__main__":
    sys.exit(main())
