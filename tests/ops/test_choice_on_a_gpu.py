"""How `auto` chooses on a GPU: what it tries, times and keeps. The CPU goes for the GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastmkd.ops import OPS, cache, choice, precision, verdicts
from fastmkd.ops.registry import Backend, Op

GPU = torch.device("cuda:1")
ARGS = (torch.rand(2, 12), 3, 1, 12, 1, 12)
KEY = "select_tokens/float32/4^2"


@pytest.fixture(autouse=True)
def some_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Calls seem to come from a GPU of an unknown model; holds the dtype that they seem to have."""
    monkeypatch.setenv("FASTMKD_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "_known", {})
    monkeypatch.setattr(choice, "_chosen", {})
    monkeypatch.setattr(cache, "device_name", lambda device: "some-gpu" if device.type == "cuda" else device.type)
    lead = SimpleNamespace(device=GPU, dtype=torch.float32)
    monkeypatch.setattr(choice, "lead", lambda args: lead)
    monkeypatch.setattr(verdicts, "lead", lambda args: lead)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    return lead


@pytest.fixture
def tf32() -> Iterator[Callable[[bool], None]]:
    """Switches TF32 as a user does."""
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision(), matmul.fp32_precision
    yield lambda on: torch.set_float32_matmul_precision("high" if on else "highest")
    torch.set_float32_matmul_precision(before[0])
    matmul.fp32_precision = before[1]


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What a measurement finds by backend; one that is not in it must not be measured."""
    found: dict[str, float] = {}
    monkeypatch.setattr(choice, "_seconds", lambda candidate, args: found[candidate.name])
    return found


def with_triton(run: Any = None, dtypes: tuple[torch.dtype, ...] = (torch.float32,), **more: Any) -> Op:
    """An op with a GPU backend that is its reference, or `run`; its samples are drawn on the CPU."""
    op = OPS["select_tokens"]
    backend = Backend("triton", run or op.reference, "cuda", dtypes, **more)
    samples = lambda device, dtype: op.samples("cpu", dtype)  # noqa: E731
    return dataclasses.replace(op, samples=samples, backends={"eager": op.backends["eager"], "triton": backend})


def capture(monkeypatch: pytest.MonkeyPatch, on: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: on)


@pytest.mark.parametrize(("known", "expected"), [(True, "triton"), (False, "eager"), (None, "eager")])
def test_a_capture_runs_only_what_is_known_to_be_right(
    known: bool | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_run(*args: Any) -> Any:
        raise AssertionError("a backend was tried while a graph is captured")

    if known is not None:
        cache.remember("some-gpu", "select_tokens/triton", known)
    capture(monkeypatch, True)
    assert choice.choose(with_triton(must_not_run), ARGS).name == expected
    assert cache.verdict("some-gpu", "select_tokens/triton") is known


def test_a_capture_follows_what_was_measured_and_settles_nothing(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]
) -> None:
    cache.remember("some-gpu", "select_tokens/triton", True)
    cache.remember("some-gpu", KEY, "eager")
    capture(monkeypatch, True)
    assert choice.choose(with_triton(), ARGS).name == "eager"
    cache._known["some-gpu"]["choices"].clear()
    assert choice.choose(with_triton(), ARGS).name == "triton"
    capture(monkeypatch, False)
    seconds |= {"triton": 2.0, "eager": 1.0}
    assert choice.choose(with_triton(), ARGS).name == "eager", "what the capture took was kept"


def test_autotune_off_leaves_only_the_shipped_table(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> None:
    cache.remember("some-gpu", KEY, "eager")
    monkeypatch.setenv("FASTMKD_AUTOTUNE", "0")
    assert choice.choose(with_triton(), ARGS).name == "triton"
    monkeypatch.setattr(choice, "_chosen", {})
    monkeypatch.setattr(cache, "table", lambda device: {KEY: "eager"})
    assert choice.choose(with_triton(), ARGS).name == "eager"


def test_the_fastest_is_chosen_and_kept(seconds: dict[str, float]) -> None:
    seconds |= {"triton": 2.0, "eager": 1.0}
    assert choice.choose(with_triton(), ARGS).name == "eager"
    assert cache._read("some-gpu") == {"choices": {KEY: "eager"}, "verdicts": {"select_tokens/triton": True}}


@pytest.mark.parametrize("large", [("eager",), ("triton",), ("eager", "triton")])
def test_a_candidate_that_runs_out_of_memory_is_not_chosen(
    large: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    emptied: list[None] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(None))

    def out_of_memory(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12 GiB")

    cache.remember("some-gpu", "select_tokens/triton", True)
    op = with_triton()
    backends = {
        b.name: dataclasses.replace(b, run=out_of_memory if b.name in large else b.run) for b in op.backends.values()
    }
    chosen = choice.choose(dataclasses.replace(op, backends=backends), ARGS).name
    assert chosen == ("eager" if large == ("triton",) else "triton")
    assert len(emptied) == len(large)
    assert cache.choices("some-gpu") == {}, "another run may have more memory"


def test_another_error_of_a_candidate_is_raised() -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    cache.remember("some-gpu", "select_tokens/triton", True)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        choice.choose(with_triton(broken), ARGS)


def test_the_gpu_of_the_tensors_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
    cache.remember("some-gpu", "select_tokens/triton", True)
    choice.choose(with_triton(), ARGS)
    assert set(waited) == {GPU}


def test_a_choice_made_for_one_precision_is_not_used_for_the_other(
    seconds: dict[str, float], tf32: Callable[[bool], None]
) -> None:
    for on, fastest in ((False, "triton"), (True, "eager")):
        tf32(on)
        seconds |= {"triton": 2.0, "eager": 2.0, fastest: 1.0}
        assert choice.choose(with_triton(), ARGS).name == fastest
    seconds.clear()
    for on, fastest in ((False, "triton"), (True, "eager")):
        tf32(on)
        assert choice.choose(with_triton(), ARGS).name == fastest
    assert cache.choices("some-gpu") == {KEY: "triton", "select_tokens/tf32/4^2": "eager"}


def test_half_precision_has_one_choice_whatever_the_precision_of_float32(
    some_gpu: SimpleNamespace, seconds: dict[str, float], tf32: Callable[[bool], None]
) -> None:
    some_gpu.dtype = torch.bfloat16
    cache.remember("some-gpu", "select_tokens/triton", True)
    seconds |= {"triton": 1.0}
    op = with_triton(dtypes=(torch.float32, torch.bfloat16))
    op = dataclasses.replace(op, backends={"triton": op.backends["triton"]})
    for on in (False, True):
        tf32(on)
        assert choice.choose(op, ARGS).name == "triton"
    assert list(choice._chosen) == [("some-gpu", "select_tokens", "bfloat16", "4^2")]


def test_the_choice_on_a_cpu_ignores_a_gpus_precision(some_gpu: SimpleNamespace, tf32: Callable[[bool], None]) -> None:
    some_gpu.device = torch.device("cpu")
    for on in (False, True):
        tf32(on)
        choice.choose(OPS["select_tokens"], ARGS)
    assert list(choice._chosen) == [("cpu", "select_tokens", "float32", "4^2")]


def products(right: Callable[[str], bool]) -> tuple[Op, list[tuple[str, bool]]]:
    """An op with a GPU backend that has a tile of each kind, and a list of (kind, TF32 is on) of the tiles that ran."""
    op, ran = with_triton(dtypes=(torch.float32, torch.bfloat16)), []
    reference = OPS["select_tokens"].reference

    def tiles(kind: str) -> dict[str, Callable[..., Any]]:
        def run(*args: Any) -> Any:
            ran.append((kind, precision.tf32_is_on()))
            out = reference(*args)
            return out if right(kind) else out.flip(1)

        return {"large": run}

    samples = lambda device, dtype: op.samples(device, torch.float32)  # noqa: E731
    return dataclasses.replace(
        op,
        samples=samples,
        tile_sample=lambda device, dtype: samples(device, dtype)[0],
        backends={**op.backends, "triton": dataclasses.replace(op.backends["triton"], tiles=tiles)},
    ), ran


@pytest.mark.parametrize("on", [False, True])
def test_every_tile_is_tried_in_its_own_precision_before_it_is_believed(on: bool, tf32: Callable[[bool], None]) -> None:
    op, ran = products(lambda kind: True)
    tf32(on)
    assert verdicts.trusted(op, op.backends["triton"], ARGS)
    expected = {("half", False), ("ieee", False)} | ({("tf32", True)} if on else set())
    assert set(ran) == expected
    assert precision.tf32_is_on() is on
    assert cache._read("some-gpu")["verdicts"] == {
        "select_tokens/triton": True,
        **({"select_tokens/triton/tf32": True} if on else {}),
    }


def test_a_wrong_tile_sets_the_backend_aside() -> None:
    op, _ = products(lambda kind: kind != "ieee")
    with pytest.warns(RuntimeWarning, match=r"\(float32, sample \w+-large"):
        assert not verdicts.trusted(op, op.backends["triton"], ARGS)


def test_one_that_fails_in_tf32_serves_all_else(some_gpu: SimpleNamespace, tf32: Callable[[bool], None]) -> None:
    op, _ = products(lambda kind: kind != "tf32")
    triton = op.backends["triton"]
    tf32(True)
    with pytest.warns(RuntimeWarning, match=r"\(tf32, sample .* set aside for TF32"):
        assert not verdicts.trusted(op, triton, ARGS)
    assert not verdicts.known_right(op, triton, ARGS)
    some_gpu.dtype = torch.bfloat16
    assert verdicts.known_right(op, triton, ARGS)
    some_gpu.dtype = torch.float32
    tf32(False)
    assert verdicts.known_right(op, triton, ARGS)


def test_a_verdict_in_full_precision_says_nothing_of_tf32(tf32: Callable[[bool], None]) -> None:
    op, ran = products(lambda kind: True)
    assert verdicts.trusted(op, op.backends["triton"], ARGS)
    ran.clear()
    tf32(True)
    assert not verdicts.known_right(op, op.backends["triton"], ARGS)
    assert verdicts.trusted(op, op.backends["triton"], ARGS)
    assert set(ran) == {("tf32", True)}


def test_too_little_memory_is_no_verdict() -> None:
    def out_of_memory(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12 GiB")

    op = with_triton(out_of_memory)
    assert not verdicts.trusted(op, op.backends["triton"], ARGS)
    assert cache.verdict("some-gpu", "select_tokens/triton") is None
