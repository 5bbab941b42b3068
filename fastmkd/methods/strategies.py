"""Which patches a masked network gets to see: MaskedKD's saliency and what Table 3 compares it with.

A strategy gives every patch a score; the k largest are kept. Scores may lie on another grid than that of the masked
network: they are then resized bilinearly (MaskedKD, footnote 1).
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import timm
from torch import Tensor, nn

from ..nn.masks import cell_scores
from ..nn.vit import MaskedViT
from ..nn.vit_attention import why_attention_unreadable
from .views import Needs, View, blocks_of

__all__ = ["STRATEGIES", "ExternalSaliency", "MaskStrategy", "Random", "Saliency", "Scores"]

NAMED_LAYERS = {"first": 0.0, "middle": 0.5, "last": 1.0}


class Scores(NamedTuple):
    """How much each patch is worth showing.

    Attributes:
        values: ``(B, gh * gw)`` finite, larger is kept first.
        grid: ``(gh, gw)`` of the scores.
    """

    values: Tensor
    grid: tuple[int, int]


class MaskStrategy(abc.ABC):
    """Scores patches from what the student saw, or without it."""

    def needs(self, student: MaskedViT) -> Needs:
        """Says what to record of the student's forward pass on the whole image; nothing unless a subclass says so.

        Args:
            student: the network that learns.

        Raises:
            ValueError: the student cannot give it.
        """
        return Needs()

    @abc.abstractmethod
    def scores(self, images: Tensor, student: View | None, grid: tuple[int, int]) -> Scores:
        """Scores the patches; called without gradients.

        Args:
            images: ``(B, C, H, W)`` as the student gets them.
            student: its view of them, with what `needs` asked for; None if it asked for nothing.
            grid: ``(gh, gw)`` of the network to be masked, for strategies that need no other.
        """


class Saliency(MaskStrategy):
    r"""The student's attention (MaskedKD, Eq. 2; Table 3 a, b, d).

    .. math:: S_i = \sum_h \mathrm{softmax}_i (q_{h,cls} \cdot k_{h,i} / \sqrt{d})

    Args:
        layer: which attention layer: "last" (the paper's choice, for which a row of the attention suffices), "middle",
            "first", or a block from 0; negative ones count from the end.
        queries: "cls" takes the class token's attention, "patch" the patches' mean attention.
        order: "top" keeps the most salient patches, "bottom" the least salient.

    Raises:
        ValueError: an option that is not one of these.

    Example:
        >>> Saliency(layer="middle").layer
        'middle'
    """

    def __init__(
        self,
        layer: str | int = "last",
        queries: Literal["cls", "patch"] = "cls",
        order: Literal["top", "bottom"] = "top",
    ) -> None:
        if isinstance(layer, bool) or not (isinstance(layer, int) or layer in NAMED_LAYERS):
            raise ValueError(f"layer is {layer!r}; expected 'first', 'middle', 'last' or the number of a block.")
        if queries not in ("cls", "patch"):
            raise ValueError(f"queries is {queries!r}; expected 'cls' or 'patch'.")
        if order not in ("top", "bottom"):
            raise ValueError(f"order is {order!r}; expected 'top' or 'bottom'.")
        self.layer, self.queries, self.order = layer, queries, order

    def needs(self, student: MaskedViT) -> Needs:
        """The saliency of a layer, or the attention of its patches.

        Args:
            student: the network that learns.

        Raises:
            ValueError: the student has no CLS token, no such layer, or an attention there that cannot be read.
        """
        if self.queries == "cls" and student.num_prefix_tokens < 1:
            raise ValueError(
                "student has no CLS token, whose attention chooses the patches; create it with class_token=True, "
                "or use keep_ratio=1 or strategy='random'."
            )
        blocks = blocks_of(student)
        index = self._index(len(blocks))
        if not 0 <= index < len(blocks):
            raise ValueError(f"layer is {self.layer}; the student has the blocks 0 to {len(blocks) - 1}.")
        if self.layer == "last" and self.queries == "cls":
            return Needs(saliency=True)
        reason = why_attention_unreadable(blocks[index])
        if reason is not None:
            raise ValueError(f"the student's layer {self.layer} gives no saliency: {reason}.")
        layers = frozenset({index})
        if self.queries == "patch":
            return Needs(patch_attention=layers)
        return Needs(saliency=True) if index == len(blocks) - 1 else Needs(layer_saliency=layers)

    def _index(self, depth: int) -> int:
        if isinstance(self.layer, int):
            return self.layer + depth if self.layer < 0 else self.layer
        # Block 6 of 12, counted from 1, is the paper's middle.
        return max(0, round(NAMED_LAYERS[self.layer] * depth) - 1)

    def scores(self, images: Tensor, student: View | None, grid: tuple[int, int]) -> Scores:
        """Returns the student's saliency, negated for the least salient.

        Args:
            images: not looked at.
            student: with the attention that `needs` asked for.
            grid: of the masked network, not needed.
        """
        assert student is not None
        index = self._index(student.depth)
        if self.queries == "patch":
            values = student.patch_attention[index]
        elif index < student.depth - 1:
            values = student.layer_saliency[index]
        else:
            assert student.saliency is not None
            values = student.saliency.detach()
        return Scores(values if self.order == "top" else -values, student.grid)


class Random(MaskStrategy):
    """Patches drawn with equal probability, anew for each image (MaskedKD, Table 3 d; He et al., 2022).

    Example:
        >>> import torch
        >>> Random().scores(torch.zeros(2, 3, 8, 8), None, (2, 2)).values.shape
        torch.Size([2, 4])
    """

    def scores(self, images: Tensor, student: View | None, grid: tuple[int, int]) -> Scores:
        """Returns uniform noise from PyTorch's global generator of the images' device.

        Args:
            images: their number and device count.
            student: not looked at.
            grid: of the masked network.
        """
        return Scores(cell_scores("random", len(images), grid, images.device), grid)


class ExternalSaliency(MaskStrategy):
    """The CLS saliency of another ViT, for example one trained with DINO (MaskedKD, Table 3 c).

    The model sees the images as the student does, in eval mode and without gradients; its parameters are left as they
    are, and it is in no state_dict.

    Args:
        model: a timm ViT, or the name of one for ``timm.create_model``.
        weights: with a name, the file of its weights (.safetensors or .pth without code).
        kwargs: with a name, further arguments of ``timm.create_model``, such as ``num_classes: 0`` or ``img_size``.
        include_prefix: the authors' variant of the saliency; that of `fastmkd.MaskedKD` is for the student's.

    Raises:
        ValueError: no weights for a named model, or a model without a CLS token.
        TypeError: a model that `MaskedViT` refuses.

    Example:
        >>> import torch
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
        >>> ExternalSaliency(vit).scores(torch.zeros(1, 3, 32, 32), None, (4, 4)).grid
        (2, 2)
    """

    def __init__(
        self,
        model: str | nn.Module,
        weights: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
        include_prefix: bool = False,
    ) -> None:
        if isinstance(model, str):
            if weights is None:
                raise ValueError(f"model is {model!r} without weights; give the file of its trained weights.")
            model = timm.create_model(model, **(kwargs or {}))
            try:  # older versions of timm would run code in the file unless told not to
                timm.models.load_checkpoint(model, weights, weights_only=True)
            except Exception as error:  # timm, PyTorch and safetensors raise anything
                raise ValueError(f"the weights {weights} do not fit, are damaged, or were refused: {error}") from None
        self.vit = model if isinstance(model, MaskedViT) else MaskedViT(model)
        if self.vit.num_prefix_tokens < 1:
            raise ValueError("model has no CLS token, whose attention is the saliency; choose another.")
        self.include_prefix = include_prefix

    def scores(self, images: Tensor, student: View | None, grid: tuple[int, int]) -> Scores:
        """Runs the model on the images.

        Args:
            images: ``(B, C, H, W)`` of a size the model takes.
            student: not looked at.
            grid: of the masked network, not needed.
        """
        vit = self.vit.eval()
        weight = next(vit.parameters())
        if weight.device != images.device:
            vit.to(images.device)
        _, saliency = vit(images.to(weight.dtype), return_saliency=True, include_prefix=self.include_prefix)
        return Scores(saliency, vit.patch_grid((images.shape[-2], images.shape[-1])))


# By the name that MaskedKD(strategy=...) and a recipe use: the rows of Table 3.
STRATEGIES: dict[str, Callable[[], MaskStrategy]] = {
    "saliency": Saliency,
    "random": Random,
    "bottom": lambda: Saliency(order="bottom"),
    "patch": lambda: Saliency(queries="patch"),
    "first": lambda: Saliency(layer="first"),
    "middle": lambda: Saliency(layer="middle"),
}
