"""What one forward pass of a ViT lets a distillation loss and a mask strategy see.

A loss or a strategy says in `Needs` what it reads; `observe` runs the network once and collects exactly that. Nothing
is recorded, and no fused path is left, for what nobody asked for.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.ragged import RaggedKeep
from ..nn.vit import MaskedViT
from ..nn.vit_attention import cls_attention_logits, layer_saliency, patch_attention
from .base import split_heads

__all__ = ["Needs", "View", "blocks_of", "classifier_of", "join", "observe", "on_common_patches"]


@dataclass(frozen=True)
class Needs:
    """What is to be recorded in a forward pass; ``a | b`` is what both need.

    Attributes:
        blocks: indices from 0 of blocks whose output is wanted.
        attention: blocks whose CLS attention is wanted, in every head.
        patch_attention: blocks whose mean patch-to-patch attention is wanted.
        saliency: the CLS saliency of the last block (MaskedKD, Eq. 2).
        features: the input of the classifier.
        layer_saliency: blocks whose CLS saliency is wanted, for blocks before the last.

    Example:
        >>> both = Needs(saliency=True) | Needs(blocks=frozenset({3}))
        >>> both.blocks, both.saliency, both.features
        (frozenset({3}), True, False)
    """

    blocks: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()
    patch_attention: frozenset[int] = frozenset()
    saliency: bool = False
    features: bool = False
    layer_saliency: frozenset[int] = frozenset()

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            self.blocks | other.blocks,
            self.attention | other.attention,
            self.patch_attention | other.patch_attention,
            self.saliency or other.saliency,
            self.features or other.features,
            self.layer_saliency | other.layer_saliency,
        )


@dataclass(frozen=True)
class View:
    """What a network made of a batch, n patches of which it saw.

    Attributes:
        heads: logits ``(B, K)`` of each head; two for a distilled DeiT in training mode.
        logits: ``(B, K)`` that take part in the distillation.
        grid: ``(gh, gw)``, all N patches of the image.
        depth: number of blocks.
        keep: ``(B, n)`` the patches it saw, or another number of each image; None for all.
        saliency: ``(B, n)`` or None.
        features: ``(B, D)`` input of the classifier, or None.
        blocks: output of a block for the patches, ``(B, n, D)``, by the block's index.
        attention: CLS attention before the softmax, ``(B, H, n)``, by the block's index.
        patch_attention: mean patch-to-patch attention ``(B, n)``, by the block's index.
        layer_saliency: CLS saliency ``(B, n)`` of blocks before the last, by the block's index.
    """

    heads: tuple[Tensor, ...]
    logits: Tensor
    grid: tuple[int, int]
    depth: int
    keep: Tensor | RaggedKeep | None = None
    saliency: Tensor | None = None
    features: Tensor | None = None
    blocks: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)
    patch_attention: dict[int, Tensor] = field(default_factory=dict)
    layer_saliency: dict[int, Tensor] = field(default_factory=dict)

    def map(self, fn: Callable[[Tensor], Tensor]) -> View:
        """Applies a function to every tensor that a loss may read.

        Args:
            fn: for example a move to another device.
        """
        of = lambda tensors: {i: fn(tensor) for i, tensor in tensors.items()}  # noqa: E731
        return View(
            tuple(map(fn, self.heads)),
            fn(self.logits),
            self.grid,
            self.depth,
            fn(self.keep) if isinstance(self.keep, Tensor) else self.keep,
            None if self.saliency is None else fn(self.saliency),
            None if self.features is None else fn(self.features),
            of(self.blocks),
            of(self.attention),
            of(self.patch_attention),
            of(self.layer_saliency),
        )

    def is_finite(self) -> Tensor:
        """Tells, as a boolean scalar on the device, whether logits and everything recorded are finite."""
        recorded = (*self.blocks.values(), *self.attention.values())
        return torch.stack([tensor.isfinite().all() for tensor in (self.logits, *recorded)]).all()


def join(views: Sequence[View]) -> View:
    """Returns what a network made of consecutive parts of a batch as one view of the whole.

    Args:
        views: of one network, with the same things recorded; at least one.

    Example:
        >>> parts = [View((x,), x, (1, 1), 2) for x in (torch.zeros(3, 5), torch.ones(1, 5))]
        >>> join(parts).logits.shape
        torch.Size([4, 5])
    """
    if len(views) == 1:
        return views[0]
    rows = zip(*map(_tensors, views), strict=True)
    whole = views[0].map(lambda _: torch.cat(next(rows)))
    ragged = [view.keep for view in views if isinstance(view.keep, RaggedKeep)]
    return replace(whole, keep=RaggedKeep.cat(ragged)) if ragged else whole


def _tensors(view: View) -> list[Tensor]:
    """What `View.map` goes through, in its order."""
    found: list[Tensor] = []

    def take(x: Tensor) -> Tensor:
        found.append(x)
        return x

    view.map(take)
    return found


def observe(
    vit: MaskedViT, images: Tensor, keep: Tensor | RaggedKeep | None, needs: Needs, include_prefix: bool = False
) -> View:
    """Runs a ViT once and records what is needed.

    Block outputs and attention are read through forward hooks that live for this call, so that they come from the
    very tensors of the forward pass, gradients included, in every kind of ViT that `MaskedViT` takes.

    Args:
        vit: the network.
        images: ``(B, C, H, W)``.
        keep: ``(B, k)`` patches it gets to see, or a `RaggedKeep` if only its logits are needed; None for all.
        needs: what to record.
        include_prefix: the authors' variant of the saliency, of the patches' attention too.

    Example:
        >>> import timm
        >>> vit = MaskedViT(timm.create_model("deit_tiny_patch16_224", img_size=32, depth=2, num_classes=5))
        >>> view = observe(vit, torch.zeros(1, 3, 32, 32), torch.tensor([[0, 3]]), Needs(blocks=frozenset({1})))
        >>> view.blocks[1].shape, view.logits.shape
        (torch.Size([1, 2, 192]), torch.Size([1, 5]))
    """
    grid = vit.patch_grid((images.shape[-2], images.shape[-1]))
    patches = keep.shape[1] if isinstance(keep, Tensor) else math.prod(grid)
    recorder = _Recorder(vit, needs, patches, include_prefix)
    with recorder.hooks():
        if needs.saliency:
            output, saliency = vit(images, keep, return_saliency=True, include_prefix=include_prefix)
        else:
            output, saliency = vit(images, keep), None
    heads = split_heads(output)
    mean = torch.stack(heads).mean(0) if len(heads) > 1 else heads[0]
    recorder.finish()
    return View(
        heads, mean, grid, len(blocks_of(vit)), keep, saliency, recorder.features,
        recorder.blocks, recorder.attention, recorder.patch_attention, recorder.layer_saliency,
    )  # fmt: skip


class _Recorder:
    def __init__(self, vit: MaskedViT, needs: Needs, patches: int, include_prefix: bool) -> None:
        self.vit, self.needs, self.patches, self.include_prefix = vit, needs, patches, include_prefix
        self.features: Tensor | None = None
        self.blocks: dict[int, Tensor] = {}
        self.attention: dict[int, Tensor] = {}
        self.patch_attention: dict[int, Tensor] = {}
        self.layer_saliency: dict[int, Tensor] = {}
        self._qkv: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        blocks = blocks_of(self.vit)
        with contextlib.ExitStack() as stack:
            for i in self.needs.blocks:
                stack.callback(blocks[i].register_forward_hook(self._read_block(i)).remove)
            for i in self.needs.attention | self.needs.patch_attention | self.needs.layer_saliency:
                stack.callback(blocks[i].attn.qkv.register_forward_hook(self._read_qkv(i)).remove)
            if self.needs.features:
                classifier = classifier_of(self.vit)[0]
                stack.callback(classifier.register_forward_pre_hook(self._read_features).remove)
            yield

    def _read_block(self, index: int) -> Callable[..., None]:
        def read(_module: nn.Module, _args: Any, x: Tensor) -> None:
            self.blocks[index] = x[:, -self.patches :]  # prefix tokens, if the block has any, come first

        return read

    def _read_qkv(self, index: int) -> Callable[..., None]:
        def read(_module: nn.Module, _args: Any, qkv: Tensor) -> None:
            # Without gradients nothing else holds the projection, so that of the block before is read and dropped now.
            # With gradients autograd holds it anyway, and a checkpointed block must compute nothing more than when it
            # is run again.
            if not torch.is_grad_enabled():
                self.finish()
            self._qkv[index] = qkv

        return read

    def _read_features(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.features = args[0]

    def finish(self) -> None:
        """Turns the projections into attention and drops them."""
        blocks = blocks_of(self.vit)
        for i, qkv in self._qkv.items():
            if i in self.needs.attention:
                self.attention[i] = cls_attention_logits(blocks[i].attn, qkv, self.patches)
            seen = (blocks[i].attn, qkv, self.patches, self.include_prefix)
            with torch.no_grad():  # these choose patches, and no gradient flows through a choice
                if i in self.needs.patch_attention:
                    self.patch_attention[i] = patch_attention(*seen)
                if i in self.needs.layer_saliency:
                    self.layer_saliency[i] = layer_saliency(*seen)
        self._qkv.clear()


def blocks_of(vit: MaskedViT) -> list[Any]:
    """Returns the blocks that patches go through, in order of depth.

    Args:
        vit: the network.
    """
    return list(vit.model.blocks.children())


def classifier_of(network: nn.Module) -> tuple[nn.Module, ...]:
    """Returns the last layer of each head.

    Args:
        network: a timm network, or a `MaskedViT` of one.

    Example:
        >>> import timm
        >>> classifier_of(timm.create_model("deit_tiny_patch16_224", depth=1))
        (Linear(in_features=192, out_features=1000, bias=True),)
    """
    model: Any = network.model if isinstance(network, MaskedViT) else network
    layers = model.get_classifier()
    return tuple(layers) if isinstance(layers, tuple | list) else (layers,)


def on_common_patches(student: Tensor, teacher: Tensor, s: View, t: View) -> tuple[Tensor, Tensor]:
    """Returns the rows of both for the patches that both saw.

    The network that saw everything is read at the patches of the one that did not; if they cut the image differently,
    its map is first resized bilinearly to the other's grid (MaskedKD, footnote 1, does so with the saliency).

    Args:
        student: ``(B, n_s, D_s)``, a row for each patch the student saw.
        teacher: ``(B, n_t, D_t)``, likewise.
        s: the student's view.
        t: the teacher's view.

    Returns:
        ``(B, k, D_s)`` and ``(B, k, D_t)``, row by row of the same patch.
    """
    assert not isinstance(s.keep, RaggedKeep)
    assert not isinstance(t.keep, RaggedKeep)
    if s.keep is None:
        return _read_at(student, s.grid, t.grid, t.keep), teacher
    return student, _read_at(teacher, t.grid, s.grid, s.keep)


def _read_at(x: Tensor, grid: tuple[int, int], target: tuple[int, int], keep: Tensor | None) -> Tensor:
    """``(B, gh * gw, D)`` of all patches -> ``(B, k, D)`` at the patches `keep` of the target grid."""
    if grid != target:
        x = F.interpolate(x.mT.unflatten(-1, grid), target, mode="bilinear", align_corners=False).flatten(2).mT
    return x if keep is None else x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[-1]))
