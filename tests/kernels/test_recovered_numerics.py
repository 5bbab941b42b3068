"""The Triton kernels of the recovered loss; run on a GPU, or in the interpreter (test_interpreter.py)."""

from __future__ import annotations

import pytest
import torch
from numerics import AGAIN, DEVICE, INTERPRETED, crossed, draw

from fastmkd.ops import get_op
from fastmkd.ops import triton as triton_backend
from fastmkd.ops.accuracy import judge, upcast

pytest.importorskip("triton")

pytestmark = [pytest.mark.usefixtures("poisoned"), *([] if INTERPRETED else [pytest.mark.gpu])]

# Batch, channels, grid, patch: one of everything, odd sizes, several programs an image, one position a tile
SHAPES = [(1, 1, (1, 1), 1), (2, 5, (2, 3), 2), (3, 37, (1, 5), 3), (2, 24, (5, 4), 4), (1, 2500, (3, 2), 1)]


def maps(
    batch: int, channels: int, grid: tuple[int, int], patch: int, dtype: torch.dtype, taught: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    rows = draw(batch, grid[0] * grid[1], patch * patch * channels).to(DEVICE, dtype)
    teacher = draw(batch, channels, grid[0] * patch, grid[1] * patch, seed=1).to(DEVICE, taught)
    return rows, teacher, (draw(2, channels, seed=2) * channels**-0.5).to(DEVICE, torch.float32), patch


def assert_right(name: str, args: tuple[object, ...]) -> None:
    run, reference = triton_backend.launcher(name), get_op(name).reference
    out, exact, plain = run(*args), reference(*upcast(args)), reference(*args)
    verdicts = [judge(*parts) for parts in zip(out, exact, plain, strict=True)]
    assert all(verdict.ok for verdict in verdicts), verdicts
    for _ in range(AGAIN):
        assert all(map(torch.equal, run(*args), out)), "two runs on the same inputs differ"


@pytest.mark.parametrize(("shape", "dtype"), crossed(SHAPES))
def test_recovered_loss_and_its_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for taught, layout in ((dtype, torch.contiguous_format), (torch.float32, torch.channels_last)):
        rows, teacher, queries, patch = maps(*shape, dtype, taught)  # type: ignore[arg-type]
        teacher = teacher.contiguous(memory_format=layout)
        assert_right("recovered_loss", (rows, teacher, queries, patch))
        batch, channels = teacher.shape[:2]
        log_sums = get_op("recovered_loss").reference(rows, teacher, queries, patch)[3]
        shapes = ((), (batch, channels), (2, batch, channels), (2, batch))
        grads = [draw(*size, seed=3).to(queries) * 10 for size in shapes]
        assert_right("recovered_loss_grad", (rows, teacher, queries, log_sums, *grads, patch))


def test_a_logit_far_above_the_others_takes_all_the_weight() -> None:
    rows, teacher, queries, patch = maps(1, 16, (6, 6), 2, torch.float32, torch.float32)
    run = triton_backend.launcher("recovered_loss")
    contexts, log_sums = run(rows, teacher, queries * 1e5, patch)[2:]
    normal = torch.nn.functional.layer_norm(teacher.flatten(2).mT, (16,))[0]
    chosen = normal[(normal @ queries[1]).argmax()]
    torch.testing.assert_close(contexts[1, 0], chosen)
    assert log_sums.isfinite().all()
