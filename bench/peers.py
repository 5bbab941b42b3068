"""Other ways to the same results: block gather in plain PyTorch, spconv's submanifold convolution, `pytorch-cka`.

The convolutions take and give the rows of a packed map in the order of `fastmkd.pack`, and get their index tables from
here before anything is timed, as a network that shares them between layers would.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmkd.nn.plan import MaskPlan

__all__ = [
    "PYTORCH_CKA",
    "SPCONV",
    "block_gather",
    "halo_rows",
    "on_one_thread",
    "pytorch_cka",
    "spconv_convolution",
    "why_no_pytorch_cka",
    "why_no_spconv",
]

PYTORCH_CKA = "1.1.3"
SPCONV = "2.3.8"

Convolution = Callable[[Tensor, Tensor], Tensor]  # rows (N, Cin) and weight (Cout, Cin / groups, k, k) to rows


def halo_rows(visible: Tensor, cell: int, kernel: int, stride: int) -> Tensor:
    """Which rows lie under each visible cell and the border that its output needs.

    Args:
        visible: ``(B, gh, gw)`` bool, True = visible.
        cell: side of a cell in pixels of the input map.
        kernel: side of the window, odd; the map is padded by half of it.
        stride: step of the window.

    Returns:
        ``(V, side, side)`` int64 row numbers with ``side = cell - stride + kernel``; the number of rows stands for
        positions that are hidden or outside the map.

    Example:
        >>> halo_rows(torch.tensor([[[True, False]]]), cell=2, kernel=3, stride=1)[0]
        tensor([[4, 4, 4, 4],
                [4, 0, 1, 4],
                [4, 2, 3, 4],
                [4, 4, 4, 4]])
    """
    B, gh, gw = visible.shape
    cells = visible.flatten().nonzero()[:, 0]  # (V,)
    total = len(cells) * cell * cell
    number = torch.full((B * gh * gw, cell * cell), total, device=visible.device)
    number[cells] = torch.arange(total, device=visible.device).view(-1, cell * cell)
    number = number.view(B, gh, gw, cell, cell).permute(0, 1, 3, 2, 4).reshape(B, gh * cell, gw * cell)
    number = F.pad(number, (kernel // 2,) * 4, value=total)  # (B, H + k - 1, W + k - 1)
    side = cell - stride + kernel
    halos = number.unfold(1, side, cell).unfold(2, side, cell)  # (B, gh, gw, side, side)
    return halos.flatten(0, 2)[cells].contiguous()


def block_gather(halos: Tensor, kernel: int, stride: int, groups: int) -> Convolution:
    """Gathers each visible cell with its border and convolves the blocks without padding: dense PyTorch, no new kernel.

    The dense library is slow on blocks with few outputs: those of 2 x 2 and less are gathered window by window and
    multiplied with the weight as one matrix, which is three times as fast at 7 x 7 pixels.

    Args:
        halos: ``(V, side, side)``, what `halo_rows` gives.
        kernel: of the convolution.
        stride: of the convolution.
        groups: of the convolution.

    Example:
        >>> visible = torch.tensor([[[True, False]]])
        >>> convolve = block_gather(halo_rows(visible, 2, 3, 1), kernel=3, stride=1, groups=1)
        >>> convolve(torch.ones(4, 1), torch.ones(1, 1, 3, 3)).flatten()
        tensor([4., 4., 4., 4.])
    """
    windows = halos.unfold(1, kernel, stride).unfold(2, kernel, stride)  # (V, h, w, k, k)
    if groups == 1 and windows.shape[1] <= 2:
        index = windows.flatten(0, 2).flatten(1).contiguous()  # (N_out, k * k)
        return lambda rows, weight: _gather(rows, index).flatten(1) @ weight.permute(0, 2, 3, 1).flatten(1).t()

    def convolve(rows: Tensor, weight: Tensor) -> Tensor:
        blocks = _gather(rows, halos).permute(0, 3, 1, 2)  # (V, Cin, side, side), channels last
        return F.conv2d(blocks, weight, stride=stride, groups=groups).permute(0, 2, 3, 1).flatten(0, 2)

    return convolve


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """Rows by number, a row of zeros for the number after the last: ``(*index.shape, C)``."""
    padded = torch.cat((rows, rows.new_zeros(1, rows.shape[1])))
    if rows.is_cuda:
        return padded.index_select(0, index.flatten()).view(*index.shape, -1)
    return F.embedding(index, padded)  # its gradient is twice as fast on a CPU; on a GPU it would sort first


def why_no_spconv() -> str | None:
    """None where spconv can run on the CPU, else a sentence."""
    return _why_not("spconv", SPCONV, module="spconv")


def why_no_pytorch_cka() -> str | None:
    """None where `pytorch_cka` can run, else a sentence."""
    return _why_not("pytorch-cka", PYTORCH_CKA, module="cka")


def _why_not(package: str, version: str, module: str) -> str | None:
    if util.find_spec(module) is None:
        return f"{package} is not installed; pip install {package}=={version}"
    found = metadata.version(package)
    return None if found == version else f"{package} {found} is installed; this entry was written for {version}"


def pytorch_cka(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    """CKA of all pairs by the package `pytorch-cka`: one Gram a layer, three terms, the result clamped to 0..1.

    Args:
        xs: M tensors ``(n, ...)``.
        ys: N tensors ``(n, ...)``.

    Returns:
        ``(M, N)``.
    """
    from cka import cka_from_features

    result: Tensor = cka_from_features([x.flatten(1) for x in xs], [y.flatten(1) for y in ys])
    return result


def spconv_convolution(plan: MaskPlan, size: int, kernel: int, stride: int) -> Convolution:
    """The CPU convolution of spconv for one layer, with its tables of row pairs made beforehand.

    With stride 1 it is the submanifold convolution, which computes the visible rows and nothing else. With a larger
    stride spconv knows only the convolution that adds output positions next to visible ones; they are computed and then
    dropped. Its weight is ``(Cout, k, k, Cin)``.

    Args:
        plan: of the batch.
        size: side of the input map.
        kernel: side of the window, odd.
        stride: step of the window.
    """
    ops, functional, native = _spconv()
    batch, half = plan.batch, [kernel // 2] * 2
    subm = stride == 1
    # ops.get_indice_pairs(indices, batch, shape, algorithm, kernel, stride, padding, dilation, output padding, subm)
    sites, pairs, counts = ops.get_indice_pairs(
        _sites(plan, size), batch, [size] * 2, native, [kernel] * 2, [stride] * 2, half, [1] * 2, [0] * 2, subm
    )
    if subm:
        return lambda rows, weight: functional.indice_subm_conv(rows, weight, pairs, counts, len(sites), native)
    out = size // stride
    flat = lambda s: (s[:, 0].long() * out + s[:, 1]) * out + s[:, 2]  # noqa: E731
    place = torch.empty(batch * out * out, dtype=torch.int64)
    place[flat(sites)] = torch.arange(len(sites))
    visible = place[flat(_sites(plan, out))]  # (N_out,)

    def strided(rows: Tensor, weight: Tensor) -> Tensor:
        return functional.indice_conv(rows, weight, pairs, counts, len(sites), native).index_select(0, visible)

    return strided


def on_one_thread(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` with one thread of PyTorch's pool.

    Example:
        >>> on_one_thread(torch.get_num_threads)()
        1
    """

    def alone() -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return run()
        finally:
            torch.set_num_threads(before)

    return alone


def _sites(plan: MaskPlan, size: int) -> Tensor:
    """``(N, 3)`` int32: image, y and x of each row."""
    cell = plan.cell((size, size))
    image = plan.image_of_cells.repeat_interleave(cell[0] * cell[1])
    return torch.stack((image, *plan.positions(cell)), dim=1).to(torch.int32)


@lru_cache(maxsize=1)
def _spconv() -> tuple[Any, Any, Any]:
    """Operators, autograd functions and CPU algorithm of spconv, ready for one thread."""
    import spconv
    from spconv.core import ConvAlgo
    from spconv.pytorch import functional, ops

    # The backward pass asks for a CUDA stream before it looks at the device, and never uses it on a CPU.
    ops.get_current_stream = lambda: 0
    # Its scatter adds race: with two threads strided layers come out wrong now and then. Its OpenMP is its own copy.
    for library in (Path(spconv.__file__).parents[1] / "spconv.libs").glob("libgomp*"):
        ctypes.CDLL(str(library)).omp_set_num_threads(1)
    return ops, functional, ConvAlgo.Native
