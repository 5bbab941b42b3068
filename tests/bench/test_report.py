"""Records to tables, plots and the choice tables; and the committed page says what the committed records say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastmkd.bench import headlines, tables
from fastmkd.bench.environment import REPOSITORY
from fastmkd.bench.report import figure_name, latest, load, main, render
from fastmkd.bench.targets import TARGETS
from fastmkd.bench.targets.target import Measured, Target, inverse


def record(**changes: Any) -> dict[str, Any]:
    env = {
        "date": "2026-01-01T00:00:00+00:00",
        "commit": "abcdef0123456789",
        "dirty": False,
        "sources": "0123",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "cuda": "13.0",
        "driver": None,
        "threads": 2,
        "features": ["AVX512"],
        "device": "A Processor",
        "slug": "a-processor",
        **changes.pop("env", {}),
    }
    found = {
        "benchmark": "masked_teacher",
        "dtype": "fp32",
        "quick": False,
        "label": "50 % kept",
        "panel": "DeiT-S, batch 8",
        "baseline": "full model",
        "items": 8,
        "clock": "cpu",
        "params": {},
        "variants": [variant("full model", 0.4, 1.0), variant("fastmkd", 0.16, 2.5)],
        "env": env,
    }
    return {**found, **changes}


def variant(name: str, seconds: float, ratio: float | None) -> dict[str, Any]:
    def spread(x: float) -> dict[str, float]:
        return {"median": x, "low": 0.9 * x, "high": 1.1 * x}

    known: dict[str, Any] = {
        "name": name,
        "rounds": 9,
        "seconds": spread(seconds),
        "check": {"ok": ratio is not None, "detail": "bad"},
    }
    return {**known, "ratio": spread(ratio)} if ratio is not None else known


PAGE = """# Numbers
by hand
<!-- begin: targets -->
<!-- end: targets -->
<!-- begin: masked_teacher -->
old text
<!-- end: masked_teacher -->
end
"""


def test_page_is_filled_between_markers_and_stays_when_filled_again() -> None:
    page = render(PAGE, [record()])
    assert page.startswith("# Numbers\nby hand\n")
    assert page.endswith("<!-- end: masked_teacher -->\nend\n")
    assert "old text" not in page
    assert "| DeiT-S, batch 8, fp32, 50 % kept | full model (baseline) | 400.0 ms (360.0 to 440.0) |" in page
    assert "|  | fastmkd | 160.0 ms (144.0 to 176.0) | 2.50x (2.25 to 2.75) |" in page
    assert "`fastmkd bench masked_teacher --device cpu`: 2026-01-01, commit abcdef0123, torch 2.11.0, 2 threads" in page
    assert "| A Processor | 2.50x (2.25x to 2.75x) | 9 | reached, within the spread |" in page
    assert render(page, [record()]) == page


def test_a_target_that_was_missed_is_said_to_be_missed() -> None:
    slow = record(variants=[variant("full model", 0.4, 1.0), variant("fastmkd", 0.2, 2.0)])
    assert "| A Processor | 2.00x (1.80x to 2.20x) | 9 | **not reached** |" in render(PAGE, [slow])
    wrong = record(variants=[variant("full model", 0.4, 1.0), variant("fastmkd", 0.1, None)])
    page = render(PAGE, [wrong])
    assert "WRONG: bad" in page
    assert "reached" not in page


def test_a_target_is_reached_within_the_spread_where_the_lower_quartile_is_below_it() -> None:
    target = Target("", "", "", "", "", "fastmkd", 2.0)
    assert target.verdict(Measured(2.5, (2.0, 2.6), 9)) == "reached"
    assert target.verdict(Measured(2.5, (1.9, 2.6), 9)) == "reached, within the spread"
    assert target.verdict(Measured(1.5, (1.0, 1.9), 9)) == "**not reached**"
    assert target.verdict(Measured(1.5, (1.0, 2.0), 9)) == "**not reached**, within the spread"
    assert target.verdict(Measured(2.5, None, 9)) == "reached, spread not recorded"
    assert target.verdict(Measured(2.5, None, 0)) == "reached"  # memory
    assert target.words(Measured(2.5, None, 0)) == "2.50x"
    upside_down = Target("", "", "", "", "", "fastmkd", 0.5, inverse)
    assert upside_down.words(Measured(0.5, (0.4, 0.8), 9)) == "2.00x (1.25x to 2.50x)"


def test_a_ratio_to_another_variant_is_taken_inside_rounds_or_said_to_be_of_medians() -> None:
    target = Target("", "masked_teacher", "fp32", "DeiT-S", "50 % kept", "fastmkd", 2.0, against="public code")
    variants = [variant("full model", 0.4, 1.0), variant("public code", 0.3, 1.5), variant("fastmkd", 0.16, 2.4)]
    old = record(variants=variants)
    assert target.measured(old) == (pytest.approx(1.6), None, 9)  # 0.3 s / 0.16 s would be 1.875
    assert target.words(Measured(1.6, None, 9)) == "1.60x (of medians)"
    times = {"full model": [1.0] * 3, "public code": [2.0, 8.0, 3.0], "fastmkd": [1.0, 2.0, 3.0]}
    new = record(variants=[{**v, "times": times[v["name"]]} for v in variants])
    assert target.measured(new) == (2.0, (1.5, 3.0), 3)
    new["variants"][1].pop("ratio")  # wrong
    assert target.measured(new) is None


def test_a_headline_without_a_record_says_so() -> None:
    shown = headlines.table([record(panel="DeiT-B, batch 8")])
    assert "| 2 threads of A Processor | 2.50 (2.25 to 2.75) | 9 |" in shown
    assert shown.count("| - | no record yet | - |") == len(headlines.HEADLINES) - 1


def test_old_records_of_the_mkd_step_make_no_claim() -> None:
    """Their only other way was the dense twin, under the name that a baseline has."""
    variants = [variant("eager", 0.4, 1.0), variant("fastmkd", 0.1, 4.0)]
    place = {"benchmark": "mkd_step", "label": "30 % hidden", "baseline": "eager", "variants": variants}
    old = [record(panel=f"{kind}, RetinaNet", **place) for kind in ("masked backbone", "training step")]
    assert not [target for target in (*TARGETS, *headlines.HEADLINES) for known in old if target.ratio(known)]


def test_records_without_a_place_are_an_error() -> None:
    with pytest.raises(ValueError, match="'other' has records but no place"):
        render(PAGE, [record(benchmark="other")])


def test_gpu_caption_names_driver_and_clock() -> None:
    gpu = record(clock="device", env={"driver": "580.1", "commit": None, "dirty": None})
    assert "--device cuda`: 2026-01-01, sources 0123, torch 2.11.0, triton 3.6.0, CUDA 13.0, driver 580.1" in render(
        PAGE, [gpu]
    )


def test_latest_prefers_full_runs_and_leaves_out_broken_ones() -> None:
    old, new = record(), record(env={"date": "2026-02-01T00:00:00+00:00"})
    quick = record(quick=True, env={"date": "2026-03-01T00:00:00+00:00"})
    assert latest([new, old, quick]) == [new]
    assert latest([quick]) == [quick]
    assert latest([{**record(label="x"), "broken": "MemoryError"}]) == []


def test_load_passes_over_other_rows_and_names_a_bad_line(tmp_path: Path) -> None:
    folder = tmp_path / "gpu"
    folder.mkdir()
    (folder / "check.jsonl").write_text('{"op": "a"}\n')
    (folder / "records.jsonl").write_text(json.dumps(record()) + "\n")
    assert load(tmp_path) == [record()]
    (folder / "records.jsonl").write_text(json.dumps(record()) + "\n{half")
    with pytest.raises(ValueError, match=r"records.jsonl, line 2"):
        load(tmp_path)


def test_command_writes_page_and_plots_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    results, page = tmp_path / "results" / "a-processor", tmp_path / "docs" / "benchmarks.md"
    results.mkdir(parents=True)
    page.parent.mkdir()
    page.write_text(PAGE)
    known = [record(label=f"{percent} % kept") for percent in (75, 50, 25)]
    (results / "masked_teacher.jsonl").write_text("".join(json.dumps(r) + "\n" for r in known))
    arguments = ["--results", str(results.parent), "--page", str(page)]
    assert main([*arguments, "--check"]) == 1
    assert main(arguments) == 0
    assert main([*arguments, "--check"]) == 0
    figure = page.parent / "figures" / "masked_teacher-a-processor.svg"
    assert f"(figures/{figure.name})" in page.read_text()
    first = figure.read_bytes()
    assert b"25 % kept" in first
    assert main(arguments) == 0
    assert figure.read_bytes() == first
    assert "up to date" in capsys.readouterr().out


def test_committed_page_is_made_from_the_committed_records() -> None:
    page = (REPOSITORY / "docs" / "benchmarks.md").read_text()
    records = latest(load(REPOSITORY / "bench" / "results"))
    assert render(page, records) == page, "run python -m fastmkd.bench.report"
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for known in records:
        groups.setdefault((known["benchmark"], known["env"]["slug"]), []).append(known)
    for group in groups.values():
        name = figure_name(group)
        assert name is None or (REPOSITORY / "docs" / "figures" / name).is_file()


def test_the_readme_shows_numbers_of_the_records(capsys: pytest.CaptureFixture[str]) -> None:
    assert headlines.main(["--check"]) == 0, "run python -m fastmkd.bench.headlines"
    records = latest(load(REPOSITORY / "bench" / "results"))
    readme = (REPOSITORY / "README.md").read_text()
    for headline in headlines.HEADLINES:
        found = [record["env"]["slug"] for record in records if headline.ratio(record) is not None]
        assert found or f"| {headline.sentence} | - | no record yet | - |" in readme, headline.sentence
        assert len(set(found)) == len(found), headline.sentence


def test_no_two_rows_on_a_device_have_the_same_words() -> None:
    assert len({target.sentence for target in TARGETS}) == len(TARGETS)
    records = latest(load(REPOSITORY / "bench" / "results"))
    found = [
        (target.sentence, record["env"]["slug"])
        for target in TARGETS
        for record in records
        if target.ratio(record) is not None
    ]
    assert len(found) > 50
    assert [row for row in found if found.count(row) > 1] == []


def test_targets_name_variants_that_benchmarks_have() -> None:
    from fastmkd.bench.cases import import_time
    from fastmkd.bench.registry import benchmarks

    assert {t.benchmark for t in TARGETS} <= set(benchmarks())
    assert {t.variant for t in TARGETS if t.benchmark == "import_time"} <= set(import_time.PROGRAMS)


def test_choice_table_takes_the_fastest_right_default_backend(tmp_path: Path) -> None:
    about = {"op": "select_tokens", "op_dtype": "float32", "size_class": "4^7"}
    variants = [
        variant("eager", 3e-4, 1.0),
        variant("triton", 2e-4, 1.5),
        variant("cuda", 1e-4, 3.0),
        variant("auto", 1e-5, 30.0),
    ]
    rows = [record(params=about, clock="device", variants=variants, label=str(i)) for i in range(2)]
    assert tables.choices(rows) == {"select_tokens/float32/4^7": "triton"}  # cuda is no default yet, auto no backend
    variants[1] = variant("triton", 2e-4, None)
    assert tables.choices(rows) == {"select_tokens/float32/4^7": "eager"}

    results, out = tmp_path / "results", tmp_path / "tables"
    (results / "a-gpu").mkdir(parents=True)
    rows = [{**row, "env": {**row["env"], "slug": "a-gpu"}} for row in rows]
    (results / "a-gpu" / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    out.mkdir()
    (out / "a-gpu.json").write_text('{"verified": ["select_tokens/triton"]}')
    assert tables.main(["--results", str(results), "--out", str(out)]) == 0
    assert json.loads((out / "a-gpu.json").read_text()) == {
        "choices": {"select_tokens/float32/4^7": "eager"},
        "verified": ["select_tokens/triton"],
    }
