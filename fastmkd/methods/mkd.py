r"""MKD: a student that sees a part of the image rebuilds the teacher's feature pyramid (MKD, ICCV 2023).

.. math:: L = L_{task} + \lambda L_{feat} + \gamma L_{global}

The student's backbone is a masked encoder, an adaptive decoder for each level fills in what it could not see, and the
teacher, who saw everything, says what should stand there. Masks are drawn anew for every call.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.masks import block_mask, grid_mask, random_mask
from .base import DistillOutput, Panel
from .dense_checks import check_detection_batch
from .dense_method import DenseMethod, LevelShape
from .mkd_checks import check_numbers, check_patches
from .mkd_decoder import AdaptiveDecoder
from .mkd_losses import Relation, recover, relation_loss
from .mkd_masking import MaskedBackbone, Sight, coarser
from .mkd_pictures import mkd_pictures
from .task_loss import task_loss
from .teacher_call import CompileMode

__all__ = ["MKD"]

_MASKS = {"random": random_mask, "grid": grid_mask, "block": block_mask}


class MKD(DenseMethod):
    r"""Masked knowledge distillation of detectors, segmenters and classifiers.

    The student may be a torchvision detector with a feature pyramid (levels: those of its FPN), a segmenter of
    segmentation-models-pytorch or torchvision, or a classifier (level: the last map of the encoder); see
    `fastmkd.methods.dense_networks.form_of`. Its backbone is converted by `fastmkd.convert_cnn` until `release`, which
    changes neither parameters nor names nor what an ordinary call gives.

    The paper's weights are 3 and 3e-6 for one-stage detectors (the default), 3 and 3e-7 for two-stage ones, 7 and 0 for
    segmentation; it trains detectors with SGD for 24 epochs and the last two with a learning rate of 0.001.

    Args:
        student: the network to train.
        teacher: a network of the same task; frozen in place.
        mask_ratio: share of the cells that are hidden.
        weight: lambda, of the feature loss.
        global_weight: gamma, of the relation loss.
        logits_weight: of CWD's loss on maps of class logits (Table 5's starred rows); anything but 0 runs the teacher's
            head for them.
        layers: the levels: the teacher's layer by the student's, see `fastmkd.methods.dense_networks`; None takes the
            usual ones.
        mask: how cells are drawn: "random", "grid" or "block" (Table 4g).
        mask_patch: pixels of a cell, 16, 32 or 64 (Table 4a).
        masked_conv: False hides pixels of the image and leaves the convolutions as they are (Table 4f).
        stats: of batch norms over "visible" positions, or over "all" with hidden ones counted as zeros.
        sam: pixels of a token, 16, 32 or 64; False leaves each level at its own resolution (Table 4b).
        decoder_depth: blocks of a decoder (Table 4e).
        decoder_width: of its tokens.
        decoder_heads: attention heads of a block.
        mlp_ratio: width of a block's MLP, in widths.
        logits_temperature: tau of CWD's loss.
        inherit: start from the teacher's neck and head, where shapes agree.
        epochs: of the whole training; the last `last_epochs` of them go without teacher. None never does. Needs
            `set_epoch`. A recipe that leaves it out has its schedule's.
        last_epochs: how many.
        last_mask_ratio: share of hidden cells when they begin; it falls to 0 by a cosine.
        backbone: the module to be masked; None takes the usual one.
        image_size: of the image on which shapes are learnt when the method is made.
        generator: source of the masks; None is the global one.
        teacher_device: keeps the teacher on this device; images go there and its answers come back.
        teacher_dtype: runs the teacher under autocast to this dtype; None leaves it to the caller's autocast.
        teacher_compile: runs the teacher through ``torch.compile``, see `TeacherCall`.

    Attributes:
        levels: a `fastmkd.methods.dense_method.LevelShape` for each level.
        frozen_parts: names of the largest parts of the student that came frozen and stay so.

    Raises:
        ValueError: an argument out of range, networks or levels that do not belong together.
        TypeError: a network or layers of the wrong type, or a backbone with a layer that has no masked form.

    Example:
        >>> import timm
        >>> student = timm.create_model("resnet18", num_classes=10)
        >>> teacher = timm.create_model("resnet34", num_classes=10)
        >>> method = MKD(student, teacher, mask_ratio=0.25, image_size=64)
        >>> out = method(torch.randn(2, 3, 64, 64), torch.tensor([1, 2]))
        >>> out.loss.backward()
        >>> sorted(out.terms), [level.stride for level in method.levels]
        (['ce', 'feat', 'global'], [32])
    """

    lengths = MappingProxyType({"epochs": "epochs", "last_epochs": "last_epochs"})

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        mask_ratio: float = 0.1,
        weight: float = 3.0,
        global_weight: float = 3e-6,
        logits_weight: float = 0.0,
        layers: Mapping[str, str] | None = None,
        *,
        mask: Literal["random", "grid", "block"] = "random",
        mask_patch: int = 32,
        masked_conv: bool = True,
        stats: Literal["visible", "all"] = "visible",
        sam: int | Literal[False] = 32,
        decoder_depth: int = 4,
        decoder_width: int = 256,
        decoder_heads: int = 8,
        mlp_ratio: float = 8.0,
        logits_temperature: float = 4.0,
        inherit: bool = False,
        epochs: int | None = None,
        last_epochs: int = 2,
        last_mask_ratio: float = 0.2,
        backbone: str | None = None,
        image_size: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        teacher_device: torch.device | str | None = None,
        teacher_dtype: torch.dtype | None = None,
        teacher_compile: bool | CompileMode = False,
    ) -> None:
        check_numbers(
            mask_ratio=mask_ratio, last_mask_ratio=last_mask_ratio, weight=weight, global_weight=global_weight,
            logits_weight=logits_weight, logits_temperature=logits_temperature, mlp_ratio=mlp_ratio,
            mask_patch=mask_patch, decoder_depth=decoder_depth, decoder_width=decoder_width,
            decoder_heads=decoder_heads, last_epochs=last_epochs, epochs=epochs, mask=mask, stats=stats, sam=sam,
        )  # fmt: skip
        super().__init__(student, teacher, layers, image_size, logits_weight > 0, teacher_device, teacher_dtype,
                         teacher_compile, backbone)  # fmt: skip
        self.mask_ratio, self.last_mask_ratio = float(mask_ratio), float(last_mask_ratio)
        self.weight, self.global_weight, self.logits_weight = float(weight), float(global_weight), float(logits_weight)
        self.mask, self.mask_patch, self.logits_temperature = mask, mask_patch, float(logits_temperature)
        self.sam = 32 if sam is True else sam
        self.epochs, self.last_epochs, self.epoch = epochs, last_epochs, 0.0
        self.generator = generator
        try:
            check_patches(self.levels, mask_patch, self.sam)
            part = student.get_submodule(self.form.part)
            self._backbone = MaskedBackbone(part, mask_patch, self.part_stride, stats, masked_conv)
            if inherit:
                self.inherit()
        except (TypeError, ValueError):
            self.release()
            raise
        self._make_heads(decoder_width, decoder_depth, decoder_heads, mlp_ratio)

    def _make_heads(self, width: int, depth: int, heads: int, mlp_ratio: float) -> None:
        """A decoder and a pair of context blocks for each level, where the loss asks for them."""
        weight = next(self.student.parameters())
        if self.weight or self.global_weight:
            self.heads["decoders"] = nn.ModuleList(
                AdaptiveDecoder(
                    level.student_channels,
                    level.teacher_channels,
                    max(1, self._token(level) // level.stride),
                    self._cell(level) is not None,
                    width,
                    depth,
                    heads,
                    mlp_ratio,
                )
                for level in self.levels
            )
        if self.global_weight:
            self.heads["relations"] = nn.ModuleList(Relation(level.teacher_channels) for level in self.levels)
        self.heads.to(device=weight.device, dtype=weight.dtype)

    def release(self) -> nn.Module:
        """Gives both networks back, the backbone with its ordinary layers."""
        if "_backbone" in self.__dict__:
            self._backbone.release()
        return super().release()

    def set_epoch(self, epoch: float) -> None:
        """Tells the method where in the training it is; with `epochs` given, the last go without teacher.

        Args:
            epoch: from 0; 22.5 is half-way through the 23rd, for a mask ratio that falls from step to step.
        """
        self.epoch = float(epoch)

    @property
    def teacherless(self) -> bool:
        """Whether the last epochs have begun."""
        return self.epochs is not None and self.epoch >= self.epochs - self.last_epochs

    @property
    def ratio(self) -> float:
        """Share of hidden cells now."""
        if self.epochs is None or not self.teacherless:
            return self.mask_ratio
        gone = min(1.0, (self.epoch - (self.epochs - self.last_epochs)) / self.last_epochs)
        return self.last_mask_ratio * 0.5 * (1 + math.cos(math.pi * gone))

    def forward(self, images: Any, targets: Any) -> DistillOutput:
        """Runs the student on what a mask leaves, the teacher on everything, and returns the loss.

        Args:
            images: of a detector a list of ``(3, H, W)`` in [0, 1], else ``(B, C, H, W)``; floating point.
            targets: of a detector a list of dicts with ``boxes`` and ``labels``, of a segmenter ``(B, H, W)`` int64
                with 255 for pixels that do not count, of a classifier class indices or soft labels.

        Returns:
            `DistillOutput` with the terms of the task, ``feat`` and ``global`` (sums over levels) and ``logits`` where
            they have a weight; `student_output` is a detector's losses, else logits.

        Raises:
            ValueError: images or targets of a wrong size or with wrong values, a detector in eval mode.
            TypeError: images or targets of the wrong type.
        """
        if self.form.task == "detection":
            check_detection_batch(self.student, images, targets)
        with self._backbone.masking(self.draw) as sight:
            seen = self.watch_student(images, targets, sight)
        loss, task, prediction = task_loss(seen.output, targets)
        terms = dict(task)
        wanted = self.weight or self.global_weight or self.logits_weight
        if wanted and not self.teacherless:
            taught = self.ask_teacher(seen.images)
            if self.weight or self.global_weight:
                feat, relation = self._level_losses(seen.levels.maps, taught.maps, sight)
                terms["feat"], loss = feat, loss + self.weight * feat
                if relation is not None:
                    terms["global"], loss = relation, loss + self.global_weight * relation
            if self.logits_weight:
                terms["logits"] = self.logit_error(seen.levels, taught, self.logits_temperature)
                loss = loss + self.logits_weight * terms["logits"]
        elif dist.is_available() and dist.is_initialized():
            # Plain DDP waits for a gradient of every parameter.
            loss = loss + 0.0 * sum((p.sum() for p in self.heads.parameters()), loss.new_zeros(()))
        return DistillOutput(loss, {name: term.detach() for name, term in terms.items()}, prediction)

    def draw(self, batch: int, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, int] | None:
        """Draws a mask.

        Args:
            batch: number of images.
            grid: ``(gh, gw)`` cells.
            device: of the mask.

        Returns:
            ``(B, gh, gw)`` bool and how many cells are visible, or None where none is hidden.
        """
        cells = math.prod(grid)
        hidden = min(round(self.ratio * cells), cells - 1)
        if not hidden:
            if self.ratio == self.mask_ratio > 0:
                warnings.warn(
                    f"a share of {self.ratio} of {grid[0]} x {grid[1]} cells hides none; take larger images or a "
                    f"smaller mask_patch than {self.mask_patch}.",
                    stacklevel=2,
                )
            return None
        return _MASKS[self.mask](batch, grid, self.ratio, device, self.generator), batch * (cells - hidden)

    def _level_losses(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], sight: Sight
    ) -> tuple[Tensor, Tensor | None]:
        """Sums over levels of both errors; L_global is None without a weight."""
        decoders: Any = self.heads["decoders"]
        relations: Any = self.heads["relations"] if self.global_weight else [None] * len(self.levels)
        recovered, positions = [], []
        for level, decoder, relation in zip(self.levels, decoders, relations, strict=True):
            visible, target = self.visible_tokens(sight, level), teacher[level.teacher]
            rows = decoder(student[level.name], visible)
            recovered.append(recover(decoder, rows, (visible.shape[1], visible.shape[2]), target, relation))
            positions.append(target.shape[2] * target.shape[3])
        feat = torch.stack([one.error for one in recovered]).sum()
        return feat, relation_loss(relations, recovered, positions) if self.global_weight else None

    def visible_tokens(self, sight: Sight, level: LevelShape) -> Tensor:
        """Returns ``(B, gh, gw)`` bool, which tokens of a level stand for something visible.

        Args:
            sight: what the backbone saw.
            level: which level.
        """
        token, (height, width) = self._token(level), sight.images.shape[2:]
        grid = (-(-height // token), -(-width // token))
        if sight.visible is None:
            return torch.ones(len(sight.images), *grid, dtype=torch.bool, device=sight.images.device)
        cell = self._cell(level) or self.mask_patch
        visible = coarser(sight.visible, cell // self.mask_patch)
        if token > cell:
            factor = token // cell
            whole = F.pad(visible, (0, -visible.shape[2] % factor, 0, -visible.shape[1] % factor), value=True)
            visible = coarser(whole, factor)
        else:
            visible = visible.repeat_interleave(cell // token, 1).repeat_interleave(cell // token, 2)
        return visible[:, : grid[0], : grid[1]]

    def _cell(self, level: LevelShape) -> int | None:
        """Pixels of a level's hidden cells; None behind the masked part, where no position stands for one cell."""
        if level.stride <= self.mask_patch:
            return self.mask_patch
        return level.stride if level.stride <= self.part_stride else None

    def _token(self, level: LevelShape) -> int:
        """Pixels of a token of a level."""
        return self.sam or level.stride

    def pictures(self, images: Any, level: str | None = None) -> list[Panel]:
        """Shows what is seen, both networks' features, how far they are apart, and where the decoder looks.

        Args:
            images: as in `forward`.
            level: which of the student's levels to show; None is the finest.

        Returns:
            Panels ``input``, ``masked input``, ``teacher features``, ``student features``, ``restored features`` (mean
            absolute values, Fig. 1), ``distance to teacher`` (in visible areas, Fig. 2) and ``decoder attention`` (of
            the token in the middle, Fig. 6).

        Raises:
            ValueError: a level that there is not.
        """
        return mkd_pictures(self, images, level)

    def extra_repr(self) -> str:
        """Returns what the printed module says of itself."""
        levels = ", ".join(f"{level.name} (1/{level.stride})" for level in self.levels)
        frozen = ", ".join(self.frozen_parts) or "nothing"
        return f"{self.form.task}, masked {self.form.part or 'network'!r}, levels {levels}, came frozen: {frozen}"
