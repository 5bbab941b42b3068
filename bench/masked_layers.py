"""The convolutions of a network, one by one, on a masked batch: the inputs and the variants of the layer benchmarks.

Each variant runs all layers of a case, every layer on an input of its own size, and gives the visible rows of all
outputs, for training also the gradients of inputs and weights. Index tables are made before: a batch makes them once
for all layers, and `fastmkd.bench.cases.masked_resnet` says what they cost.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from fastmkd import block_mask, convert_cnn, pack
from fastmkd.nn.packed import PackedFeatures
from fastmkd.nn.plan import MaskPlan, Window
from fastmkd.reference import dense_twin

from . import peers
from .models import exact_dtype
from .registry import Answer, Case, Setting, Variant

__all__ = ["DIRECTIONS", "Layer", "layers_case", "layers_of", "runs_here"]

DIRECTIONS = ("forward", "forward + backward")


class Layer(NamedTuple):
    """A square convolution without bias that pads with half its kernel.

    Args:
        channels: ``(Cin, Cout)``.
        kernel: side of the window, odd.
        stride: step of the window.
        groups: as in `torch.nn.Conv2d`.
        size: side of the input map.
    """

    channels: tuple[int, int]
    kernel: int
    stride: int
    groups: int
    size: int

    @property
    def out_size(self) -> int:
        """Side of the output map."""
        return self.size // self.stride

    @property
    def macs(self) -> int:
        """Multiply-adds of one tap at one output position."""
        return self.channels[0] // self.groups * self.channels[1]

    def window(self) -> Window:
        """The layer's window as a `MaskPlan` takes it."""
        k, s, p = self.kernel, self.stride, self.kernel // 2
        return Window((k, k), (s, s), (p, p), (1, 1))


@cache
def layers_of(model: str, kernel: int, depthwise: bool, side: int = 224) -> tuple[Layer, ...]:
    """The convolutions of a timm network with one kernel size, in the order in which they run.

    Args:
        model: name in timm.
        kernel: side of the window.
        depthwise: those with as many groups as channels, instead of those with one group.
        side: of the images.

    Example:
        >>> [layer.size for layer in layers_of("resnet50", 3, depthwise=False)]
        [56, 56, 56, 56, 28, 28, 28, 28, 14, 14, 14, 14, 14, 14, 7, 7]
    """
    with torch.device("meta"):
        network = timm.create_model(model).eval()
    found: list[Layer] = []

    def note(conv: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        channels = (conv.in_channels, conv.out_channels)
        found.append(Layer(channels, kernel, conv.stride[0], conv.groups, inputs[0].shape[-1]))

    for conv in [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]:
        if conv.kernel_size == (kernel, kernel) and conv.groups == (conv.in_channels if depthwise else 1):
            conv.register_forward_hook(note)
    network(torch.empty(1, 3, side, side, device="meta"))
    return tuple(found)


def runs_here(setting: Setting) -> bool:
    """False where a number would say nothing: float32 on a GPU (TF32 or not), bf16 on a processor without it."""
    if setting.on_gpu:
        return setting.dtype != "fp32"
    return setting.dtype == "fp32" or torch.cpu._is_avx512_bf16_supported()


class _Convolutions(nn.Module):
    """Runs each layer on its own input."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(*c, k, stride, k // 2, groups=groups, bias=False) for c, k, stride, groups, _ in layers
        )

    def forward(self, maps: Sequence[Any]) -> list[Any]:
        return [conv(x) for conv, x in zip(self.convs, maps, strict=True)]


@dataclass
class _Way:
    """One way to run all layers: its outputs, from which a case makes a variant for either direction.

    Args:
        run: inputs to outputs, one tensor each for every layer.
        inputs: leaves.
        weights: leaves.
        grads: of the outputs.
        rows: turns a map in this way's form into rows ``(N, C)``.
        kernel: turns a weight in this way's form into ``(Cout, Cin / groups, k, k)``.
    """

    run: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    inputs: list[Tensor]
    weights: list[Tensor]
    grads: list[Tensor]
    rows: Callable[[Tensor], Tensor] = torch.Tensor.detach
    kernel: Callable[[Tensor], Tensor] = torch.Tensor.detach

    def call(self, backward: bool) -> list[Tensor]:
        """Runs forward, or forward and backward."""
        with torch.set_grad_enabled(backward):
            outputs = list(self.run(self.inputs))
        if not backward:
            return outputs
        return [*outputs, *torch.autograd.grad(outputs, [*self.inputs, *self.weights], self.grads)]

    def read(self, result: list[Tensor]) -> list[Tensor]:
        """Brings what `call` returned into the form in which ways are compared."""
        maps = 2 * len(self.inputs)  # outputs and gradients of inputs; a forward pass alone has fewer
        return [*map(self.rows, result[:maps]), *map(self.kernel, result[maps:])]


class _Batch:
    """A masked batch for some layers: random maps, weights, and gradients of the outputs.

    They are float32 numbers that the setting's dtype holds exactly. Maps of one use, size and width are one tensor;
    every layer has its own weight.
    """

    def __init__(self, layers: Sequence[Layer], batch: int, grid: tuple[int, int], percent: int, setting: Setting):
        generator = torch.Generator(setting.device).manual_seed(3)
        mask = block_mask(batch, grid, percent / 100, generator=torch.Generator().manual_seed(4))
        self.layers, self.batch, self.plan = layers, batch, MaskPlan(mask.to(setting.device))

        @cache
        def maps(use: str, channels: int, size: int) -> Tensor:  # (B, C, H, W), channels last
            wide = torch.randn(batch, size, size, channels, generator=generator, device=setting.device)
            return wide.to(setting.torch_dtype).float().permute(0, 3, 1, 2)

        self.inputs = [maps("input", layer.channels[0], layer.size) for layer in layers]
        self.grads = [maps("gradient", layer.channels[1], layer.out_size) for layer in layers]
        torch.manual_seed(5)
        self.network = _Convolutions(layers).to(setting.device, setting.torch_dtype).float()
        self.cast = cache(torch.Tensor.to)  # what several ways share is converted once

    @property
    def visible(self) -> Tensor:
        return self.plan.visible

    def rows(self, x: Tensor) -> Tensor:
        return pack(x.detach(), self.plan).values

    def plain(self, dtype: torch.dtype) -> _Way:
        """The unmasked layers."""
        network = copy.deepcopy(self.network).to(dtype=dtype, memory_format=torch.channels_last)
        return self._way(network, self.inputs, self.grads, network, dtype)

    def twin(self, dtype: torch.dtype) -> _Way:
        """The masked layers as plain PyTorch; no gradient arrives at hidden positions."""
        network = copy.deepcopy(self.network).to(dtype=dtype, memory_format=torch.channels_last)
        twin = dense_twin(network)
        grads = [pack(g, self.plan).to_dense().contiguous(memory_format=torch.channels_last) for g in self.grads]
        way = self._way(lambda maps: twin(maps, self.visible), self.inputs, grads, twin, dtype)
        way.rows = self.rows
        return way

    def packed(self, dtype: torch.dtype) -> _Way:
        """The layers of fastmkd on packed maps."""
        network = convert_cnn(copy.deepcopy(self.network)).to(dtype)
        sizes = [(layer.size, layer.size) for layer in self.layers]

        def run(rows: Sequence[Tensor]) -> list[Tensor]:
            maps = [PackedFeatures(x, self.plan, size) for x, size in zip(rows, sizes, strict=True)]
            return [y.values for y in network(maps)]

        return self._way(run, *self._packed_maps(), network, dtype)

    def block_gather(self, dtype: torch.dtype) -> _Way:
        """Blocks with their borders, convolved by the dense library."""
        network = copy.deepcopy(self.network).to(dtype=dtype, memory_format=torch.channels_last)
        halos: dict[tuple[int, int, int], Tensor] = {}
        convolutions = []
        for layer in self.layers:
            key = (layer.size // self.plan.grid[0], layer.kernel, layer.stride)
            halos.setdefault(key, peers.halo_rows(self.visible, *key))
            convolutions.append(peers.block_gather(halos[key], layer.kernel, layer.stride, layer.groups))
        return self._way(_each(convolutions, list(network.parameters())), *self._packed_maps(), network, dtype)

    def spconv(self) -> _Way:
        """The same rows through spconv, in float32 on one thread of the CPU."""
        network = copy.deepcopy(self.network)
        for conv in network.convs:
            conv.weight.data = conv.weight.data.permute(0, 2, 3, 1).contiguous()  # (Cout, k, k, Cin)
        make = cache(peers.spconv_convolution)
        convolutions = [make(self.plan, layer.size, layer.kernel, layer.stride) for layer in self.layers]
        run = _each(convolutions, list(network.parameters()))
        way = self._way(run, *self._packed_maps(), network, torch.float32)
        way.kernel = lambda weight: weight.permute(0, 3, 1, 2)
        return way

    def _packed_maps(self) -> tuple[list[Tensor], list[Tensor]]:
        rows = cache(self.rows)  # by identity: shared maps stay shared
        return [rows(x) for x in self.inputs], [rows(g) for g in self.grads]

    def _way(self, run: Any, inputs: list[Tensor], grads: list[Tensor], network: Any, dtype: torch.dtype) -> _Way:
        leaves = [self.cast(x, dtype).detach().requires_grad_() for x in inputs]
        return _Way(run, leaves, list(network.parameters()), [self.cast(g, dtype) for g in grads])

    def answers(self, backward: bool, setting: Setting) -> tuple[Answer, Answer]:
        """What the masked layers compute, with the least work; and the whole work of the unmasked ones."""
        size, passes = setting.torch_dtype.itemsize, 3 if backward else 1
        dense, seen, moved = 0, 0, 0
        for layer in self.layers:
            cell = self.plan.cell((layer.size, layer.size))
            taps = self.plan.taps(cell, layer.window()).forward
            seen += int((taps >= 0).sum()) * layer.macs
            dense += self.batch * (layer.out_size * layer.kernel) ** 2 * layer.macs
            rows_in, rows_out = self.plan.num_rows(cell), taps.shape[0]
            moved += rows_in * layer.channels[0] + rows_out * layer.channels[1] + layer.kernel**2 * layer.macs

        def exact() -> list[Tensor]:
            with torch.backends.cudnn.flags(allow_tf32=False):
                way = self.twin(exact_dtype(setting))
                return way.read(way.call(backward))

        masked = Answer(exact, flops=2.0 * passes * seen, bytes=float(passes * moved * size))
        return masked, Answer(flops=2.0 * passes * dense)


def layers_case(
    setting: Setting,
    layers: Sequence[Layer],
    percent: int,
    direction: str,
    batch: int,
    panel: str,
    grid: tuple[int, int] = (7, 7),
) -> Case:
    """Some layers on a batch of which `percent` is hidden, in every way that can run here; the twin is the baseline.

    Args:
        setting: device and dtype; maps and weights are in that dtype.
        layers: what to run.
        percent: share of the cells that a block mask hides.
        direction: one of `DIRECTIONS`.
        batch: images.
        panel: what the layers are called.
        grid: cells of the mask; 7 x 7 for images of side 224.
    """
    backward, dtype = direction == DIRECTIONS[1], setting.torch_dtype
    made = _Batch(layers, batch, grid, percent, setting)
    masked, whole = made.answers(backward, setting)

    def variant(name: str, way: _Way, answer: Answer = masked, **more: Any) -> Variant:
        return Variant(name, lambda: way.call(backward), answer, read=way.read, **more)

    variants = [
        variant("plain, unmasked", made.plain(dtype), whole),
        variant("dense twin", made.twin(dtype), plain=True),
        variant("block gather", made.block_gather(dtype)),
        variant("fastmkd", made.packed(dtype)),
    ]
    if not setting.on_gpu and setting.dtype == "bf16":
        variants.append(variant("fastmkd in fp32", made.packed(torch.float32), Answer()))
    elif not setting.on_gpu and all(layer.groups == 1 for layer in layers):
        variants += _single_threaded(made, backward, masked)
    return Case(
        label=f"{percent} % hidden",
        panel=f"{panel}, {direction}, batch {batch}",
        variants=variants,
        baseline="dense twin",
        items=batch,
        params={"batch": batch, "percent": percent, "layers": len(layers), "cells": made.plan.num_cells},
    )


def _single_threaded(made: _Batch, backward: bool, answer: Answer) -> list[Variant]:
    """On one thread, since spconv races with more: spconv, and beside it fastmkd."""
    reason = peers.why_no_spconv()
    if reason is not None:
        return [Variant("spconv, 1 thread", lambda: None, answer, unavailable=reason)]
    ways = {"spconv, 1 thread": made.spconv(), "fastmkd, 1 thread": made.packed(torch.float32)}

    def variant(name: str, way: _Way) -> Variant:
        return Variant(name, peers.on_one_thread(lambda: way.call(backward)), answer, read=way.read)

    return [variant(name, way) for name, way in ways.items()]


def _each(convolutions: list[peers.Convolution], weights: list[Tensor]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    return lambda rows: [f(x, w) for f, x, w in zip(convolutions, rows, weights, strict=True)]
