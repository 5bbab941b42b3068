"""Runs one variant of one benchmark a few times under an NVTX range, for a profiler (see ``bench/profile.sh``).

Set-up, warm-up and compilation happen before ``cudaProfilerStart``; a profiler told to wait for it sees the calls only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from fastmkd.ops.ranges import annotate

from .registry import DTYPES, Case, Setting, Variant, find

__all__ = ["main", "pick"]


def pick(setting: Setting, name: str, case: str, variant: str) -> tuple[Case, Variant]:
    """Builds the first case whose panel and label hold the text `case`, and finds the variant in it.

    Args:
        setting: device and dtype.
        name: of a benchmark.
        case: text in ``"<panel>, <label>"``; empty for the first case.
        variant: exact name.

    Raises:
        ValueError: there is no such benchmark, case or variant; the message lists those that exist.
    """
    (entry,) = find([name])
    if not entry.runs_on(setting.device.type, setting.dtype):
        raise ValueError(f"{name} does not run on {setting.device.type} in {setting.dtype}; see fastmkd bench --list.")
    seen = []
    for parameters in entry.grid(setting):
        built = entry.build(setting, **parameters)
        title = f"{built.panel}, {built.label}"
        seen.append(title)
        if case in title:
            for candidate in built.variants:
                if candidate.name == variant and candidate.unavailable is None:
                    return built, candidate
            known = ", ".join(
                v.name if v.unavailable is None else f"{v.name} ({v.unavailable})" for v in built.variants
            )
            raise ValueError(f"{title} has no usable variant {variant!r}; its variants are {known}.")
    raise ValueError(f"{name} has no case with {case!r} in its title; its cases are {'; '.join(seen)}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 0, or 2 when there is nothing of that name."""
    parser = argparse.ArgumentParser(prog="python -m fastmkd.bench.profile_one", description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--variant", required=True)
    parser.add_argument("--case", default="", help="text in the case's title, such as '50 %%'")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--calls", type=int, default=20)
    arguments = parser.parse_args(argv)
    setting = Setting(torch.device(arguments.device), arguments.dtype)
    try:
        case, variant = pick(setting, arguments.name, arguments.case, arguments.variant)
    except ValueError as error:
        print(f"profile_one: {error}", file=sys.stderr)
        return 2
    for _ in range(3):
        variant.run()
    if setting.on_gpu:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    with annotate(f"{arguments.name}/{variant.name}"):
        for _ in range(arguments.calls):
            variant.run()
        if setting.on_gpu:
            torch.cuda.synchronize()
    if setting.on_gpu:
        torch.cuda.profiler.stop()
    print(f"{case.panel}, {case.label}, {variant.name}: {arguments.calls} calls")
    return 0


if __name__ == "__main__":
    sys.exit(main())
