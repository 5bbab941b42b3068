"""Inputs that are nearly right, for every op: the result of the reference, or a sentence; never anything else.

Each op is tried in a process of its own, so that a crash in compiled code is a failure with a name and not the end.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastmkd
from fastmkd.ops import OPS
from fastmkd.ops.accuracy import judge, upcast
from fastmkd.ops.arguments import map_tensors, tensors
from fastmkd.ops.choice import BackendUnavailableError
from fastmkd.ops.registry import FLOATS, Op

INTEGERS = [-(2**63), -(2**31), -1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**32 + 1, 2**62, 2**63 - 1]
ALL_ONES = struct.unpack("<d", b"\xff" * 8)[0]  # a NaN with every bit set, in each dtype
NUMBERS = [math.nan, ALL_ONES, math.inf, -math.inf, -1.0, 0.0, -0.0, 1e-45, 1e30]
DTYPES = [*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64]
MOST_ELEMENTS = 20_000  # of a sample to begin with
MOST_BYTES = 2**26  # that a call reads and writes; more is right and slow
CHANGES = (
    "dtype", "strided", "transposed", "expanded", "shorter", "longer", "empty", "more_dims", "fewer_dims", "meta",
    "unaligned", "value", "value", "value", "repeat",
)  # fmt: skip


@functools.cache
def beginnings(name: str, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    found = [sample.args for sample in OPS[name].samples("cpu", dtype) if not sample.huge]
    return [args for args in found if sum(t.numel() for t in tensors(args)) <= MOST_ELEMENTS]


@st.composite
def inputs(draw: st.DrawFn, name: str) -> tuple[Any, ...]:
    """A sample of which up to three arguments have been changed."""
    dtype = draw(st.sampled_from([torch.float32, torch.float32, *FLOATS]))
    args = list(draw(st.sampled_from(beginnings(name, dtype))))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(args) - 1))
        args[place] = changed(draw, args[place])
    return tuple(args)


def changed(draw: st.DrawFn, value: Any) -> Any:
    if isinstance(value, Tensor):
        return changed_tensor(draw, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw(st.sampled_from(INTEGERS))
    if isinstance(value, float):
        return draw(st.sampled_from(NUMBERS))
    if isinstance(value, list) and value:
        place = draw(st.integers(0, len(value)))
        if place == len(value):
            return value[:-1] if draw(st.booleans()) else [*value, value[0]]
        return [*value[:place], changed(draw, value[place]), *value[place + 1 :]]
    return value


def changed_tensor(draw: st.DrawFn, t: Tensor) -> Tensor:
    change = draw(st.sampled_from(CHANGES))
    if change == "dtype":
        return t.to(draw(st.sampled_from(DTYPES)))
    if change == "strided":
        return torch.stack([t, t], -1)[..., 0]
    if change == "more_dims":
        return t[None]
    if change == "meta":
        return t.to("meta")
    if change == "unaligned":
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
    if t.numel() == 0 or t.dim() == 0 or t.is_meta or t.is_complex():
        return t
    if change == "transposed":
        return t.transpose(0, -1)
    if change == "expanded":
        return t[:1].expand_as(t)
    if change == "fewer_dims":
        return t.flatten() if draw(st.booleans()) else t[0]
    if change in ("value", "repeat"):
        flat = t.flatten().clone()
        place = draw(st.integers(0, min(len(flat), 50) - 1)) * (len(flat) // min(len(flat), 50))
        flat[place] = flat[-1 - place] if change == "repeat" else new_value(draw, t.dtype, len(flat))
        return flat.view(t.shape)
    dim = draw(st.integers(0, t.dim() - 1))
    if change == "longer":
        return torch.cat([t, t], dim)
    return t.narrow(dim, 0, 0 if change == "empty" else t.shape[dim] - 1)


def new_value(draw: st.DrawFn, dtype: torch.dtype, count: int) -> Any:
    if dtype == torch.bool:
        return draw(st.booleans())
    if dtype.is_floating_point:
        return draw(st.sampled_from(NUMBERS))
    limits = torch.iinfo(dtype)
    return max(limits.min, min(limits.max, draw(st.sampled_from([*INTEGERS, count, count - 1]))))


def describe(args: tuple[Any, ...]) -> str:
    return ", ".join(
        f"{str(a.dtype)[6:]}{tuple(a.shape)} strides {a.stride()} on {a.device}" if isinstance(a, Tensor) else repr(a)
        for a in args
    )


def attempt(op: Op, args: tuple[Any, ...], backend: str) -> tuple[Tensor, ...] | str:
    """The outputs, or the sentence with which the op refused."""
    try:
        with fastmkd.backend(backend):
            return tuple(tensors((op.entry(*args),)))
    except (ValueError, TypeError) as error:
        said = str(error)
        assert said.endswith(".") and " " in said, f"no sentence: {said}"  # noqa: PT018
        return said
    except BackendUnavailableError:
        return "unavailable"


def agrees(out: Tensor, exact: Tensor, plain: Tensor) -> bool:
    """As accurate as PyTorch where the result is a number; and where exact arithmetic has none, it shows.

    Not at every place: what is absent adds nothing to compiled sums, and zero times infinity to those of a reference.
    """
    if not out.is_floating_point() or out.shape != plain.shape or out.dtype != plain.dtype:
        return judge(out, exact, plain).ok
    if out.isfinite().all() and not exact.isfinite().all():
        return False
    both = exact.isfinite() & plain.isfinite()
    verdict = judge(out[both], exact[both], plain[both])
    # Twice what the rule allows: of thousands of inputs there are some on which PyTorch is nearly exact by luck.
    return verdict.ok or verdict.error <= 2 * verdict.allowed


def try_one(op: Op, args: tuple[Any, ...]) -> str:
    """Returns what came of it: refused, right, meta or large."""
    on_cpu = not any(t.is_meta for t in tensors(args))
    try:
        op.check(*args)
        if on_cpu and op.cost(*args).bytes > MOST_BYTES:
            return "large"
    except (ValueError, TypeError):
        pass
    plain, out = attempt(op, args, "eager"), attempt(op, args, "cpp")
    if on_cpu and out != "unavailable":  # whoever calls the compiled entry point itself has its own checks
        with contextlib.suppress(ValueError, TypeError, RuntimeError):
            getattr(torch.ops.fastmkd_native, op.name).default(*args)
    if isinstance(plain, str) or isinstance(out, str):
        assert out in (plain, "unavailable") or (isinstance(plain, str) and isinstance(out, str)), (plain, out)
        if isinstance(plain, str):
            return "refused"
    if not on_cpu:
        assert not isinstance(plain, str)
        assert all(t.is_meta for t in plain)
        return "meta"
    if out == "unavailable":
        return "eager alone"
    exact = tensors((op.reference(*upcast(args)),))
    assert all(map(agrees, out, exact, plain)), "wrong result"
    again = attempt(op, args, "cpp")
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(out, again, strict=True)), "not repeatable"
    try_gradient(op, args)
    return "right"


def try_gradient(op: Op, args: tuple[Any, ...]) -> None:
    """It is right by other tests; here it only must be there."""
    where = next((sample.grad for sample in op.samples("cpu", torch.float64) if sample.grad), ())
    leaf = lambda t: t.detach().clone().requires_grad_() if t.is_floating_point() else t  # noqa: E731
    args = tuple(map_tensors(leaf, (a,))[0] if i in where else a for i, a in enumerate(args))
    outputs = [t for t in tensors((op.entry(*args),)) if t.requires_grad]
    if outputs:
        sum(t.float().sum() for t in outputs).backward()


Trial = Callable[[Op, tuple[Any, ...]], str]


def fuzz(name: str, examples: int, folder: Path, trial: Trial) -> None:
    """In the child: what is about to be tried is in a file, so that the parent knows it if this process crashes."""
    room = resource.getrlimit(resource.RLIMIT_AS)[1]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, room))
    torch.set_num_threads(1)
    outcomes: dict[str, int] = {}

    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(inputs(name))
    def run(args: tuple[Any, ...]) -> None:
        (folder / "last").write_text(f"{name}({describe(args)})")
        outcome = trial(OPS[name], args)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1

    run()
    (folder / "counts").write_text(repr(outcomes))


def fuzz_in_child(name: str, examples: int, folder: Path, trial: Trial) -> None:
    with (folder / "said").open("w") as sys.stdout:
        sys.stderr = sys.stdout
        try:
            fuzz(name, examples, folder, trial)
        except BaseException as error:
            error.__notes__ = []  # every number of every tensor
            traceback.print_exception(error, limit=-6, file=sys.stdout)
            sys.exit(1)


def fuzz_apart(name: str, examples: int, folder: Path, trial: Trial = try_one) -> dict[str, int]:
    # Not a fork of this process: after some tests of others the backward pass of a fork has no threads.
    child = fresh.CONTEXT.Process(target=fuzz_in_child, args=(name, examples, folder, trial))
    child.start()
    child.join()
    code, last = child.exitcode or 0, folder / "last"
    assert code >= 0, f"{signal.Signals(-code).name} in {last.read_text()}"
    assert code == 0, f"{last.read_text()}\n{(folder / 'said').read_text()[-6000:]}"
    outcomes: dict[str, int] = eval((folder / "counts").read_text())
    return outcomes


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_input_has_a_result_or_a_sentence(name: str, tmp_path: Path) -> None:
    outcomes = fuzz_apart(name, 60, tmp_path)
    assert outcomes["right"] >= 5
    assert outcomes["refused"] >= 5


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(OPS))
def test_many_more_inputs(name: str, tmp_path: Path) -> None:
    outcomes = fuzz_apart(name, 2000, tmp_path)
    print(name, outcomes)  # the counts of docs/reliability.md
    assert min(outcomes["right"], outcomes["refused"]) >= 100


def crash(op: Op, args: tuple[Any, ...]) -> str:
    os.kill(os.getpid(), signal.SIGSEGV)
    return "too late"


def test_a_crash_is_seen(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"SIGSEGV in select_tokens\(float"):
        fuzz_apart("select_tokens", 1, tmp_path, crash)
