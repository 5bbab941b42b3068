r"""MAE, and DMAE: a masked autoencoder that also learns the features of a teacher (DMAE, Section 3).

.. math:: L = L_{MAE} + \alpha \sum_l \frac{1}{\Omega(z^T_l)} \| \sigma(z^S_l) - z^T_l \|_1

Student and teacher see the same visible patches and nothing else; the teacher stops after the last aligned layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..nn.vit import MaskedViT
from ..ops import masked_patch_loss
from .alignment import Alignment, Layers, check_pair, observe_blocks, pair_layers, prefix_length, term_names
from .base import DistillMethod, DistillOutput, Panel
from .dmae_checks import check_numbers, check_student
from .features import eval_mode
from .mae_decoder import MAEDecoder
from .mae_parts import (
    count_hidden,
    draw_patches,
    normalised,
    paste_patches,
    patch_pixels,
    sincos_positions,
)
from .maskedkd_checks import wrap
from .panels import kept_panel, saliency_panel
from .teacher_call import CompileMode, TeacherCall
from .teacher_input import Norm, TeacherInput
from .views import blocks_of

__all__ = ["DMAE"]


class DMAE(DistillMethod):
    r"""Pre-trains a ViT as a masked autoencoder whose features also follow a teacher's (DMAE, Eq. 1 to 3).

    ``round(mask_ratio * N)`` patches of each image are hidden, drawn anew each time. The student embeds and processes
    the others only; a decoder predicts the pixels of the hidden ones, and the error is their mean square. The student's
    layer at three quarters of its depth, through a small MLP, is compared with the teacher's there, the residual stream
    after that block, in float32. Without a teacher this is MAE.

    Decoder and projection heads are in `heads`; they are dropped after pre-training. What the loss cannot reach of the
    student (its classifier, an attention pool) is frozen until `release`, found by one backward pass when the method is
    made.

    The patch tokens are compared, and of the prefix tokens those that stand first in both networks and are of one kind:
    the class token if both have one, registers only behind equal tokens.

    Args:
        student: timm VisionTransformer, Eva or Cait (or a `MaskedViT` of one); trained in place.
        teacher: the same, with patches as the student's; frozen in place. None is plain MAE.
        mask_ratio: share of hidden patches; the paper goes from 0.75 to 0.99.
        alpha: weight of the alignment.
        student_layer: aligned block of the student, from 1, or several; None is three quarters of the depth.
        teacher_layer: aligned block of the teacher for each; None is the same share of the depth.
        decoder_depth: blocks of the decoder.
        decoder_width: their width.
        head: what is put on the student's features: "mlp2" (hidden width that of the teacher), "linear" or "mlp3"
            (Table 3a).
        decoder_heads: attention heads of a decoder's block.
        normalize_target: predict pixels normalised by mean and deviation of their patch (MAE's norm_pix_loss).
        loss: "l1" or "l2", mean of absolute or squared differences (Table 3c).
        normalize: compare features of unit length, as the public code does.
        student_positions: "sincos" writes MAE's fixed positions to the student's embedding and freezes it; "own" leaves
            and trains what it has.
        generator: source of the masks; None is the global one.
        teacher_device: keeps the teacher on this device; images go there and its answers come back.
        teacher_dtype: runs the teacher under autocast to this dtype (float32 switches autocast off); None leaves it to
            the caller's autocast.
        teacher_compile: runs the teacher through ``torch.compile``, see `TeacherCall`.
        student_norm: ``(mean, std)`` per channel that the images were normalised with; only needed with `teacher_norm`.
        teacher_norm: ``(mean, std)`` that the teacher expects, if it is not the student's.

    Raises:
        ValueError: an argument out of range, a layer that there is not, networks that cut the image differently.
        TypeError: a student or teacher that is not a maskable ViT.

    Example:
        >>> import timm
        >>> make = lambda depth: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=depth)
        >>> method = DMAE(make(4), make(8), decoder_depth=1, decoder_width=64)
        >>> out = method(torch.randn(2, 3, 64, 64))
        >>> out.loss.backward()
        >>> method.layers, sorted(out.terms), out.student_output.shape
        ([(3, 6)], ['align', 'mae'], torch.Size([2, 12, 768]))
    """

    pretrains = True
    _student_vit: MaskedViT
    _teacher_vit: MaskedViT
    _teacher_input: TeacherInput

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        mask_ratio: float = 0.75,
        alpha: float = 1.0,
        student_layer: int | Sequence[int] | None = None,
        teacher_layer: int | Sequence[int] | None = None,
        decoder_depth: int = 8,
        decoder_width: int = 512,
        head: Literal["mlp2", "linear", "mlp3"] = "mlp2",
        *,
        decoder_heads: int = 16,
        normalize_target: bool = False,
        loss: Literal["l1", "l2"] = "l1",
        normalize: bool = False,
        student_positions: Literal["own", "sincos"] = "own",
        generator: torch.Generator | None = None,
        teacher_device: torch.device | str | None = None,
        teacher_dtype: torch.dtype | None = None,
        teacher_compile: bool | CompileMode = False,
        student_norm: Norm | None = None,
        teacher_norm: Norm | None = None,
    ) -> None:
        check_numbers(mask_ratio, alpha, decoder_depth, decoder_width, decoder_heads, head, loss, student_positions)
        teacher_call = TeacherCall(observe_blocks, teacher_dtype, teacher_compile)
        vit = wrap("student", student)
        check_student(vit, student_positions)
        size = image_size(vit)
        if getattr(vit.model.patch_embed, "strict_img_size", True):
            count_hidden(mask_ratio, vit.patch_grid(size))
        wrapped_teacher, teacher_input, layers = _prepare_teacher(
            vit, teacher, student_layer, teacher_layer, student_norm, teacher_norm
        )
        self.student_positions = student_positions  # unreachable_parameters, which the base class calls, asks for it
        super().__init__(student, teacher, teacher_device=teacher_device)
        # Views of student and teacher, kept out of the module tree so that no parameter appears twice.
        self.__dict__["_student_vit"] = vit
        self.__dict__["_teacher_vit"] = wrapped_teacher
        self.mask_ratio, self.alpha, self.layers = float(mask_ratio), float(alpha), layers
        self.normalize_target, self.loss, self.normalize = normalize_target, loss, normalize
        self.generator = generator
        self._teacher_call = teacher_call
        if teacher_input is not None:
            self._teacher_input = teacher_input
        self.patch_size = tuple(vit.model.patch_embed.proj.kernel_size)
        self._make_heads(size, head, decoder_width, decoder_depth, decoder_heads)

    def _make_heads(self, size: tuple[int, int], head: str, width: int, depth: int, num_heads: int) -> None:
        vit, prefix = self._student_vit, prefix_length(self._student_vit)
        weight, grid = vit.model.patch_embed.proj.weight, vit.patch_grid(size)
        if isinstance(vit.model.norm, nn.Identity):
            # A ViT that averages patches has its norm behind the average; MAE's encoder has one for every token.
            self.heads["norm"] = nn.LayerNorm(vit.embed_dim, eps=1e-6)
        self.heads["decoder"] = MAEDecoder(vit.embed_dim, weight[0].numel(), prefix, grid, width, depth, num_heads)
        if self.layers:
            self.heads["project"] = Alignment(vit, self._teacher_vit, self.layers, head, self.loss, self.normalize)
        if self.student_positions == "sincos":
            positions = vit.model.pos_embed  # (1, N, D), or (1, P + N, D)
            fixed = sincos_positions(grid, vit.embed_dim, positions.shape[1] - math.prod(grid))
            with torch.no_grad():
                positions.copy_(fixed[None])
        self.heads.to(device=weight.device, dtype=weight.dtype)

    def unreachable_parameters(self, student: nn.Module) -> Iterable[str]:
        """Names what no gradient reaches: what a student has only to classify, and fixed positions.

        Args:
            student: the student, as passed.
        """
        vit = wrap("student", student)
        reached = _reached(vit)
        if self.student_positions == "sincos":
            reached.discard(id(vit.model.pos_embed))
        return [name for name, parameter in student.named_parameters() if id(parameter) not in reached]

    def forward(self, images: Tensor, targets: Any = None) -> DistillOutput:
        """Hides patches, runs both networks on the others, and returns the loss.

        Args:
            images: ``(B, C, H, W)`` floating point.
            targets: not looked at.

        Returns:
            `DistillOutput` with the terms ``mae`` and, with a teacher, ``align`` (sum over layers) and with several
            layers ``align.<student's layer>`` of each (``align.<student's>-<teacher's>`` where one of the student's
            learns from several); `student_output` is the prediction ``(B, m, ph * pw * C)`` for the hidden patches,
            ascending, pixels in the order row, column, channel.

        Raises:
            ValueError: images of a size that the networks do not take, or of which no patch would stay.
            TypeError: images that are not floating point.
        """
        keep, hidden, grid = self.draw(images)
        taught = self._ask_teacher(images, keep)
        outputs, tokens = self._encode(images, keep)
        prediction = self._decoder(tokens, keep, hidden, grid)
        mae = masked_patch_loss(prediction, images, hidden, self.patch_size, self.normalize_target)
        loss, terms = mae, {"mae": mae}
        if self.layers:
            errors = [error.mean() for error in self.heads["project"](outputs, taught)]
            terms["align"] = torch.stack(errors).sum()
            loss = mae + self.alpha * terms["align"]
            if len(errors) > 1:
                terms |= dict(zip(term_names(self.layers), errors, strict=True))
        return DistillOutput(loss, {name: term.detach() for name, term in terms.items()}, prediction)

    def draw(self, images: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Draws which patches are visible.

        Args:
            images: ``(B, C, H, W)``.

        Returns:
            ``(B, k)`` visible and ``(B, m)`` hidden patches, ascending, and the grid ``(gh, gw)``.

        Raises:
            ValueError: as `forward`.
        """
        size = (images.shape[-2], images.shape[-1])
        grid = self._student_vit.patch_grid(size)
        if (grid[0] * self.patch_size[0], grid[1] * self.patch_size[1]) != size:
            raise ValueError(
                f"images is {size[0]} x {size[1]} pixels, which patches of {self.patch_size[0]} x {self.patch_size[1]} "
                "do not tile; resize or crop them."
            )
        if self.layers and self._teacher_input.grid(size) != grid:
            raise ValueError(
                f"images of {size[0]} x {size[1]} pixels give the student {grid[0]} x {grid[1]} patches and the "
                f"teacher {' x '.join(map(str, self._teacher_input.grid(size)))}; create the teacher for images of "
                "that size, or with dynamic_img_size=True."
            )
        keep, hidden = draw_patches(len(images), grid, self.mask_ratio, images.device, self.generator)
        return keep, hidden, grid

    @torch.no_grad()
    def pictures(self, images: Tensor) -> list[Panel]:
        """Shows what is seen, what is made of it, and where the student is far from the teacher.

        Args:
            images: ``(B, C, H, W)`` as in `forward`.

        Returns:
            Panels ``input``, ``masked input``, ``reconstruction`` (the visible patches as they are) and, with a
            teacher, ``distance to teacher`` (of the last aligned layer, stretched to 0..1 per image; hidden is 0).
        """
        size = (images.shape[-2], images.shape[-1])
        keep, hidden, grid = self.draw(images)
        taught = self._ask_teacher(images, keep)
        outputs, tokens = self._encode(images, keep)
        pixels = self._decoder(tokens, keep, hidden, grid).to(images.dtype)
        if self.normalize_target:
            mean, std = normalised(patch_pixels(images, hidden, self.patch_size))
            pixels = pixels * std + mean
        panels = [
            *super().pictures(images),
            kept_panel(keep, grid, size)._replace(title="masked input"),
            Panel("reconstruction", paste_patches(images, hidden, pixels, self.patch_size), "image"),
        ]
        if self.layers:
            far = self.heads["project"](outputs, taught)[-1].mean(-1)[:, -keep.shape[1] :]  # (B, k)
            nowhere = far.amin(1, keepdim=True).expand(-1, math.prod(grid))
            panels.append(
                saliency_panel(nowhere.scatter(1, keep, far), grid, size)._replace(title="distance to teacher")
            )
        return panels

    @property
    def _decoder(self) -> nn.Module:
        return self.heads["decoder"]

    def _ask_teacher(self, images: Tensor, keep: Tensor) -> dict[int, Tensor]:
        """The teacher's aligned blocks by index, without gradients."""
        if not self.layers:
            return {}
        blocks = self.heads["project"].teacher_blocks
        return self._teacher_call(self._teacher_vit, self._teacher_input(images), keep, blocks).tokens

    def _encode(self, images: Tensor, keep: Tensor) -> tuple[dict[int, Tensor], Tensor]:
        """One pass of the student: its aligned blocks by index, and the tokens ``(B, P + k, D)`` for the decoder."""
        last = len(blocks_of(self._student_vit)) - 1
        blocks = (*(layer - 1 for layer, _ in self.layers), last)
        outputs = observe_blocks(self._student_vit, images, keep, blocks).tokens
        if "norm" in self.heads:
            return outputs, self.heads["norm"](outputs[last])
        return outputs, self._student_vit.model.norm(outputs[last])


def image_size(vit: MaskedViT) -> tuple[int, int]:
    """Returns the pixels ``(H, W)`` that a ViT was made for; those of one patch if it does not say.

    Args:
        vit: the network.
    """
    embed = vit.model.patch_embed
    return tuple(embed.img_size or embed.proj.kernel_size)


def _prepare_teacher(
    student: MaskedViT,
    teacher: nn.Module | None,
    student_layer: Layers,
    teacher_layer: Layers,
    student_norm: Norm | None,
    teacher_norm: Norm | None,
) -> tuple[MaskedViT | None, TeacherInput | None, list[tuple[int, int]]]:
    """The teacher as a `MaskedViT`, what turns images into its own, and the pairs of layers; nothing without one."""
    if teacher is None:
        for name, value in (("student_layer", student_layer), ("teacher_layer", teacher_layer)):
            if value is not None:
                raise ValueError(f"{name} is {value} but there is no teacher to align with; leave it out.")
        return None, None, []
    vit = wrap("teacher", teacher)
    check_pair(student, vit)
    layers = pair_layers(student_layer, teacher_layer, len(blocks_of(student)), len(blocks_of(vit)))
    return vit, TeacherInput(vit, student_norm, teacher_norm), layers


@torch.enable_grad()
def _reached(vit: MaskedViT) -> set[int]:
    """Identities of the parameters that take part in the tokens after the last norm, asked of one visible patch."""
    parameters = [parameter for parameter in vit.parameters() if parameter.requires_grad]
    weight = vit.model.patch_embed.proj.weight
    images = torch.zeros(1, weight.shape[1], *image_size(vit), device=weight.device, dtype=weight.dtype)
    keep = torch.zeros(1, 1, dtype=torch.int64, device=weight.device)
    with eval_mode(vit.model):
        (tokens,) = vit.forward_intermediates(images, [len(blocks_of(vit)) - 1], keep)
        out = vit.model.norm(tokens)
    if not out.requires_grad:
        return set()
    found = torch.autograd.grad(out.sum(), parameters, allow_unused=True)
    return {id(p) for p, gradient in zip(parameters, found, strict=True) if gradient is not None}
