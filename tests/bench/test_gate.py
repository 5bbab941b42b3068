"""The gate itself: no headline ratio has fallen; and a gate that a fallen ratio would not close is no gate."""

from __future__ import annotations

import json
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import fastmkd
from fastmkd.bench import gate, instructions
from fastmkd.bench.counted import operations
from fastmkd.bench.gate import check, held_by, load, machine, main
from fastmkd.bench.gate_headlines import HEADLINES, Headline
from fastmkd.bench.headlines import HEADLINES as SHOWN
from fastmkd.ops import OPS

NAMES = [headline.name for headline in HEADLINES]


def doubled(name: str = "double") -> Headline:
    """A way that takes half of the other's work and well under its time."""
    x = torch.randn(192, 192)
    return Headline(name, lambda: {"plain": lambda: x @ x @ x @ x @ x, "fastmkd": lambda: x @ x @ x})


def found_of(*arguments: Any, **options: Any) -> dict[str, gate.Ratio]:
    return {ratio.kind: ratio for ratio in check(*arguments, **options)}


@pytest.mark.parametrize("headline", HEADLINES, ids=NAMES)
def test_no_headline_has_fallen(headline: Headline) -> None:
    found = check(headline, load())
    for ratio in found:
        if ratio.committed is None:
            warnings.warn(str(ratio), stacklevel=1)
    assert not [str(ratio) for ratio in found if ratio.fallen]


def test_every_headline_has_committed_values() -> None:
    values = load()
    assert list(values) == NAMES
    for value in values.values():
        assert value["work"] > 1
        assert value["time"]


def test_every_headline_of_the_readme_is_held() -> None:
    """By its network or method: sizes are smaller here."""
    for word in ("teacher", "MaskedKD step", "DMAE step", "MKD step", "DPK step", "ResNet"):
        assert sum(word in target.sentence for target in SHOWN) >= 1, word
        assert any(word in name for name in NAMES), word
    assert len(SHOWN) == 6


@pytest.mark.parametrize("name", ["MaskedKD step, half of the patches", "3x3 convolution, three quarters hidden"])
def test_the_plain_way_calls_nothing_of_fastmkd(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A baseline of fastmkd's own code could become slower and raise the ratio."""
    ways = next(headline for headline in HEADLINES if headline.name == name).build()

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("the baseline calls fastmkd")

    monkeypatch.setattr(fastmkd.MaskedKD, "forward", forbidden)
    monkeypatch.setattr(fastmkd.MaskedViT, "forward", forbidden)
    monkeypatch.setattr("fastmkd.nn.dense_way.dense_convolve", forbidden)
    monkeypatch.setattr("fastmkd.bench.crossings.dense_convolve", forbidden)
    ways["plain"]()


def test_a_fallen_ratio_is_seen_and_named() -> None:
    found = found_of(doubled(), {"double": {"work": 2.0, "time": {machine(): 1.2}}}, rounds=3)
    assert found["work"].found == 2
    assert not any(ratio.fallen for ratio in found.values())
    found = found_of(doubled(), {"double": {"work": 2.1, "time": {machine(): 50.0}}}, rounds=1)
    assert found["work"].fallen
    assert found["time"].fallen
    assert "double, work: 2.00x (committed 2.10x, FALLEN by more than 1%)" in str(found["work"])


def test_a_slow_kernel_is_seen_by_time_and_not_by_work(monkeypatch: pytest.MonkeyPatch) -> None:
    headline = next(headline for headline in HEADLINES if headline.name.startswith("3x3"))
    known = load()
    assert headline.name in known
    for name in ("masked_conv2d", "masked_conv2d_weight"):
        for backend in OPS[name].backends.values():

            def slow(*args: Any, run: Any = backend.run) -> Any:
                time.sleep(0.03)
                return run(*args)

            monkeypatch.setitem(backend.__dict__, "run", slow)
    other = {headline.name: {**known[headline.name], "time": {f"another, {machine().partition(', ')[2]}": 3.0}}}
    found = found_of(headline, other, rounds=1)
    assert not found["work"].fallen  # the declared cost of an op is no kernel's work
    assert found["time"].elsewhere
    assert found["time"].fallen


def test_a_ratio_that_falls_once_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = []

    def measured(headline: Headline, count: int) -> float:
        rounds.append(count)
        return (1.0, 1.9)[len(rounds) - 1]

    monkeypatch.setattr(gate, "measure_time", measured)
    time = found_of(doubled(), {"double": {"time": {machine(): 2.0}}}, rounds=4)["time"]
    assert rounds == [4, 8]
    assert time.found == 1.9
    assert not time.fallen


def test_values_of_the_same_processor_come_first_and_of_another_instruction_set_never() -> None:
    values = {"a, AVX512, fastmkd avx512": 3.0, "b, AVX512, fastmkd avx512": 2.0, "c, AVX2, fastmkd avx2": 1.0}
    assert held_by(values, "a, AVX512, fastmkd avx512") == (3.0, False)
    assert held_by(values, "d, AVX512, fastmkd avx512") == (2.0, True)
    assert held_by(values, "d, AVX512, fastmkd none") == (None, False)


def test_both_avx512_kernels_of_float32_have_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    native = pytest.importorskip("fastmkd._native")
    names = []
    for isa in ("avx512", "avx512_bf16", "avx2"):
        monkeypatch.setattr(native, "active_isa", lambda isa=isa: isa)
        names.append(machine())
    assert names[0] == names[1]
    assert names[0].endswith("fastmkd avx512")
    assert names[2].endswith("fastmkd avx2")


def test_another_processor_may_fall_by_half_and_another_instruction_set_is_said_not_to_be_held() -> None:
    near, far = f"another, {machine().partition(', ')[2]}", "another, VSX, fastmkd generic"
    time = found_of(doubled(), {"double": {"time": {near: 2.0, far: 50.0}}}, rounds=1)["time"]
    assert (time.committed, time.share, time.elsewhere) == (2.0, gate.FAR_SHARE, True)
    assert "on another processor, may fall by 50%" in str(time)
    time = found_of(doubled(), {"double": {"work": 2.0, "time": {far: 50.0}}}, rounds=1)["time"]
    assert time.committed is None
    assert not time.fallen
    assert f"NOT HELD: no committed value for {machine()}" in str(time)


def test_instructions_are_held_where_they_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [1, *[90, 80, 100], *[20, 21, 20]]
    monkeypatch.setattr(instructions, "count", lambda run: calls.pop(0))
    assert gate.measure_instructions(doubled()) == 4.0
    monkeypatch.setattr(instructions, "count", lambda run: "no counter.")
    assert gate.measure_instructions(doubled()) == "no counter."
    monkeypatch.setattr(gate, "measure_instructions", lambda headline: 4.0)
    ratio = found_of(doubled(), {"double": {"instructions": {machine(): 4.3}}}, rounds=1)["instructions"]
    assert ratio.fallen
    assert ratio.share == gate.INSTRUCTION_SHARE


def test_a_counter_of_the_system_counts_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def spin() -> None:
        end = time.thread_time() + 0.02
        while time.thread_time() < end:
            pass

    found = instructions.count(spin, instructions.TASK_CLOCK)
    assert isinstance(found, str) or 0.019e9 < found < 0.1e9
    for event in (instructions.INSTRUCTIONS, instructions.TASK_CLOCK):
        found = instructions.count(spin, event)
        assert found > 1e6 if isinstance(found, int) else "perf_event_open" in found
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert instructions.count(spin) == "instructions can be counted on Linux on x86_64 and aarch64, not on riscv64."


def test_operations_without_gradients_are_all_counted() -> None:
    """A frozen teacher runs on fused products and on the compiled attention itself."""
    torch.manual_seed(0)
    vit = fastmkd.MaskedViT(timm.create_model("deit_tiny_patch16_224", depth=2).eval())
    images, keep = torch.randn(1, 3, 224, 224), torch.arange(98)[None]

    def frozen() -> None:
        with torch.no_grad():
            vit(images, keep=keep)

    assert operations(frozen) == operations(lambda: vit(images, keep=keep)) > 0


def test_the_command_renews_and_then_agrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gate.json"
    path.write_text(json.dumps({"double": {"work": 9.0, "time": {"VSX": 3.0}}, "gone": {"work": 1.0}}))
    monkeypatch.setattr(gate, "HEADLINES", (doubled(),))
    monkeypatch.setattr(gate, "measure_instructions", lambda headline: "none here")
    assert main(["--values", str(path)]) == 1
    shown = capsys.readouterr().out
    assert "FALLEN by more than 1%" in shown
    assert f"NOT HELD: 1 of 2 ratios were compared with nothing, since no value is committed for {machine()}" in shown
    assert main(["--values", str(path), "--renew"]) == 0
    (renewed,) = load(path).values()
    assert renewed["work"] == 2.0
    assert renewed["time"].keys() == {"VSX", machine()}
    capsys.readouterr()
    assert main(["--values", str(path)]) == 0
    assert "NOT HELD" not in capsys.readouterr().out
