"""`MaskedViT`: a timm ViT that runs on the kept patches only, and tells which patches its CLS token looks at.

What is saved, always exactly: pixels are gathered before the patch projection, so hidden patches are never read or
embedded; the saliency costs one row of the last attention, never the N x N matrix, so fused attention stays on; and
when the head reads only prefix tokens, the last block computes only those rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from timm.models.cait import Cait
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import SaliencyOptions, run_block, run_block_on_rows, run_whole_block, runs_on_rows
from .cait import run_class_blocks
from .embed import Tokens, check_images, embed_all, embed_kept, patch_grid
from .heads import rows_for_head
from .inplace import compiled_attention, may_run_in_place, run_block_in_place
from .maskable import why_not_maskable
from .ragged import RaggedKeep
from .ragged_vit import run_ragged

__all__ = ["MaskedViT"]

_INNER = "model."


class MaskedViT(nn.Module):
    """Wraps a timm ViT so that it can run on a subset of an image's patches.

    `model` stays the same object, untouched, and shares its parameters with the wrapper; ``state_dict()`` of the
    wrapper has exactly the keys of the model, also inside another module. Gradients, autocast, ``torch.compile``,
    gradient checkpointing (``model.set_grad_checkpointing()``), dropout and drop path work as in the model.

    Forward hooks on blocks and their parts fire. The last block, if it is one of timm's ordinary ones and has no hooks,
    is computed in parts, because only some rows of it are needed: hooks on its MLP, norms and projection then see those
    rows. With a hook on it, its attention or its qkv projection, or when it is any other kind of block, it is called
    whole. Hooks on `model` itself do not fire, for its ``forward`` is not used.

    Args:
        model: timm's VisionTransformer (ViT, DeiT, also distilled, DeiT III, CLIP, MAE, DINOv2), Eva (EVA-02, DINOv3,
            other rotary positions) or Cait, or a `fastmkd.nn.spectrogram.SpectrogramTransformer` (AST); any head, any
            number of prefix tokens, rectangular, dynamic or overlapping grids. ``docs/masked_vit.md`` has the table.

    Raises:
        TypeError: patches of `model` cannot be left out (Swin, relative positions, a convolutional stem); says why.

    Example:
        >>> import timm
        >>> vit = MaskedViT(timm.create_model("deit_tiny_patch16_224", depth=1))
        >>> vit(torch.randn(2, 3, 224, 224), keep=torch.tensor([[0, 5, 9], [4, 3, 2]])).shape
        torch.Size([2, 1000])
    """

    model: Any  # timm is not typed

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if isinstance(model, MaskedViT):
            raise TypeError("model is already a MaskedViT; pass it on as it is, or wrap its .model.")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; expected a timm ViT.")
        reason = why_not_maskable(model)
        if reason is not None:
            raise TypeError(f"model cannot be masked: {reason}.")
        self.model = model
        self.training = model.training
        self.register_state_dict_post_hook(_drop_inner_prefix)
        self.register_load_state_dict_pre_hook(_add_inner_prefix)
        self.register_load_state_dict_post_hook(_report_own_keys)

    @property
    def num_prefix_tokens(self) -> int:
        """P, how many tokens stand before the patches (CLS, distillation, registers)."""
        return int(self.model.num_prefix_tokens)

    @property
    def embed_dim(self) -> int:
        """D, the width of a token."""
        return int(self.model.embed_dim)

    @property
    def num_classes(self) -> int:
        """Number of logits; 0 when the model has no classifier."""
        return int(self.model.num_classes)

    def patch_grid(self, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Returns the grid of patches for images of a given size.

        Args:
            size: ``(H, W)`` pixels; None means the model's own image size.

        Returns:
            ``(gh, gw)``; patch i lies in row ``i // gw`` and column ``i % gw``.
        """
        return patch_grid(self.model, tuple(self.model.patch_embed.img_size) if size is None else size)

    def forward(
        self,
        images: Tensor,
        keep: Tensor | RaggedKeep | None = None,
        *,
        return_saliency: bool = False,
        include_prefix: bool = False,
    ) -> Any:
        """Returns the model's output for the kept patches, with the patches' saliency if asked.

        Args:
            images: ``(B, C, H, W)`` floating point, of a size the model takes.
            keep: ``(B, k)`` int64 patch indices, row-major over the grid, any order, no repeats; None keeps all N.
                Prefix tokens always stay. A `fastmkd.nn.RaggedKeep`, for example from `fastmkd.keep_by_mass`, keeps
                another number of patches of each image; VisionTransformer only.
            return_saliency: also return how much the CLS token (the first prefix token) attends to each patch in the
                last attention layer (MaskedKD, Eq. 2).
            include_prefix: the authors' variant of the saliency: softmax over all tokens, mean over heads.

        Returns:
            What the wrapped model returns (logits ``(B, classes)``), or ``(output, saliency)`` with saliency ``(B, N)``
            float32, or ``(B, k)`` in the order of `keep`.

        Raises:
            ValueError: a wrong image size or channel count; `keep` of a wrong shape, or with an index out of range or
                repeated (on a GPU an asynchronous assert); a saliency that the model does not have.
            TypeError: images that are not floating point, or `keep` that is not int64.
        """
        model = self.model
        if isinstance(keep, RaggedKeep):
            if return_saliency:
                raise ValueError(
                    "return_saliency gives a (B, k) tensor, but keep has a number of patches for each image; ask for "
                    "the saliency without keep, or pass a (B, k) tensor."
                )
            return run_ragged(model, images, keep)
        saliency = self._saliency_options(include_prefix) if return_saliency else None
        x, rotations = self._embed(images, keep)
        if isinstance(model, Cait):
            x = self._run_blocks(model.blocks.children(), x, rotations)
            x, scores = run_class_blocks(model, x, saliency)
        else:
            *body, last = model.blocks.children()
            if may_run_in_place(model, x):
                mix = compiled_attention(model, x)
                for block in body:
                    x = run_block_in_place(block, x, mix)
            else:
                x = self._run_blocks(body, x, rotations)
            x, scores = self._run_last_block(last, x, next(rotations), saliency)
        logits = model.forward_head(model.norm(x))
        return (logits, scores) if return_saliency else logits

    def forward_intermediates(
        self, images: Tensor, indices: int | Sequence[int] | None = None, keep: Tensor | None = None
    ) -> list[Tensor]:
        """Returns the outputs of some blocks, before the final norm; runs no block after the last one asked for.

        Args:
            images: ``(B, C, H, W)`` floating point, of a size the model takes.
            indices: blocks as in timm: a sequence of indices from 0 (negative ones count from the end), an int for the
                last n blocks, None for all.
            keep: ``(B, k)`` int64 patch indices as in `forward`; None keeps all N.

        Returns:
            A list of ``(B, P + k, D)``, prefix tokens first and patches in the order of `keep`; blocks in order of
            depth and each once, whatever the order of `indices`, as timm does. CaiT's blocks hold patches alone and
            give ``(B, k, D)``; its class-attention blocks are not counted.

        Raises:
            ValueError: an index that names no block, or images or `keep` as in `forward`.
            TypeError: indices that are not ints, or images or `keep` as in `forward`.
        """
        blocks = list(self.model.blocks.children())
        wanted = _block_indices(indices, len(blocks))
        last = max(wanted)
        x, rotations = self._embed(images, keep)
        in_place = may_run_in_place(self.model, x)
        mix = compiled_attention(self.model, x) if in_place else None
        outputs = []
        for i, block in enumerate(blocks[: last + 1]):
            x = run_block_in_place(block, x, mix) if in_place else self._run_blocks([block], x, rotations)
            if i in wanted:
                outputs.append(x.clone() if in_place and i < last else x)  # the next block would overwrite it
        return outputs

    def _embed(self, images: Tensor, keep: Tensor | None) -> Tokens:
        check_images(self.model, images)
        if keep is None:
            return embed_all(self.model, images)
        if not isinstance(keep, Tensor):
            raise TypeError(f"keep is a {type(keep).__name__}; expected a (B, k) int64 tensor of patch indices.")
        if keep.device != images.device:
            raise ValueError(f"keep is on {keep.device} but images is on {images.device}; move them to one device.")
        return embed_kept(self.model, images, keep)

    def _run_blocks(self, blocks: Iterable[nn.Module], x: Tensor, rotations: Iterator[Tensor | None]) -> Tensor:
        recompute = self.model.grad_checkpointing and torch.is_grad_enabled()
        for block in blocks:
            rope = next(rotations)
            x = checkpoint(run_block, block, x, rope, use_reentrant=False) if recompute else run_block(block, x, rope)
        return x

    def _run_last_block(
        self, block: nn.Module, x: Tensor, rope: Tensor | None, saliency: SaliencyOptions | None
    ) -> tuple[Tensor, Tensor | None]:
        rows = rows_for_head(self.model, x.shape[1])
        if (rows < x.shape[1] or saliency is not None) and runs_on_rows(block):
            return run_block_on_rows(block, x, rows, saliency, rope)
        if saliency is not None:
            return run_whole_block(block, x, saliency, rope)
        return self._run_blocks([block], x, iter([rope])), None

    def _saliency_options(self, include_prefix: bool) -> SaliencyOptions:
        model = self.model
        if model.num_prefix_tokens < 1:
            raise ValueError(
                "return_saliency reads the attention of the CLS token, but the model has no prefix token; create it "
                "with class_token=True."
            )
        drop = getattr(model, "patch_drop", None)
        if drop is not None and drop.training and getattr(drop, "prob", 0.0) > 0:
            raise ValueError(
                "return_saliency needs every patch, but the model drops patches in training (patch_drop_rate > 0); "
                "create it with patch_drop_rate=0."
            )
        return SaliencyOptions(model.num_prefix_tokens, include_prefix)


def _block_indices(indices: int | Sequence[int] | None, depth: int) -> set[int]:
    if indices is None:
        return set(range(depth))
    if isinstance(indices, int) and not isinstance(indices, bool):
        if not 1 <= indices <= depth:
            raise ValueError(f"indices is {indices}, the last n blocks; expected 1 to {depth}.")
        return set(range(depth - indices, depth))
    if not isinstance(indices, Sequence) or not all(isinstance(i, int) and not isinstance(i, bool) for i in indices):
        raise TypeError(f"indices is {indices!r}; expected a list of ints, an int or None.")
    if not indices or not all(-depth <= i < depth for i in indices):
        raise ValueError(f"indices is {list(indices)}; expected at least one index, each from {-depth} to {depth - 1}.")
    return {i % depth for i in indices}


def _drop_inner_prefix(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    inner = prefix + _INNER
    # Every key is put back in turn, so that the order stays that of the model.
    for key in [key for key in state if key.startswith(inner)]:
        state[prefix + key.removeprefix(inner)] = state.pop(key)


def _add_inner_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        state[prefix + _INNER + key.removeprefix(prefix)] = state.pop(key)
    module.__dict__["_load_prefix"] = prefix


def _report_own_keys(module: nn.Module, incompatible: Any) -> None:
    """Names missing and unexpected keys as `state_dict` does, without the inner prefix."""
    prefix = module.__dict__.pop("_load_prefix")
    for keys in incompatible:
        keys[:] = [prefix + k.removeprefix(prefix + _INNER) if k.startswith(prefix + _INNER) else k for k in keys]
