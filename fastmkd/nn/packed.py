"""`PackedFeatures`: the visible rows of a feature map, which behave as a tensor wherever a CNN needs one.

Element-wise operations, residual sums, scaling, concatenation, casts and means over the map work through ``torch``
functions and operators. Anything else raises an error that names the operation: nothing goes dense in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .plan import MaskPlan, Pair
from .where import where

__all__ = ["PackedFeatures", "pack"]

_functions: Any = torch  # its type stubs know tensors only, not what __torch_function__ lets in


def pack(images: Tensor, visible: Tensor | MaskPlan, count: int | None = None) -> PackedFeatures:
    """Packs a dense map: keeps the pixels of visible cells as rows.

    Args:
        images: ``(B, C, H, W)``.
        visible: ``(B, gh, gw)`` bool, True = visible, or the `MaskPlan` of a batch with the same mask.
        count: number of visible cells in the batch; spares the one host read when the mask is on a GPU.

    Returns:
        The packed map.

    Raises:
        ValueError: the grid does not divide the map, batches or devices differ, or an image has nothing visible.
        TypeError: `images` is not a floating-point tensor or `visible` not bool.

    Example:
        >>> visible = torch.tensor([[[True, False]]])
        >>> pack(torch.arange(8.0).view(1, 1, 2, 4), visible).values.flatten()
        tensor([0., 1., 4., 5.])
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        what = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images is {what}; expected a floating-point (B, C, H, W) tensor.")
    if images.dim() != 4:
        raise ValueError(f"images has shape {tuple(images.shape)}; expected (B, C, H, W).")
    plan = visible if isinstance(visible, MaskPlan) else MaskPlan(visible, count)
    if images.shape[0] != plan.batch:
        raise ValueError(f"images holds {images.shape[0]} images but visible {plan.batch}; they need one mask each.")
    if images.device != plan.device:
        raise ValueError(f"visible is on {plan.device} but images on {images.device}; move them to one device.")
    size = (images.shape[2], images.shape[3])
    cell = plan.cell(size)
    # (B, C, H, W) -> (B, gh, gw, ch, cw, C): every cell becomes one block of rows
    blocks = (
        images.unflatten(3, (plan.grid[1], cell[1])).unflatten(2, (plan.grid[0], cell[0])).permute(0, 2, 4, 3, 5, 1)
    )
    rows = blocks.flatten(0, 2)[plan.cells].flatten(0, 2)  # (V, ch, cw, C) -> (N, C)
    return PackedFeatures(rows, plan, size)


class PackedFeatures:
    """The visible rows of a ``(B, C, H, W)`` map: ``values (N, C)`` and the plan that says where they belong.

    Usually made by `pack` and by masked layers. Rows are ordered by visible cell, then by pixel within the cell.

    Args:
        values: ``(N, C)`` rows.
        plan: the batch's `MaskPlan`.
        size: ``(H, W)`` of the map.
        channels_last: the map presents itself as ``(B, H, W, C)``, as after ``permute(0, 2, 3, 1)``.

    Attributes:
        values: the rows, always the same graph tensor.
        plan: the plan.

    Raises:
        ValueError: `values` does not have one row per visible pixel.

    Example:
        >>> x = pack(torch.ones(1, 3, 2, 4), torch.tensor([[[True, False]]]))
        >>> (torch.relu(x) + x * 2).to_dense()[0, 0]
        tensor([[3., 3., 0., 0.],
                [3., 3., 0., 0.]])
    """

    def __init__(self, values: Tensor, plan: MaskPlan, size: Pair, channels_last: bool = False) -> None:
        if values.dim() != 2 or values.shape[0] != plan.num_rows(plan.cell(size)):
            raise ValueError(
                f"values has shape {tuple(values.shape)}; expected ({plan.num_rows(plan.cell(size))}, C), a row per "
                f"visible pixel of the {size[0]} x {size[1]} map."
            )
        self.values = values
        self.plan = plan
        self.size_hw = size
        self.channels_last = channels_last

    @property
    def visible(self) -> Tensor:
        """``(B, gh, gw)`` bool, the mask on its coarse grid."""
        return self.plan.visible

    @property
    def cell(self) -> Pair:
        """``(ch, cw)``, pixels per cell at this map's resolution."""
        return self.plan.cell(self.size_hw)

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense map that this stands for."""
        (height, width), channels = self.size_hw, self.values.shape[1]
        order = (height, width, channels) if self.channels_last else (channels, height, width)
        return torch.Size((self.plan.batch, *order))

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Device of the values."""
        return self.values.device

    @property
    def ndim(self) -> int:
        """Always 4."""
        return 4

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient flows into the values."""
        return self.values.requires_grad

    @property
    def is_cuda(self) -> bool:
        """True on a GPU."""
        return self.values.is_cuda

    def dim(self) -> int:
        """Returns 4, the dimensions of the dense map."""
        return 4

    def size(self, dim: int | None = None) -> torch.Size | int:
        """Returns the dense shape, or one entry of it.

        Args:
            dim: which entry; None for all.
        """
        return self.shape if dim is None else self.shape[dim]

    def with_values(self, values: Tensor, size: Pair | None = None) -> PackedFeatures:
        """Returns the same map with other rows.

        Args:
            values: ``(N, C)``.
            size: ``(H, W)`` if the resolution changes too.
        """
        return PackedFeatures(values, self.plan, self.size_hw if size is None else size, self.channels_last)

    def to_dense(self, fill: float | Tensor = 0.0) -> Tensor:
        """Returns the dense map.

        Args:
            fill: value of hidden positions: a number, or ``(C,)`` such as a mask token, which then gets a gradient.

        Returns:
            ``(B, C, H, W)``, or ``(B, H, W, C)`` after a permutation to channels last.

        Raises:
            ValueError: a tensor `fill` of another shape.
        """
        (gh, gw), (ch, cw), channels = self.plan.grid, self.cell, self.values.shape[1]
        if isinstance(fill, Tensor):
            if fill.shape != (channels,):
                raise ValueError(
                    f"fill has shape {tuple(fill.shape)}; expected a number or ({channels},), a channel each."
                )
            blocks = fill.to(self.values).repeat(self.plan.batch * gh * gw, ch * cw)
        else:
            blocks = self.values.new_full((self.plan.batch * gh * gw, ch * cw * channels), fill)
        blocks = blocks.index_copy(0, self.plan.cells, self.values.reshape(self.plan.num_cells, -1))
        dense = blocks.view(self.plan.batch, gh, gw, ch, cw, channels).permute(0, 1, 3, 2, 4, 5)
        dense = dense.reshape(self.plan.batch, gh * ch, gw * cw, channels)  # (B, H, W, C)
        return dense if self.channels_last else dense.permute(0, 3, 1, 2).contiguous()

    def per_row(self, per_image: Tensor) -> Tensor:
        """Repeats values of images for their rows: ``(B, C)`` -> ``(N, C)``.

        Args:
            per_image: ``(B, C)``.
        """
        (ch, cw), per_cell = self.cell, per_image[self.plan.image_of_cells]  # (V, C)
        return per_cell[:, None].expand(-1, ch * cw, -1).flatten(0, 1)

    def mean(self, dim: Any = None, keepdim: bool = False) -> Tensor:
        """Mean over the visible positions of each image; only over the two spatial dimensions.

        Args:
            dim: the spatial dimensions, ``(2, 3)`` or ``(1, 2)`` for channels last.
            keepdim: keep them as 1.

        Returns:
            ``(B, C)``, with `keepdim` ``(B, C, 1, 1)`` or ``(B, 1, 1, C)``.
        """
        self._require_spatial("mean", dim)
        per_cell = self._by_cell().mean(1, dtype=self._wide)  # (V, C); all cells have the same number of pixels
        return self._reduced(per_cell, "mean", keepdim)

    def amax(self, dim: Any = None, keepdim: bool = False) -> Tensor:
        """Maximum over the visible positions of each image; only over the two spatial dimensions.

        Args:
            dim: the spatial dimensions, ``(2, 3)`` or ``(1, 2)`` for channels last.
            keepdim: keep them as 1.

        Returns:
            ``(B, C)``, with `keepdim` ``(B, C, 1, 1)`` or ``(B, 1, 1, C)``.
        """
        self._require_spatial("amax", dim)
        return self._reduced(self._by_cell().amax(1), "max", keepdim)

    def norm(self, p: Any = 2, dim: Any = None, keepdim: bool = False) -> Tensor:
        """Euclidean norm over the visible positions of each image; only over the two spatial dimensions.

        Args:
            p: 2.
            dim: the spatial dimensions, ``(2, 3)`` or ``(1, 2)`` for channels last.
            keepdim: keep them as 1.

        Returns:
            ``(B, C)``, with `keepdim` ``(B, C, 1, 1)`` or ``(B, 1, 1, C)``.
        """
        self._require_spatial("norm", dim)
        if p not in (2, "fro"):
            raise self._unsupported(f"norm with p={p}")
        squares = self._by_cell().to(self._wide).square().sum(1)  # (V, C)
        squares = torch.segment_reduce(squares, "sum", lengths=self.plan.cells_per_image, unsafe=True)
        positive = squares > 0  # the root's slope is infinite at 0, where the norm's is taken as 0
        norm = torch.where(positive, torch.where(positive, squares, 1).sqrt(), 0).to(self.dtype)
        return self._spread(norm, keepdim)

    @property
    def _wide(self) -> torch.dtype:
        """The dtype in which to accumulate."""
        return torch.promote_types(self.dtype, torch.float32)

    def _by_cell(self) -> Tensor:
        return self.values.unflatten(0, (self.plan.num_cells, -1))  # (V, ch * cw, C)

    def _reduced(self, per_cell: Tensor, how: str, keepdim: bool) -> Tensor:
        """``(V, C)`` -> ``(B, C)``: the cells of an image follow each other."""
        per_image = torch.segment_reduce(per_cell, how, lengths=self.plan.cells_per_image, unsafe=True)
        return self._spread(per_image.to(self.dtype), keepdim)

    def _spread(self, per_image: Tensor, keepdim: bool) -> Tensor:
        if not keepdim:
            return per_image
        return per_image[:, None, None] if self.channels_last else per_image[:, :, None, None]

    def _require_spatial(self, name: str, dim: Any) -> None:
        spatial = (1, 2) if self.channels_last else (2, 3)
        if not isinstance(dim, (tuple, list)) or tuple(sorted(d % 4 for d in dim)) != spatial:
            raise TypeError(
                f"{name} over dim={dim} is not supported on PackedFeatures of shape {tuple(self.shape)}{where()}; take "
                f"both spatial dimensions at once, dim={spatial}, for the visible positions of each image."
            )

    def permute(self, *dims: Any) -> PackedFeatures:
        """Switches between ``(B, C, H, W)`` and ``(B, H, W, C)``; the rows stay as they are.

        Args:
            *dims: ``(0, 2, 3, 1)`` from channels first, ``(0, 3, 1, 2)`` from channels last.
        """
        order = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], (tuple, list, torch.Size)) else dims
        if order == (0, 1, 2, 3):
            return self
        if order != ((0, 3, 1, 2) if self.channels_last else (0, 2, 3, 1)):
            raise self._unsupported(f"permute{order}")
        return PackedFeatures(self.values, self.plan, self.size_hw, not self.channels_last)

    def __getitem__(self, key: Any) -> PackedFeatures:
        """Selects channels, ``x[:, 8:16]``; nothing else."""
        dims = key if isinstance(key, tuple) else (key,)
        channel_dim = 3 if self.channels_last else 1
        whole = [d == slice(None) for d in dims]
        others = [w for d, w in enumerate(whole) if d != channel_dim]
        if len(dims) > 4 or not all(others) or (len(dims) > channel_dim and not isinstance(dims[channel_dim], slice)):
            raise self._unsupported(f"indexing with {key}")
        return self.with_values(self.values[:, dims[channel_dim]]) if len(dims) > channel_dim else self

    def contiguous(self, memory_format: torch.memory_format | None = None) -> PackedFeatures:
        """Returns itself; rows have one layout.

        Args:
            memory_format: ignored.
        """
        return self

    def to(self, *args: Any, **kwargs: Any) -> PackedFeatures:
        """Casts the values; another device is refused, since the plan's tables would stay behind.

        Args:
            *args: as `torch.Tensor.to`.
            **kwargs: as `torch.Tensor.to`; a `memory_format` is ignored, rows have one layout.
        """
        kwargs.pop("memory_format", None)
        values = self.values.to(*args, **kwargs)
        if values.device != self.plan.device:
            raise ValueError(
                f"the packed map is on {self.plan.device}; move images and mask to {values.device} before pack."
            )
        return self.with_values(values)

    def type_as(self, other: Tensor | PackedFeatures) -> PackedFeatures:
        """Casts to the dtype of another tensor or packed map.

        Args:
            other: whose dtype to take.
        """
        return self.to(other.dtype)

    def new_empty(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns an ordinary tensor with this map's dtype and device, as `torch.Tensor.new_empty`.

        Args:
            *args: as `torch.Tensor.new_empty`.
            **kwargs: as `torch.Tensor.new_empty`.
        """
        return self.values.new_empty(*args, **kwargs)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from .packed_functions import apply  # that module needs this class

        return apply(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("values", "plan", "size_hw", "channels_last"):  # while copying, unpickling
            raise AttributeError(name)
        from .packed_functions import bind_method

        return bind_method(self, name)

    def __repr__(self) -> str:
        return f"PackedFeatures(shape={tuple(self.shape)}, rows={self.values.shape[0]}, dtype={self.dtype})"

    def _unsupported(self, operation: str) -> TypeError:
        return TypeError(
            f"{operation} is not supported on PackedFeatures of shape {tuple(self.shape)}{where()}; call .to_dense() "
            "first, or apply it to .values if it works on each pixel alone."
        )

    def __add__(self, other: Any) -> PackedFeatures:
        return _functions.add(self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> PackedFeatures:
        return _functions.sub(self, other)

    def __rsub__(self, other: Any) -> PackedFeatures:
        return _functions.rsub(self, other)

    def __mul__(self, other: Any) -> PackedFeatures:
        return _functions.mul(self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> PackedFeatures:
        return _functions.div(self, other)

    def __rtruediv__(self, other: Any) -> PackedFeatures:
        return self.with_values(other / self.values)

    def __pow__(self, exponent: Any) -> PackedFeatures:
        return _functions.pow(self, exponent)

    # As for tensors, an augmented assignment changes the rows that other names may hold.
    def __iadd__(self, other: Any) -> PackedFeatures:
        return self.add_(other)

    def __isub__(self, other: Any) -> PackedFeatures:
        return self.sub_(other)

    def __imul__(self, other: Any) -> PackedFeatures:
        return self.mul_(other)

    def __itruediv__(self, other: Any) -> PackedFeatures:
        return self.div_(other)

    def __rpow__(self, base: Any) -> PackedFeatures:
        return _functions.pow(base, self)

    def __neg__(self) -> PackedFeatures:
        return _functions.neg(self)

    def __abs__(self) -> PackedFeatures:
        return _functions.abs(self)

    def _ordering(self, other: object) -> bool:
        raise self._unsupported("a comparison")

    __lt__ = __le__ = __gt__ = __ge__ = _ordering

    # Without it, Python would compare maps as objects and answer with one bool.
    def __eq__(self, other: object) -> bool:
        if isinstance(other, (Tensor, PackedFeatures, int, float)):
            raise self._unsupported("a comparison")
        return NotImplemented

    __hash__ = object.__hash__
