"""What MKD's decoders hold with SAM and without (MKD, Table 4b): tokens, and attention matrices where these are kept.

``python -m fastmkd.bench.decoder_memory`` prints the table of docs/mkd.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["STRIDES", "Level", "levels", "main", "table"]

STRIDES = (8, 16, 32, 64, 128)  # of P3 to P7
DEPTH, HEADS = 4, 8


class Level(NamedTuple):
    """One level of a pyramid.

    Attributes:
        name: P3 to P7.
        size: ``(h, w)`` positions.
        tokens: of its decoder.
    """

    name: str
    size: tuple[int, int]
    tokens: int

    @property
    def attention(self) -> int:
        """Bytes of the attention matrices of one image in float32, one for each block and head."""
        return DEPTH * HEADS * self.tokens**2 * 4


def levels(height: int, width: int, sam: int | None) -> list[Level]:
    """Returns the levels of an image.

    Args:
        height: pixels.
        width: pixels.
        sam: pixels of a token; None makes a token of every position.

    Example:
        >>> [level.tokens for level in levels(512, 512, None)], {level.tokens for level in levels(512, 512, 32)}
        ([4096, 1024, 256, 64, 16], {256})
    """
    found = []
    for number, stride in enumerate(STRIDES, 3):
        size, token = (-(-height // stride), -(-width // stride)), sam or stride
        found.append(Level(f"P{number}", size, -(-height // token) * -(-width // token)))
    return found


def table(height: int = 800, width: int = 1344, batch: int = 2) -> str:
    """Returns the table as Markdown.

    Args:
        height: pixels of the padded batch.
        width: pixels.
        batch: images of one process.
    """
    rows = [
        "| level | positions | tokens without SAM | their attention | tokens with SAM | their attention |",
        "|---|---|---|---|---|---|",
    ]
    pairs = list(zip(levels(height, width, None), levels(height, width, 32), strict=True))
    for without, with_sam in pairs:
        size = f"{without.size[0]} x {without.size[1]}"
        rows.append(
            f"| {without.name} | {size} | {without.tokens:,} | {_binary(batch * without.attention)} | "
            f"{with_sam.tokens:,} | {_binary(batch * with_sam.attention)} |"
        )
    cells = []
    for side in zip(*pairs, strict=True):
        cells += [f"{sum(x.tokens for x in side):,}", _binary(batch * sum(x.attention for x in side))]
    rows.append(f"| all | | {' | '.join(cells)} |")
    return "\n".join(rows)


def _binary(count: float) -> str:
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024 or unit == "GiB":
            break
    return f"{count:.3g} {unit}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m fastmkd.bench.decoder_memory``.

    Args:
        argv: arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--height", type=int, default=800, help="pixels of the padded batch")
    parser.add_argument("--width", type=int, default=1344, help="pixels of the padded batch")
    parser.add_argument("--batch", type=int, default=2, help="images of one process")
    arguments = parser.parse_args(argv)
    sys.stdout.write(table(arguments.height, arguments.width, arguments.batch) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
