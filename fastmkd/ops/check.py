"""Every op, every backend, every sample against the reference on one device: ``fastmkd check``.

The result is a table for people and, with ``--json``, one record a line: what ``docs/gpu-status.md`` is made from. A
record is appended when its comparison is done: a run that is stopped leaves its part, and runs side by side share a
file. On a GPU the cache remembers what was found, and ``auto`` need not find it again.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cache, precision, verdicts
from .accuracy import judge, upcast
from .arguments import tensors
from .devices import check_device
from .registry import OPS, Backend, Op, Sample

__all__ = ["Case", "Row", "cases", "check_all", "check_sample", "main"]


@dataclass(frozen=True)
class Row:
    """One comparison: `outcome` is ``right``, ``wrong``, ``error`` or ``unavailable`` (then `detail` says why).

    `of` is how many comparisons its op and backend have in the run: fewer rows are those of a run that was stopped. The
    dtype is ``tf32`` for float32 whose products are TF32.
    """

    op: str
    backend: str
    dtype: str
    sample: str
    outcome: str
    error: float = 0.0
    allowed: float = 0.0
    detail: str = ""
    of: int = 1

    @property
    def lacked_memory(self) -> bool:
        """True when nothing is known but that there was not enough memory."""
        return self.outcome == "error" and self.detail.startswith("OutOfMemoryError")


class Case(NamedTuple):
    """A comparison to make: the arguments of `check_sample` after the op."""

    backend: Backend
    sample: Sample
    dtype: torch.dtype
    tf32: bool = False


def cases(op: Op, backend: Backend, device: str, huge: bool = False) -> list[Case]:
    """What proves a backend: every sample, then each of its tiles on the op's sample for tiles, those of TF32 last.

    Args:
        op: the op.
        backend: one of its backends.
        device: such as ``"cuda:0"``.
        huge: also the samples that need a GPU's memory.

    Example:
        >>> len(cases(OPS["select_tokens"], OPS["select_tokens"].backends["cpp"], "cpu"))
        13
    """
    found = [
        Case(backend, sample, dtype)
        for dtype in backend.dtypes
        for sample in op.samples(device, dtype)
        if huge or not sample.huge
    ]
    if backend.tiles is None or op.tile_sample is None:
        return found
    kinds = [(dtype, "ieee" if dtype == torch.float32 else "half") for dtype in backend.dtypes]
    kinds += [(dtype, "tf32") for dtype in backend.dtypes if dtype == torch.float32]
    for dtype, kind in kinds:
        sample = op.tile_sample(device, dtype)
        for label, run in backend.tiles(kind).items():
            named = replace(sample, name=f"{sample.name}-{label}")
            found.append(Case(replace(backend, run=run), named, dtype, kind == "tf32"))
    return found


def check_sample(op: Op, backend: Backend, sample: Sample, dtype: torch.dtype, tf32: bool = False) -> Row:
    """Runs `sample` on `backend`, twice, against the reference: right means accurate and the same both times.

    Args:
        op: the op.
        backend: one of its backends, usable here.
        sample: one of its samples.
        dtype: dtype of the sample, for the row.
        tf32: whether products of float32 are TF32, else they are float32 in full; whatever the user has chosen.

    Returns:
        The row.
    """
    label = (op.name, backend.name, precision.dtype_name(dtype, tf32), sample.name)
    with precision.products(tf32):
        return _compare(op, backend, sample, label, tf32)


def _compare(op: Op, backend: Backend, sample: Sample, label: tuple[str, str, str, str], tf32: bool) -> Row:
    try:
        args = sample.args
        out = tensors((backend.run(*args),))
        differ = not all(map(torch.equal, out, tensors((backend.run(*args),))))
        plain = tensors((op.reference(*args),))
        exact = _exact(op, args, sample.huge)
        verdicts = [judge(*parts, tf32) for parts in zip(out, exact or plain, plain, strict=True)]
        found = next((v for v in verdicts if not v.ok), verdicts[0])
        if exact is None and not found.ok:  # the reference's own error is not known, and may be the larger one
            raise torch.OutOfMemoryError("the reference in float64 does not fit, by which a difference is judged")
        if found.ok and differ:
            return Row(*label, "wrong", found.error, found.allowed, "two runs on the same inputs differ")
    except Exception as error:
        return Row(*label, "error", detail=f"{type(error).__name__}: {error}")
    return Row(*label, "right" if found.ok else "wrong", found.error, found.allowed, found.detail)


def _exact(op: Op, args: tuple[Any, ...], huge: bool) -> list[Tensor] | None:
    """The reference in float64; None where that does not fit, of a huge sample."""
    try:
        return tensors((op.reference(*upcast(args)),))
    except torch.OutOfMemoryError:
        if not huge:
            raise
    if args and tensors(args)[0].is_cuda:
        torch.cuda.empty_cache()
    return None


def check_all(device: str, names: Sequence[str] = (), huge: bool = False) -> Iterator[Row]:
    """Yields a row for every op, backend, dtype and sample on `device`, and for every tile of a backend.

    Args:
        device: such as ``"cpu"`` or ``"cuda:0"``.
        names: ops to check; all when empty.
        huge: also the samples that need a GPU's memory.

    Yields:
        Rows, in the order of the registry.
    """
    kind = torch.device(device).type
    for op in OPS.values():
        if names and op.name not in names:
            continue
        for backend in op.backends.values():
            if backend.device not in ("any", kind):
                continue
            reason = backend.reason()
            if reason is not None:
                yield Row(op.name, backend.name, "", "", "unavailable", detail=reason)
                continue
            found = cases(op, backend, device, huge)
            for case in found:
                yield replace(check_sample(op, *case), of=len(found))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``fastmkd check``; returns 1 when something is wrong, else 0."""
    parser = argparse.ArgumentParser(prog="fastmkd check", description="Compares every op with its reference.")
    parser.add_argument("op", nargs="*", help=f"ops to check (default: all of {', '.join(OPS)})")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--huge", action="store_true", help="also inputs whose offsets need 64 bits (tens of GB)")
    parser.add_argument("--json", metavar="FILE", help="append one record a line, each when it is found")
    args = parser.parse_args(argv)
    unknown = [name for name in args.op if name not in OPS]
    if unknown:
        parser.error(f"there is no op {unknown[0]!r}; the ops are {', '.join(OPS)}")
    try:
        check_device("--device", args.device)
    except ValueError as error:
        parser.error(str(error))

    device = torch.device(args.device)
    about = {
        "device": cache.device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    file, failed = None, False
    with ExitStack() as stack:
        if args.json:
            try:
                file = stack.enter_context(open(args.json, "a", encoding="utf-8"))
            except OSError as error:
                parser.error(
                    f"--json {args.json} cannot be written: {error.strerror}; name a file in a folder of yours"
                )
        rows = check_all(args.device, args.op, args.huge)
        for (op, backend), group in groupby(rows, attrgetter("op", "backend")):
            mine = []
            for row in group:
                mine.append(row)
                if file is not None:
                    file.write(json.dumps({**about, **asdict(row)}) + "\n")
                    file.flush()
                if row.outcome in ("wrong", "error"):
                    failed = True
                    print(f"{row.op} {row.backend} {row.dtype} {row.sample}: {row.outcome}, error {row.error:.3g}, "
                          f"allowed {row.allowed:.3g} {row.detail}")  # fmt: skip
            if mine[0].outcome == "unavailable":
                print(f"{op:<16} {backend:<8} not here: {mine[0].detail}")
                continue
            right = sum(r.outcome == "right" for r in mine)
            print(f"{op:<16} {backend:<8} {right} of {len(mine)} samples right")
            for tf32 in sorted({row.dtype == "tf32" for row in mine}):
                part = [row for row in mine if (row.dtype == "tf32") == tf32]
                # One that only lacked memory is not wrong.
                if not args.huge and not any(row.lacked_memory for row in part):
                    verdicts.keep(op, backend, device, all(row.outcome == "right" for row in part), tf32)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
