"""Every tile that a launcher may choose, and the samples that prove it; see test_numerics.py for where it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any, cast

import pytest
import torch
from numerics import DEVICE, INTERPRETED

from fastmkd.ops import OPS, get_op, precision
from fastmkd.ops.check import cases, check_sample
from fastmkd.ops.registry import Op, Sample

pytest.importorskip("triton")

pytestmark = [pytest.mark.usefixtures("poisoned"), *([] if INTERPRETED else [pytest.mark.gpu])]
KINDS = {"half": torch.bfloat16, "ieee": torch.float32, "tf32": torch.float32}
TILED = sorted(name for name, op in OPS.items() if any(backend.tiles for backend in op.backends.values()))


def tiles(name: str, kind: str) -> list[Any]:
    """Tiles among which the launcher chooses."""
    listed = OPS[name].backends["triton"].tiles
    assert listed is not None
    return [cast(partial[Any], run).keywords["config"] for run in listed(kind).values()]


def test_every_kernel_of_matrix_products_is_here() -> None:
    """`launch.product_kind` is how a launcher learns which products it is to compute."""
    from importlib import import_module

    triton = [name for name, op in OPS.items() if "triton" in op.backends]
    assert sorted(name for name in triton if hasattr(import_module(f"fastmkd.kernels.{name}"), "product_kind")) == TILED
    made = {name: op.tile_sample("cpu", torch.float32).name for name, op in OPS.items() if op.tile_sample is not None}
    assert made == dict.fromkeys(TILED, "tiles")


def small(op: Op) -> Op:
    """In the interpreter, where the tiles' sample would take minutes, they run on a small one."""

    def first(device: str, dtype: torch.dtype) -> Sample:
        fit = (s for s in op.samples(device, dtype) if not s.huge and 1e3 < op.cost(*s.args).flops < 1e6)
        return dataclasses.replace(next(fit), name="tiles")

    return dataclasses.replace(op, tile_sample=first) if INTERPRETED else op


@pytest.mark.parametrize("name", TILED)
def test_every_tile(name: str) -> None:
    op = small(get_op(name))
    backend = op.backends["triton"]
    if INTERPRETED:  # which gets matrix products of bf16 wrong
        backend = dataclasses.replace(backend, dtypes=(torch.float32, torch.float16))
    tried = [case for case in cases(op, backend, DEVICE) if case.sample.name.startswith("tiles-")]
    per_kind = {kind: len(tiles(name, kind)) for kind in KINDS}
    assert len(tried) == per_kind["half"] * (len(backend.dtypes) - 1) + per_kind["ieee"] + per_kind["tf32"]
    assert min(per_kind.values()) > 0
    rows = [check_sample(op, *case) for case in tried]
    assert [row for row in rows if row.outcome != "right"] == []


def sizes(name: str, args: tuple[Any, ...]) -> tuple[int, int]:
    """Rows and columns that tiles divide among them."""
    if name == "masked_conv2d":
        return len(args[3]), len(args[1])
    if name == "masked_conv2d_weight":
        return args[1].shape[1], args[0].shape[1]
    if name == "packed_attention":
        longest = int(args[1].diff().max())
        return longest, longest
    if name == "patch_embed":
        return args[4].numel(), len(args[1])
    if name == "centred_gram":
        return (len(args[0][0]),) * 2
    return args[0].shape[0] * args[0].shape[2] * args[0].shape[3] // args[-1] ** 2, len(args[1])


@pytest.mark.parametrize(("name", "kind"), list(product(TILED, KINDS)))
def test_the_tiles_sample_is_several_tiles_and_a_part(name: str, kind: str) -> None:
    make = OPS[name].tile_sample
    assert make is not None
    rows, columns = sizes(name, make("cpu", KINDS[kind]).args)
    for config in tiles(name, kind):
        height, width = (config.block,) * 2 if name == "centred_gram" else (config.block_m, config.block_n)
        assert rows > height, config
        assert rows % height, config
        if name != "masked_conv2d_weight":  # whose columns are the input channels, most often a multiple of 64
            assert columns > width, config
            assert columns % width, config


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    with precision.products(request.param == "tf32"):
        yield request.param


def test_no_other_tile_is_chosen(kind: str) -> None:
    from fastmkd.kernels import (
        align_cells,
        centred_gram,
        masked_conv2d,
        masked_conv2d_weight,
        packed_attention,
        patch_embed,
    )

    dtype, powers = KINDS[kind], [1 << i for i in range(19)]
    chosen: dict[Any, set[Any]] = {
        align_cells: {align_cells.choose_tile(dtype, rows, width) for rows, width in product(powers, powers)},
        centred_gram: {centred_gram.choose_config(dtype, n, align) for n, align in product(powers, (1, 2, 16))},
        masked_conv2d: {masked_conv2d.choose_config(dtype, rows, width) for rows, width in product(powers, powers)},
        masked_conv2d_weight: {
            masked_conv2d_weight.choose_config(dtype, rows, width, width)._replace(steps=32)
            for rows, width in product(powers, powers)
        },
        packed_attention: {
            packed_attention.choose_config(dtype, tokens, images, 6, dim)
            for tokens, images, dim in product(powers, powers, (64, 256))
        },
        patch_embed: {patch_embed.choose_config(dtype, rows, width) for rows, width in product(powers, powers)},
    }
    for kernel, found in chosen.items():
        assert found == set(kernel.tiles(kind).values()), kernel.__name__
