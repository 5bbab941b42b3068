"""What the launcher of centred_gram computes, against the reference; see test_numerics.py for where it runs."""

from __future__ import annotations

import pytest
import torch
from numerics import DEVICE, INTERPRETED, check, check_tf32, crossed, draw, long_unless, product_dtypes, small_or_all
from torch import Tensor

from fastmkd.ops import get_op
from fastmkd.ops import triton as triton_backend
from fastmkd.ops.accuracy import judge, upcast
from fastmkd.ops.registry import Sample

pytest.importorskip("triton")

pytestmark = [pytest.mark.usefixtures("poisoned"), *([] if INTERPRETED else [pytest.mark.gpu])]


def layers(dtype: torch.dtype, n: int, *widths: int, mean: float = 0.0, padding: int = 0) -> tuple[list[Tensor]]:
    return ([(draw(n, d + padding) + mean).to(DEVICE, dtype)[:, :d] for d in widths],)


CASES = {
    "least_batch": {"n": 4, "widths": (1, 16)},
    "one_tile": {"n": 16, "widths": (64, 3, 128)},
    "padded_rows": {"n": 21, "widths": (40, 65), "padding": 3, "mean": 30.0},
    "several_splits": {"n": 9, "widths": (1100, 512, 513)},
    "three_tiles": {"n": 67, "widths": (48, 520), "mean": 5.0},
}
CASES_LARGE = {
    "resnet_like": {"n": 64, "widths": (200704, 100352, 50176, 25088) * 2, "mean": 0.5},
    "batch_256": {"n": 256, "widths": (200704, 100352, 50177), "mean": 1.0},
    "batch_1000": {"n": 1000, "widths": (5000, 333)},
}


@pytest.mark.parametrize(("case", "dtype"), crossed(small_or_all(CASES, CASES_LARGE), product_dtypes()))
def test_centred_gram(case: str, dtype: torch.dtype) -> None:
    options = dict({**CASES, **CASES_LARGE}[case])
    check("centred_gram", layers(dtype, options.pop("n"), *options.pop("widths"), **options))


@pytest.mark.parametrize(
    "case", small_or_all({"one_tile": CASES["one_tile"]}, {"batch_1000": CASES_LARGE["batch_1000"]})
)
def test_tf32_follows_the_switch_of_pytorch(case: str) -> None:
    options = dict({**CASES, **CASES_LARGE}[case])
    check_tf32("centred_gram", layers(torch.float32, options.pop("n"), *options.pop("widths"), **options), factors=(0,))


def test_more_images_than_columns_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmkd.kernels import centred_gram as kernel

    monkeypatch.setattr(kernel, "COLUMNS", 16)
    check("centred_gram", layers(torch.float32, 37, 48))


@pytest.mark.parametrize("dtype", product_dtypes(), ids=str)
def test_every_tile_of_the_table(dtype: torch.dtype) -> None:
    from fastmkd.kernels import centred_gram as kernel

    args = layers(dtype, 35, 70, 530, mean=2.0)
    reference = get_op("centred_gram").reference
    exact, plain = reference(*upcast(args)), reference(*args)
    for config in kernel.CONFIGS["ieee" if dtype == torch.float32 else "half"]:
        verdict = judge(kernel.centred_gram(*args, config=config), exact, plain)
        assert verdict.ok, (config, verdict)


@pytest.mark.parametrize(
    ("dtype", "sample"),
    [
        pytest.param(dtype, sample, id=f"{str(dtype)[6:]}-{sample.name}", marks=long_unless(turn % 2 == number))
        for number, dtype in enumerate(product_dtypes())
        for turn, sample in enumerate(get_op("centred_gram").samples(DEVICE, dtype))
        if not sample.huge and (not INTERPRETED or get_op("centred_gram").cost(*sample.args).flops < 1e6)
    ],
)
def test_registry_samples(dtype: torch.dtype, sample: Sample) -> None:
    check("centred_gram", sample.args)


def test_symmetric_with_an_empty_diagonal_and_zero_for_a_dead_layer() -> None:
    alive, dead = draw(35, 33).float().to(DEVICE), torch.full((35, 33), 3.3, device=DEVICE)
    one_image = torch.zeros(35, 33, device=DEVICE)
    one_image[0] = alive[0]
    gram = triton_backend.launcher("centred_gram")([alive, dead, one_image])
    assert torch.equal(gram, gram.mT)
    assert not gram.diagonal(dim1=1, dim2=2).any()
    assert not gram[1:].any()
    assert gram[0].any()


@pytest.mark.gpu
def test_launches_leave_the_host_alone() -> None:
    args = layers(torch.bfloat16, 32, 512, 100)
    run = triton_backend.launcher("centred_gram")
    run(*args)  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(*args)
    finally:
        torch.cuda.set_sync_debug_mode(before)
