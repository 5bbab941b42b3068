"""``fastmkd check``: what it found is kept even if it is stopped, on disk and for `auto`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmkd.ops import OPS, cache, check, precision, verdicts
from fastmkd.ops.registry import Backend, Sample

DEVICE = torch.device("cpu")


@pytest.fixture
def some_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU goes for a GPU of this name, and its cache is empty."""
    monkeypatch.setenv("FASTMKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_known", {})
    monkeypatch.setattr(cache, "device_name", lambda device: "some-gpu")
    keep = verdicts.keep
    on_gpu = lambda op, backend, _, *found: keep(op, backend, torch.device("cuda"), *found)  # noqa: E731
    monkeypatch.setattr(verdicts, "keep", on_gpu)
    return "some-gpu"


def replace_backend(monkeypatch: pytest.MonkeyPatch, run: Any, tiles: Any = None) -> None:
    op = OPS["select_tokens"]
    backends = {"eager": op.backends["eager"], "cpp": Backend("cpp", run, "cpu", (torch.float32,), tiles=tiles)}
    tile_sample = lambda device, dtype: op.samples(device, dtype)[0]  # noqa: E731
    monkeypatch.setitem(
        OPS, "select_tokens", dataclasses.replace(op, backends=backends, tile_sample=tile_sample if tiles else None)
    )


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_is_on_disk_as_soon_as_it_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = OPS["select_tokens"].reference
    seen: list[None] = []

    def stopped(*args: Any) -> torch.Tensor:
        seen.append(None)
        if len(seen) == 6:  # each sample runs twice
            raise KeyboardInterrupt
        return reference(*args)

    replace_backend(monkeypatch, stopped)
    out = tmp_path / "check.jsonl"
    with pytest.raises(KeyboardInterrupt):
        check.main(["select_tokens", "--device", "cpu", "--json", str(out)])
    found = [row for row in rows(out) if row["backend"] == "cpp"]
    assert [row["outcome"] for row in found] == ["right", "right"]
    assert {row["of"] for row in found} == {13}, "two rows of 13 are those of a run that was stopped"
    assert {row["device"] for row in found} == {"cpu"}


def test_runs_side_by_side_share_a_file(tmp_path: Path) -> None:
    out = tmp_path / "check.jsonl"
    for op in ("select_tokens", "stitch_tokens"):
        assert check.main([op, "--device", "cpu", "--json", str(out)]) == 0
    found = rows(out)
    assert {row["op"] for row in found} == {"select_tokens", "stitch_tokens"}
    for row in found:
        pair = [other for other in found if (other["op"], other["backend"]) == (row["op"], row["backend"])]
        assert len(pair) == row["of"]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check.main(["select_tokens", "--device", "cpu", "--json", str(tmp_path / "none/check.jsonl")])
    assert "none/check.jsonl cannot be written: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize("right", [True, False])
def test_auto_knows_what_a_check_found(
    right: bool, some_gpu: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = OPS["select_tokens"].reference
    replace_backend(monkeypatch, reference if right else lambda *args: reference(*args).flip(1))
    assert check.main(["select_tokens", "--device", "cpu"]) == int(not right)
    assert f"select_tokens    cpp      {13 if right else 2} of 13 samples right" in capsys.readouterr().out
    cache._known.clear()
    assert cache.verdict(some_gpu, "select_tokens/cpp") is right
    assert cache.verdict(some_gpu, "select_tokens/eager") is None


@pytest.mark.parametrize("wrong", [None, "ieee", "tf32"])
def test_every_tile_is_checked_and_tf32_has_its_own_verdict(
    wrong: str | None, some_gpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = OPS["select_tokens"].reference
    ran: list[tuple[str, bool]] = []

    def tiles(kind: str) -> dict[str, Any]:
        def run(*args: Any) -> torch.Tensor:
            ran.append((kind, precision.tf32_is_on()))
            return reference(*args).flip(1) if kind == wrong else reference(*args)

        return {"large": run, "small": reference}

    replace_backend(monkeypatch, reference, tiles)
    out = tmp_path / "check.jsonl"
    assert check.main(["select_tokens", "--device", "cpu", "--json", str(out)]) == int(wrong is not None)
    assert set(ran) == {("ieee", False), ("tf32", True)}
    assert not precision.tf32_is_on()
    found = [row for row in rows(out) if row["backend"] == "cpp"]
    assert len(found) == 13 + 4 == found[0]["of"]
    name = OPS["select_tokens"].samples("cpu", torch.float32)[0].name
    tried = {(row["dtype"], row["sample"]) for row in found[13:]}
    assert tried == {(dtype, f"{name}-{tile}") for dtype in ("float32", "tf32") for tile in ("large", "small")}
    assert cache.verdict(some_gpu, "select_tokens/cpp") is (wrong != "ieee")
    assert cache.verdict(some_gpu, "select_tokens/cpp/tf32") is (wrong != "tf32")


def test_too_little_memory_sets_no_backend_aside(some_gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*args: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12 GiB")

    replace_backend(monkeypatch, out_of_memory)
    assert check.main(["select_tokens", "--device", "cpu"]) == 1
    assert cache.verdict(some_gpu, "select_tokens/cpp") is None


def test_nothing_is_remembered_of_a_check_that_was_stopped(some_gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    replace_backend(monkeypatch, stopped)
    with pytest.raises(KeyboardInterrupt):
        check.main(["select_tokens", "--device", "cpu"])
    assert cache.verdict(some_gpu, "select_tokens/cpp") is None


def test_a_sample_too_large_for_this_machine_sets_no_backend_aside(
    some_gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_backend(monkeypatch, OPS["select_tokens"].reference)
    op = OPS["select_tokens"]

    def too_large() -> Any:
        raise MemoryError

    def samples(device: str, dtype: torch.dtype) -> Any:
        return [dataclasses.replace(s, make=too_large) if s.huge else s for s in op.samples(device, dtype)]

    monkeypatch.setitem(OPS, "select_tokens", dataclasses.replace(op, samples=samples))
    assert check.main(["select_tokens", "--device", "cpu", "--huge"]) == 1
    assert cache.verdict(some_gpu, "select_tokens/cpp") is None


def summed(run: Any, fits: bool) -> check.Row:
    """Checks `run` as the sum of a huge sample whose reference is off by a thousandth in float32."""

    def reference(x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float64 and not fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 32 GiB")
        return x.sum(0) * (1 if x.dtype == torch.float64 else 1.001)

    op = dataclasses.replace(OPS["select_tokens"], name="summed", reference=reference)
    sample = Sample("huge", lambda: (torch.arange(1.0, 7).view(3, 2),), huge=True)
    return check.check_sample(op, Backend("triton", run, "cpu", (torch.float32,)), sample, torch.float32)


@pytest.mark.parametrize(
    ("factor", "fits", "outcome"),
    [
        (1.0, True, "right"),
        (1.01, True, "wrong"),
        (1.001, False, "right"),  # as PyTorch to the last bit
        (1.0, False, "error"),
    ],
)
def test_a_huge_sample_is_compared_with_float64_where_that_fits(factor: float, fits: bool, outcome: str) -> None:
    row = summed(lambda x: x.sum(0) * factor, fits)
    assert row.outcome == outcome
    assert row.lacked_memory is (outcome == "error")


def test_a_huge_sample_must_repeat_itself() -> None:
    runs: list[None] = []

    def restless(x: torch.Tensor) -> torch.Tensor:
        runs.append(None)
        return x.sum(0) * (1 + 1e-6 * len(runs))

    assert summed(restless, fits=True).detail == "two runs on the same inputs differ"


def test_nothing_is_remembered_of_a_cpu() -> None:
    before = cache.snapshot(DEVICE)["verdicts"].copy()
    verdicts.keep("select_tokens", "cpp", DEVICE, False)
    assert cache.snapshot(DEVICE)["verdicts"] == before
