"""What the numerics tests of the launchers share: where they run, inputs, and the check against the reference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmkd.ops import get_op
from fastmkd.ops import triton as triton_backend
from fastmkd.ops.accuracy import judge, upcast
from fastmkd.ops.arguments import map_tensors, tensors

INTERPRETED = triton_backend.interpreted()
DEVICE = "cpu" if INTERPRETED else "cuda"
AGAIN = 0 if INTERPRETED else 5  # the interpreter does one thing after another: nothing can differ
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def check(name: str, args: tuple[Any, ...]) -> None:
    """Right to the project's accuracy rule, and bit-identical in a second run."""
    run, reference = triton_backend.launcher(name), get_op(name).reference
    out = run(*args)
    verdict = judge(out, reference(*upcast(args)), reference(*args))
    assert verdict.ok, verdict
    for _ in range(AGAIN):
        assert torch.equal(run(*args), out), "two runs on the same inputs differ"


def check_tf32(name: str, args: tuple[Any, ...], factors: tuple[int, ...] = (0, 1)) -> None:
    """The launcher follows PyTorch's switch, and is as right as TF32 can be expected to be.

    A tensor core reads the first ten bits after the point of a float32 factor. cuBLAS rounds to those; Triton leaves
    it to the core, which cuts the others off: 2^-10 of a factor are lost at most, where rounding loses 2^-11, and what
    is lost has a sign, so that it adds up in a long sum. So twice the error of PyTorch is too little here. Allowed is
    twice that of the reference on factors that were cut; a core that rounds has less.
    """
    run, reference = triton_backend.launcher(name), get_op(name).reference
    shorter = tuple(map_tensors(cut, (arg,))[0] if at in factors else arg for at, arg in enumerate(args))
    exact, full, plain = (tensors((x,)) for x in (reference(*upcast(args)), run(*args), reference(*shorter)))
    with tf32_products():
        fast = tensors((run(*args),))
    for x, in_full, wide, short in zip(fast, full, exact, plain, strict=True):
        verdict = judge(x, wide, short)
        assert verdict.ok, verdict
        assert (in_full - wide).abs().max() < 0.1 * (x - wide).abs().max(), "the switch changed nothing"


def cut(x: Tensor) -> Tensor:
    """The factors that a tensor core reads for TF32."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


@contextlib.contextmanager
def tf32_products() -> Iterator[None]:
    """Inside the block products of float32 are TF32; the interpreter, which multiplies in full, cuts the factors."""
    # pytest's monkeypatch would delete the switch when it is done, since no dictionary holds it.
    switch, undo = torch.backends.cuda.matmul, pytest.MonkeyPatch()
    before = switch.fp32_precision
    switch.fp32_precision = "tf32"
    if INTERPRETED:
        _cut_factors_of_tf32(undo)
    try:
        yield
    finally:
        undo.undo()
        switch.fp32_precision = before


def _cut_factors_of_tf32(patch: pytest.MonkeyPatch) -> None:
    from triton._C.libtriton import ir
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    in_full = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> Any:
        if precision == ir.INPUT_PRECISION.TF32 and a.data.dtype == np.float32:
            a, b = (TensorHandle(cut(torch.tensor(x.data)).numpy(), x.dtype) for x in (a, b))
        return in_full(self, a, b, d, precision, *rest)

    patch.setattr(InterpreterBuilder, "create_dot", create_dot)


def crossed(cases: Iterable[Any], dtypes: list[torch.dtype] = DTYPES) -> list[Any]:
    """Every case with every dtype; in the interpreter, where they differ in casts only, they take turns unless long."""
    return [
        pytest.param(case, dtype, id=f"{case}-{str(dtype)[6:]}", marks=long_unless(turn % len(dtypes) == number))
        for turn, case in enumerate(cases)
        for number, dtype in enumerate(dtypes)
    ]


def long_unless(quick: bool) -> list[Any]:
    return [] if quick or not INTERPRETED else [pytest.mark.long]


def small_or_all(small: dict[str, Any], large: dict[str, Any]) -> dict[str, Any]:
    return small if INTERPRETED else {**small, **large}


def product_dtypes() -> list[torch.dtype]:
    """Without bf16 in the interpreter, which gets its matrix products wrong in silence (it multiplies raw bits)."""
    return [dtype for dtype in DTYPES if not (INTERPRETED and dtype == torch.bfloat16)]
