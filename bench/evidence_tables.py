"""The tables of ``docs/evidence.md``: what a study asked, what was measured, and where the numbers come from."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from fastmkd.train.evaluate import PERCENT

from .study import Record, Study

__all__ = ["spread", "tables"]

Scores = dict[str, dict[int, float]]  # in percent, by setting and seed
METRICS = ("top1", "map", "miou")  # what a run is judged by, a classifier's, a detector's or a segmenter's


def tables(study: Study, records: Sequence[Record]) -> str:
    """What was asked and what was measured, then all settings, a table for each second half.

    Means over the seeds, with sample deviations.

    Args:
        study: what was to be trained.
        records: of what has been.
    """
    metric = next((name for name in METRICS for record in records if name in record), METRICS[0])
    scores: dict[str | None, Scores] = {}  # by second half; a pre-training itself is not judged
    for record in records:
        if metric in record:
            of_half = scores.setdefault(record.get("then"), {})
            of_half.setdefault(record["setting"], {})[record["seed"]] = record[metric]
    parts = [caption(study, records), asked(study, scores)]
    parts += [
        table(study, then, scores[then], records, PERCENT[metric]) for then in (None, *study.then) if then in scores
    ]
    return "\n\n".join(parts)


def asked(study: Study, scores: dict[str | None, Scores]) -> str:
    """What the study should show, and whether it does."""
    lines = ["| asked, in points | measured, ± standard error | |", "| --- | --- | --- |"]
    for ask in study.asked:
        gaps = paired(scores.get(ask.then, {}), ask.setting, ask.over)
        if gaps:
            margin = statistics.mean(gaps) - ask.least
            shown = "shown" if margin >= 0 else "**not shown**"
            if len(gaps) < 2 or abs(margin) < statistics.stdev(gaps) / len(gaps) ** 0.5:
                shown += ", within the error"
            measured = spread(gaps, signed=True, error=True)
            sentence = f"{ask.setting} over {ask.over}: at least {ask.least:+.1f}"
            lines.append(line([f"{ask.then}: {sentence}" if ask.then else sentence, measured, shown]))
    return "\n".join(lines)


def table(study: Study, then: str | None, found: Scores, records: Sequence[Record], metric: str) -> str:
    """All settings after one second half."""
    teacher: dict[str, list[float]] = {}
    for record in records:
        if record.get("then") == then and record["teacher_top1"] is not None:
            teacher.setdefault(record["setting"], []).append(record["teacher_top1"])
    head = [then or "setting", f"test {metric}", *(f"seed {seed}" for seed in study.seeds), f"against {study.against}"]
    head += ["teacher on what it is shown"] * bool(teacher)
    lines = [line(head), line(["---"] * len(head))]
    for setting in (*study.teachers, *study.settings):
        scores = found.get(setting)
        if scores is None:
            continue
        cells = [setting, spread(list(scores.values())), *[""] * (len(head) - 2)]
        if setting in study.settings:
            cells[2 : 2 + len(study.seeds)] = [f"{scores[s]:.2f}" if s in scores else "" for s in study.seeds]
            gaps = [] if setting == study.against else paired(found, setting, study.against)
            cells[2 + len(study.seeds)] = spread(gaps, signed=True) if gaps else ""
            if setting in teacher:
                cells[-1] = spread(teacher[setting])
        lines.append(line(cells))
    return "\n".join(lines)


def caption(study: Study, records: Sequence[Record]) -> str:
    """Where the numbers come from."""
    made = {
        f"{env['date'][:10]}, commit {(env['commit'] or 'unknown')[:10]}{' with changes' * bool(env['dirty'])}, "
        f"torch {env['torch']}, {env['device']}"
        for env in (record["env"] for record in records)
    }
    wanted = sum(map(study.count, study.teachers)) + len(study.seeds) * sum(map(study.count, study.settings))
    count = f"{len(records)} runs" if len(records) == wanted else f"{len(records)} of {wanted} runs, **not finished**"
    command = f"`python -m fastmkd.bench.evidence recipes/evidence/{study.folder.name}`"
    return f"{command}: {count}; {'; '.join(sorted(made))}."


def paired(found: Scores, setting: str, over: str) -> list[float]:
    """Differences of two settings, seed by seed."""
    first, second = found.get(setting, {}), found.get(over, {})
    return [first[seed] - second[seed] for seed in first if seed in second]


def spread(values: Sequence[float], signed: bool = False, error: bool = False) -> str:
    """Mean ± sample deviation, or ± the standard error of the mean; a single value stands alone.

    Example:
        >>> spread([1.0, 2.0, 3.0]), spread([1.0, 2.0, 3.0], signed=True, error=True), spread([4.0])
        ('2.00 ± 1.00', '+2.00 ± 0.58', '4.00')
    """
    mean = f"{statistics.mean(values):{'+' if signed else ''}.2f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / (len(values) ** 0.5 if error else 1):.2f}"


def line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"
