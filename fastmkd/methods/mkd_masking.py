"""The masked encoder: the student's backbone sees a part of the image, in rows, for one call (MKD, Section 3.1.2)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerStage
from timm.models.swin_transformer_v2 import SwinTransformerV2Stage
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..nn.convert import convert_cnn, revert_cnn
from ..nn.masked_conv import MaskedConv2d
from ..nn.packed import PackedFeatures, pack
from ..nn.plan import MaskPlan
from .features import eval_mode
from .map_shapes import MapShapes

__all__ = ["MaskedBackbone", "Sight", "coarser", "mask_at"]

Size = tuple[int, int]
Draw = Callable[[int, Size, torch.device], tuple[Tensor, int] | None]
_STAGES = (SwinTransformerStage, SwinTransformerV2Stage)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Sight:
    """What one call of a masked backbone saw.

    Args:
        patch: pixels of a cell of the mask.
        shapes: of the ordinary part.

    Attributes:
        images: ``(B, C, H, W)`` that came in, whole.
        visible: ``(B, gh, gw)`` bool over the padded image, or None if nothing is hidden.
        padded: its ``(H, W)``.
        count: visible cells in the batch.
    """

    images: Tensor
    visible: Tensor | None = None
    padded: Size
    count: int

    def __init__(self, patch: int, shapes: MapShapes) -> None:
        self.patch, self._shapes = patch, shapes
        self._plans: dict[int, MaskPlan] = {}

    def plan(self, cell: int) -> MaskPlan:
        """Returns the plan with cells of so many pixels, a multiple of the mask's; one for all layers.

        Args:
            cell: pixels.
        """
        assert self.visible is not None
        if cell not in self._plans:
            count = self.count if cell == self.patch else None
            self._plans[cell] = MaskPlan(coarser(self.visible, cell // self.patch), count)
        return self._plans[cell]

    def dense(self, output: Any, name: str = "") -> Any:
        """Returns what an ordinary network would give: dense maps of the image's own part, zeros where hidden.

        Args:
            output: of a module of the masked part; what is no map, packed or not, stays as it is.
            name: of that module in the part; "" is the part itself.

        Raises:
            ValueError: the ordinary part does not take images of this size.
        """
        if self.visible is None:
            return output
        size = (self.images.shape[2], self.images.shape[3])
        if size == self.padded:
            return _map_tree(_dense, output, output)
        try:
            ordinary = self._shapes.of(name, size)
        except ValueError as error:
            raise ValueError(
                f"images of {size[0]} x {size[1]} pixels are padded to {self.padded[0]} x {self.padded[1]} for the "
                f"mask, and the size of their maps without padding is unknown: {error} Give images of the padded size."
            ) from error
        return _map_tree(_dense, output, ordinary)


class MaskedBackbone:
    """A part of the student that can be run on what a mask leaves visible.

    A CNN is converted by `fastmkd.convert_cnn`, gets packed maps and gives back dense ones, with zeros where hidden. An
    ordinary call outside of `masking` stays the ordinary network, to the bit. Images that cells do not tile are padded
    with zeros below and to the right; the maps that come out have the size that they have without, whether layers round
    up or down, which a copy of the part on the meta device tells.

    Cells smaller than the stride of the last stage (Table 4a, 16 pixels) cannot stay whole there. Before the block in
    which a cell would fall below one position, the map is packed anew with larger cells, each hidden if its first small
    cell is, as nearest interpolation of the mask has it.

    A Swin transformer is dense: hidden pixels are zero, and so is every stage's map at hidden positions, as it comes in
    and as it goes out.

    Args:
        module: the part.
        patch: pixels of a cell.
        stride: of the coarsest map that the part makes.
        stats: of batch norms, see `fastmkd.convert_cnn`.
        masked_conv: False hides pixels of the image alone and leaves the layers as they are (Table 4f).

    Raises:
        TypeError: a layer that has no masked form.
        ValueError: a `patch` that `stride` does not divide, and that does not divide it.

    Example:
        >>> part = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1))
        >>> backbone = MaskedBackbone(part, patch=4, stride=2)
        >>> visible = torch.tensor([[[True, False], [True, True], [False, True]]]).repeat(2, 1, 1)
        >>> with backbone.masking(lambda batch, grid, device: (visible, 8)) as sight:
        ...     out = part(torch.ones(2, 3, 9, 8))
        >>> out.shape, sight.padded
        (torch.Size([2, 4, 5, 4]), (12, 8))
    """

    def __init__(
        self,
        module: nn.Module,
        patch: int,
        stride: int,
        stats: Literal["visible", "all"] = "visible",
        masked_conv: bool = True,
    ) -> None:
        if patch % stride and stride % patch:
            raise ValueError(
                f"mask_patch is {patch}, but the coarsest masked map has a position every {stride} pixels; expected a "
                f"multiple or a divisor of {stride}."
            )
        self.module, self.patch, self.stride = module, patch, stride
        self.stages = [part for part in module.modules() if isinstance(part, _STAGES)]
        self.packs = masked_conv and not self.stages
        self.masks_stages = masked_conv and bool(self.stages)
        self._converted = self.packs and not any(isinstance(part, MaskedConv2d) for part in module.modules())
        self._shapes = MapShapes(module)
        self._coarsen: list[tuple[nn.Module, int]] = []
        if self.packs and patch < stride:
            self._coarsen = _blocks_below(module, patch, stride)
        if self._converted:
            convert_cnn(module, stats)

    def release(self) -> None:
        """Makes the part an ordinary one again, unless it came converted."""
        if self._converted:
            revert_cnn(self.module)
        self._converted = False

    @contextlib.contextmanager
    def masking(self, draw: Draw) -> Iterator[Sight]:
        """Masks the one call of the part inside the context.

        Args:
            draw: ``(batch, grid, device)`` -> the mask ``(B, gh, gw)`` and how many cells of the batch are visible, or
                None where nothing is to be hidden.
        """
        sight, unit = Sight(self.patch, self._shapes), math.lcm(self.patch, self.stride)

        def enter(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            images = args[0]
            height, width = (-(-side // unit) * unit for side in images.shape[2:])
            sight.images, sight.padded = images, (height, width)
            drawn = draw(len(images), (height // self.patch, width // self.patch), images.device)
            if drawn is None:
                return None
            sight.visible, sight.count = drawn
            whole = F.pad(images, (0, width - images.shape[3], 0, height - images.shape[2]))
            if self.packs:
                return (pack(whole, sight.plan(self.patch)), *args[1:])
            return (whole * mask_at(sight.visible, (height, width))[:, None].to(whole.dtype), *args[1:])

        with contextlib.ExitStack() as stack:
            stack.callback(self.module.register_forward_pre_hook(enter).remove)
            stack.callback(self.module.register_forward_hook(lambda _m, _a, out: sight.dense(out)).remove)
            for block, cell in self._coarsen:
                stack.callback(block.register_forward_pre_hook(_repacker(sight, cell)).remove)
            if self.masks_stages:
                for stage in self.stages:
                    stack.callback(stage.register_forward_pre_hook(lambda _m, args: _hide(sight, args)).remove)
                    stack.callback(stage.register_forward_hook(lambda _m, _a, out: _hide(sight, (out,))[0]).remove)
            yield sight


def mask_at(visible: Tensor, size: Size) -> Tensor:
    """Returns a mask at the resolution of a map: cells repeated, or the first of several.

    Args:
        visible: ``(B, gh, gw)`` bool.
        size: ``(h, w)``, a multiple or a divisor of the grid in each direction.

    Example:
        >>> mask_at(torch.tensor([[[True, False]]]), (1, 4))
        tensor([[[ True,  True, False, False]]])
    """
    gh, gw = visible.shape[1:]
    if size[0] < gh:
        return coarser(visible, gh // size[0])
    return visible.repeat_interleave(size[0] // gh, 1).repeat_interleave(size[1] // gw, 2)


def coarser(visible: Tensor, factor: int) -> Tensor:
    """Returns a mask with cells of `factor` x `factor` old ones: hidden where the first of them is.

    An image that would be left without anything visible keeps all cells in which something is.

    Args:
        visible: ``(B, gh, gw)`` bool.
        factor: a divisor of gh and gw.

    Example:
        >>> coarser(torch.tensor([[[False, True, True, True], [True, True, True, False]]]), 2)
        tensor([[[False,  True]]])
    """
    if factor == 1:
        return visible
    first = visible[:, ::factor, ::factor]
    somewhere = F.max_pool2d(visible[:, None].float(), factor)[:, 0] > 0
    nothing = ~first.flatten(1).any(1)
    return first | (nothing[:, None, None] & somewhere)


def _map_tree(fn: Callable[[Any, Any], Any], tree: Any, other: Any) -> Any:
    """Applies a function to the maps of an output, whatever holds them, and to those of another of the same build."""
    if isinstance(tree, Mapping):
        return type(tree)((key, _map_tree(fn, value, other[key])) for key, value in tree.items())  # type: ignore[call-arg]
    if isinstance(tree, list | tuple) and not hasattr(tree, "_fields"):
        return type(tree)(_map_tree(fn, *pair) for pair in zip(tree, other, strict=True))
    return fn(tree, other)


def _dense(x: Any, ordinary: Any) -> Any:
    """A map as a dense one, cut to the shape of another; channels, first or last, are as many in both."""
    if isinstance(x, PackedFeatures):
        x = x.to_dense()
    if not isinstance(x, Tensor) or x.dim() != 4:
        return x
    return x[:, : ordinary.shape[1], : ordinary.shape[2], : ordinary.shape[3]]


def _repacker(sight: Sight, cell: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
    def repack(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not isinstance(args[0], PackedFeatures):
            return None
        return (pack(args[0].to_dense(), sight.plan(cell)), *args[1:])

    return repack


def _hide(sight: Sight, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Zeros at the hidden positions of a Swin's ``(B, h, w, C)``."""
    x = args[0]
    if sight.visible is None:
        return args
    return (x * mask_at(sight.visible, (x.shape[1], x.shape[2]))[..., None].to(x.dtype), *args[1:])


def _blocks_below(module: nn.Module, patch: int, stride: int) -> list[tuple[nn.Module, int]]:
    """Blocks whose output has more than `patch` pixels between positions, those that raise it, with that number."""
    side, steps = 8 * stride, dict[nn.Module, tuple[int, int]]()

    def note(part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Square images: the third number is a side of the map in either layout.
        before, after = (
            [side // max(x.shape[2], 1) for x in tree_leaves(tree) if isinstance(x, Tensor) and x.dim() == 4]
            for tree in (args, output)
        )
        if before and after:
            steps.setdefault(part, (min(before), max(after)))

    first = next(part for part in module.modules() if isinstance(part, nn.Conv2d))
    images = first.weight.new_zeros(1, first.in_channels, side, side)
    with contextlib.ExitStack() as stack, torch.no_grad(), eval_mode(module):
        for part in module.modules():
            stack.callback(part.register_forward_hook(note).remove)
        module(images)
    found: list[tuple[nn.Module, int]] = []

    def holds_blocks(part: nn.Module) -> bool:
        """A container, or what has steps between its own first and last, as a whole network has."""
        if part is module or part not in steps or isinstance(part, _CONTAINERS):
            return True
        before, after = steps[part]
        return any(before < steps[inner][1] < after for inner in part.modules() if inner in steps)

    def descend(part: nn.Module) -> None:
        if holds_blocks(part):
            for child in part.children():
                descend(child)
        elif steps[part][1] <= stride and steps[part][1] > max(steps[part][0], patch):
            found.append((part, steps[part][1]))

    descend(module)
    return found
