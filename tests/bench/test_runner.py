"""``fastmkd bench`` on a tiny entry: what is recorded, what is refused."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmkd.bench import registry, roofline
from fastmkd.bench.profile_one import main as profile_main
from fastmkd.bench.registry import Answer, Case, Setting, Variant
from fastmkd.bench.runner import main


def broken() -> None:
    raise RuntimeError("the kernel did not compile")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark of four variants, one of them wrong, one broken, one not here; and rates that need no measurement."""

    def build(setting: Setting, size: int, hurt: bool) -> Case:
        x = torch.linspace(0, 1, size)
        answer = Answer(lambda: x.double().exp(), bytes=8.0 * size)
        variants = [Variant("torch", x.exp, answer, plain=True), Variant("same", lambda: torch.exp(x), answer)]
        if hurt:
            variants.append(Variant("wrong", lambda: x + 1, answer))
            variants.append(Variant("broken", broken, answer))
            variants.append(Variant("absent", broken, answer, unavailable="no such device"))
        return Case(f"{size}", "exp", variants, "torch", items=size)

    monkeypatch.setattr(registry, "_REGISTERED", {})
    for name, hurt in (("tiny", False), ("tiny_hurt", True)):
        grid = [{"size": 64, "hurt": hurt}]
        registry.benchmark(name, summary="exp", grid=lambda s, g=grid: g, dtypes=("fp32",))(build)

    def unbuildable(setting: Setting, size: int) -> Case:
        raise MemoryError("too large")

    registry.benchmark("tiny_broken", summary="", grid=lambda s: [{"size": 1}])(unbuildable)
    monkeypatch.setattr(roofline, "copy_rate", lambda device: 1e9)


def run(*arguments: str, out: Path) -> tuple[int, list[dict[str, Any]]]:
    status = main([*arguments, "--device", "cpu", "--quick", "--seconds", "0", "--out", str(out)])
    files = [out] if out.is_file() else sorted(out.glob("*.jsonl"))
    return status, [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_record_holds_all_numbers_and_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, (record,) = run("tiny", out=tmp_path)
    assert status == 0
    assert (tmp_path / "tiny.jsonl").is_file()
    assert (record["benchmark"], record["dtype"], record["baseline"], record["clock"]) == (
        "tiny",
        "fp32",
        "torch",
        "cpu",
    )
    env = record["env"]
    for key in ("date", "sources", "torch", "device", "slug", "cpu", "threads", "features"):
        assert env[key], key
    assert {"commit", "dirty", "triton", "cuda", "driver", "timm", "python"} <= env.keys()
    base, same = record["variants"]
    assert base["ratio"]["median"] == 1.0
    assert same["ratio"]["low"] <= same["ratio"]["median"] <= same["ratio"]["high"]
    assert same["check"]["ok"]
    assert same["rounds"] == len(same["times"]) == len(base["times"]) >= 5
    inside = [theirs / own for theirs, own in zip(base["times"], same["times"], strict=True)]
    assert same["ratio"]["median"] == pytest.approx(statistics.median(inside), rel=1e-3)
    assert same["items_per_second"] == pytest.approx(64 / same["seconds"]["median"], rel=1e-3)
    assert same["bound"]["share"] == pytest.approx(8 * 64 / 1e9 / same["seconds"]["median"], rel=1e-3)
    assert "against the baseline" in capsys.readouterr().out


def test_wrong_and_broken_variants_get_no_speed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, (record,) = run("tiny_hurt", out=tmp_path)
    assert status == 1
    by_name = {v["name"]: v for v in record["variants"]}
    assert "ratio" in by_name["same"]
    assert "ratio" not in by_name["wrong"]
    assert by_name["wrong"]["check"]["error"] > by_name["wrong"]["check"]["allowed"]
    assert "seconds" not in by_name["broken"]
    assert by_name["broken"]["check"]["detail"] == "RuntimeError: the kernel did not compile"
    assert by_name["absent"] == {"name": "absent", "unavailable": "no such device"}
    shown = capsys.readouterr().out
    assert "WRONG" in shown
    assert "no such device" in shown


def test_a_case_that_cannot_be_built_costs_only_itself(tmp_path: Path) -> None:
    status, records = run("tiny_broken", "tiny", out=tmp_path)
    assert status == 1
    assert [("broken" in r, r["benchmark"]) for r in records] == [
        (False, "tiny"),
        (True, "tiny_broken"),
        (True, "tiny_broken"),
    ]


def test_one_file_takes_all_records_and_runs_append(tmp_path: Path) -> None:
    out = tmp_path / "deeper" / "records.jsonl"
    run("tiny", out=out)
    _, records = run("tiny", out=out)
    assert len(records) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "no benchmark is called 'nonsense'"),
        (["tiny", "--device", "cpu", "--dtype", "fp16"], "none of the benchmarks asked for runs on cpu"),
    ],
)
def test_arguments_that_make_no_sense(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny", "--device", "cuda"]) == 2
    said = "fastmkd bench: --device is cuda, but torch.cuda.is_available() is False here; use --device=cpu.\n"
    assert capsys.readouterr().err == said


def test_list_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert "tiny_hurt" in shown
    assert "op.cls_saliency" in shown


def test_profile_one_runs_a_variant(capsys: pytest.CaptureFixture[str]) -> None:
    assert profile_main(["tiny", "--variant", "same", "--device", "cpu", "--calls", "2"]) == 0
    assert "exp, 64, same: 2 calls" in capsys.readouterr().out
    assert profile_main(["tiny_hurt", "--variant", "absent", "--device", "cpu"]) == 2
    assert "absent (no such device)" in capsys.readouterr().err
    assert profile_main(["tiny", "--variant", "same", "--case", "65", "--device", "cpu"]) == 2
    assert "its cases are exp, 64" in capsys.readouterr().err
