"""Writes what stands between the markers of ``docs/scaling.md``, and its figure, from committed counts.

``python -m fastmkd.bench.scaling`` prints, draws and rewrites; ``--count`` counts the networks' operations anew first,
into ``bench/results/scaling.json``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from .environment import REPOSITORY, results_folder
from .scaling import GPUS, H100, Cluster, Work, described, predict
from .scaling_simulation import simulate

__all__ = ["AGREEMENT", "load", "main", "render"]

COUNTS = results_folder() / "scaling.json"
PAGE = REPOSITORY / "docs" / "scaling.md"
FIGURE = "scaling.svg"
AGREEMENT = 0.05  # share within which formula and simulation of a step agree
SHOWN = (8, 64, 256, 1024)
_MARKED = re.compile(r"(<!-- begin: (?P<name>\w+) -->\n).*?(<!-- end: (?P=name) -->)", re.DOTALL)


def load(path: Path = COUNTS) -> list[Work]:
    """The committed counts.

    Args:
        path: the file.
    """
    return [Work(**work) for work in json.loads(path.read_text())]


def render(page: str, works: Sequence[Work], cluster: Cluster = H100) -> str:
    """Fills the page's markers ``inputs``, ``works`` and ``steps``.

    Args:
        page: its text.
        works: one for each method.
        cluster: what they run on.
    """
    parts = {"inputs": _inputs(cluster), "works": _works(works), "steps": _steps(works, cluster)}
    return _MARKED.sub(lambda m: f"{m[1]}\n{parts[m['name']]}\n\n{m[3]}", page)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _inputs(cluster: Cluster) -> str:
    values = described(cluster)
    meaning = re.findall(r"^        (\w+): (.+)$", Cluster.__doc__ or "", re.MULTILINE)
    rows = [[f"`{name}`", f"{values[name]:g}", text] for name, text in meaning if name != "name"]
    return f"{cluster.name}:\n\n" + "\n".join(
        ["| input | value | what it is |", "|---|---:|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    )


def _works(works: Sequence[Work]) -> str:
    header = ["method", "images a GPU", "student, G", "teacher, G", "gradients, MB", "teacher, MB", "else"]
    rows = []
    for w in works:
        extra = [f"{w.norms} norms over ranks"] * bool(w.norms)
        extra += [f"{w.gathered / 1e3:.0f} k numbers an image gathered"] * bool(w.gathered)
        extra += [f"{w.summed} small sums"] * bool(w.summed) + [f"teacher in {w.blocks} blocks"] * bool(w.blocks)
        numbers = (w.student / 1e9, w.teacher / 1e9, w.gradients / 1e6, w.teacher_weights / 1e6)
        rows.append([w.name, str(w.batch), *(f"{n:.1f}" for n in numbers), ", ".join(extra) or "-"])
    return _table(header, rows)


def _steps(works: Sequence[Work], cluster: Cluster) -> str:
    header = ["method", "GPUs", "step, ms", "simulated, ms", "compute", "waits", "images a second", "efficiency"]
    rows = []
    for work in works:
        for gpus in SHOWN:
            found, played = predict(work, gpus, cluster), simulate(work, gpus, cluster)
            cells = [f"{1e3 * found.step:.1f}", f"{1e3 * played:.1f}", f"{1e3 * found.compute:.1f}",
                     f"{1e3 * found.waits:.2f}", f"{work.batch * gpus / found.step:,.0f}",
                     f"{found.efficiency:.0%}"]  # fmt: skip
            if found.memory > cluster.memory / 2:
                cells[-1] += f" (CKA wants {found.memory / 1e9:,.0f} GB: does not fit)"
            rows.append([work.name if gpus == SHOWN[0] else "", f"{gpus:,}", *cells])
    return _table(header, rows)


def draw(works: Sequence[Work], path: Path, cluster: Cluster = H100) -> None:
    """Draws efficiency by number of GPUs, the formula as a line and the simulation as points.

    Args:
        works: one for each method.
        path: the SVG file.
        cluster: what they run on.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from .figures import _STYLE, COLOURS

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.0, 4.2), layout="constrained")
        axis = figure.subplots()
        for i, work in enumerate(works):
            colour, line = COLOURS[i % len(COLOURS)], "-" if i < len(COLOURS) else "--"
            predicted = [predict(work, gpus, cluster) for gpus in GPUS]
            axis.plot(GPUS, [p.efficiency for p in predicted], color=colour, linestyle=line, label=work.name)
            played = [p.compute / simulate(work, gpus, cluster) for p, gpus in zip(predicted, GPUS, strict=True)]
            axis.plot(GPUS, played, "o", color=colour, markersize=3.5)
        axis.set_xscale("log", base=2)
        axis.set_xticks(GPUS, [f"{gpus:,}" for gpus in GPUS])
        axis.set_ylim(0, 1.02)
        axis.set_xlabel("GPUs, the batch growing with them")
        axis.set_ylabel("share of the step that is compute")
        axis.set_title(f"Predicted, not measured: {cluster.name}", fontsize=9)
        axis.legend(frameon=False, fontsize=8, loc="lower left")
        figure.savefig(path, metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m fastmkd.bench.scaling``; returns 1 if formula and simulation differ too much."""
    parser = argparse.ArgumentParser(prog="python -m fastmkd.bench.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--count", action="store_true", help="count the networks' operations anew")
    arguments = parser.parse_args(argv)
    if arguments.count:
        from dataclasses import asdict

        from .scaling_works import count

        COUNTS.write_text(json.dumps([asdict(work) for work in count()], indent=1) + "\n")
    works = load()
    print(_steps(works, H100))
    farthest, where = max(
        (abs(simulate(work, gpus, H100) / predict(work, gpus).step - 1), f"{work.name} on {gpus} GPUs")
        for work in works
        for gpus in GPUS
    )
    print(f"\nFormula and simulation differ by at most {farthest:.1%} ({where}).")
    if PAGE.is_file():
        PAGE.write_text(render(PAGE.read_text(), works))
        draw(works, PAGE.parent / "figures" / FIGURE)
    return int(farthest > AGREEMENT)
