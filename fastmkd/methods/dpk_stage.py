"""One stage of DPK: cut both maps into tokens, encode, stitch, decode, back to the teacher's shape (Section 2.2)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.masks import cell_scores
from ..ops import stitch_tokens
from ..ops.autocast import autocast_dtype
from .dpk_transforms import TRANSFORMS, Blocks

__all__ = ["DPKStage", "draw_from_teacher", "least_patch_size"]

Prior = Literal["teacher", "zero", "learnable"]
Target = Literal["full", "non-masked"]
MaskKind = Literal["random", "block", "grid"]

MOST_TOKENS = 49


class DPKStage(nn.Module):
    """Predicts a teacher's feature map from the student's map in which some patches are the teacher's (DPK, Eq. 4).

    Maps whose sides are no multiples of `patch_size` are padded with zeros below and to the right, and the prediction
    is cut. The student's map is first resized bilinearly if its size is not the teacher's. One position embedding is
    added to the tokens before the encoders and again after stitching; Table 17's parameter counts leave room for one.
    On another grid than `grid` it is interpolated.

    Args:
        student_channels: C_S.
        teacher_channels: C_T.
        map_size: ``(h, w)`` of the teacher's map.
        patch_size: k.
        width: d.
        encoder_depth: blocks (or convolutions) of each encoder.
        decoder_depth: blocks (or convolutions) of the decoder.
        transform: row of Table 8: "encoder-decoder", "mlp-decoder", "conv" or "1x1".
        prior: row of Table 7, what stands where the student is hidden: "teacher" for the teacher's tokens, "zero", or
            "learnable" for one learned token.

    Raises:
        ValueError: an unknown name or a width that its attention heads do not divide.

    Example:
        >>> stage = DPKStage(4, 6, (6, 6), patch_size=2, width=8, encoder_depth=1, decoder_depth=1)
        >>> from_teacher = draw_from_teacher("random", 2, stage.grid((6, 6)), torch.tensor(0.5))
        >>> stage(torch.randn(2, 4, 6, 6), torch.randn(2, 6, 6, 6), from_teacher).shape
        torch.Size([2, 6, 6, 6])
    """

    position: Tensor | None
    mask_token: Tensor | None

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        map_size: tuple[int, int],
        patch_size: int,
        width: int = 512,
        encoder_depth: int = 6,
        decoder_depth: int = 6,
        transform: str = "encoder-decoder",
        prior: Prior = "teacher",
    ) -> None:
        super().__init__()
        if transform not in TRANSFORMS:
            raise ValueError(f"transform is {transform!r}; available are {', '.join(map(repr, TRANSFORMS))}.")
        if prior not in ("teacher", "zero", "learnable"):
            raise ValueError(f"prior is {prior!r}; expected 'teacher', 'zero' or 'learnable'.")
        self.patch_size = patch_size
        self.made_for = self.grid(map_size)
        row = TRANSFORMS[transform]
        self.lift_student = nn.Conv2d(student_channels, width, patch_size, patch_size)
        self.encode_student = row.encoder(width, encoder_depth)
        self.lift_teacher = self.encode_teacher = None
        if prior == "teacher":
            self.lift_teacher = nn.Conv2d(teacher_channels, width, patch_size, patch_size)
            self.encode_teacher = row.encoder(width, encoder_depth)
        self.mask_token = nn.Parameter(torch.zeros(width)) if prior == "learnable" else None
        self.position = nn.Parameter(torch.zeros(math.prod(self.made_for), width)) if row.positions else None
        self.decode = row.decoder(width, decoder_depth)
        self.output = nn.Linear(width, patch_size**2 * teacher_channels)
        self._initialise()

    def _initialise(self) -> None:
        """As MAE does."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for parameter in (self.position, self.mask_token):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Returns the tokens ``(gh, gw)`` of a map.

        Args:
            size: ``(h, w)`` of the teacher's map.
        """
        return math.ceil(size[0] / self.patch_size), math.ceil(size[1] / self.patch_size)

    def forward(self, student: Tensor, teacher: Tensor, from_teacher: Tensor) -> Tensor:
        """Returns the hybrid features F^h.

        Args:
            student: ``(B, C_S, h_S, w_S)``; the gradient flows here.
            teacher: ``(B, C_T, h, w)``.
            from_teacher: ``(B, N)`` bool, True where the token is the teacher's.

        Returns:
            ``(B, C_T, h, w)``.
        """
        size = (teacher.shape[-2], teacher.shape[-1])
        grid, position = self.grid(size), self._position(self.grid(size))
        student = resize(student, size)
        # Only where the host may ask for the share, and not for a compiler to look at.
        lean = isinstance(self.encode_teacher, Blocks) and from_teacher.device.type == "cpu"
        stitch = self._stitch_chosen if lean and not torch.compiler.is_compiling() else self._stitch
        hybrid = stitch(student, teacher, from_teacher, position)  # (B, N, d)
        patches: Tensor = self.output(self.decode(hybrid, grid))  # (B, N, C_T * k * k)
        whole = F.pixel_shuffle(patches.mT.unflatten(2, grid), self.patch_size)  # (B, C_T, gh * k, gw * k)
        return whole[:, :, : size[0], : size[1]]

    def _stitch(self, student: Tensor, teacher: Tensor, from_teacher: Tensor, position: Tensor | None) -> Tensor:
        """Encodes all tokens and takes each from one of the two."""
        grid = self.grid((teacher.shape[-2], teacher.shape[-1]))
        tokens = self.encode_student(self._lift(student, self.lift_student, position), grid)
        if self.lift_teacher is not None:
            assert self.encode_teacher is not None
            prior = self.encode_teacher(self._lift(teacher, self.lift_teacher, position), grid)
        else:
            token = self.mask_token if self.mask_token is not None else tokens.new_zeros(tokens.shape[2])
            prior = token.expand_as(tokens)
        return stitch_tokens(tokens, prior, from_teacher, position)

    def _stitch_chosen(self, student: Tensor, teacher: Tensor, from_teacher: Tensor, position: Tensor | None) -> Tensor:
        """The same; the last block of each encoder runs only for the tokens that are taken from it."""
        assert position is not None
        sides: tuple[tuple[Tensor, Any, Any, Tensor], ...] = (
            (student, self.lift_student, self.encode_student, ~from_teacher),
            (teacher, self.lift_teacher, self.encode_teacher, from_teacher),
        )
        encoded = []
        for features, lift, encode, taken in sides:
            most = int(taken.sum(1).max())
            order = taken.byte().argsort(dim=1, descending=True, stable=True)[:, :, None]  # those taken first
            # An empty batch where nothing is taken at all: it costs nothing and leaves gradients of zero.
            images = len(taken) if most else 0
            tokens = self._lift(features[:images], lift, position)
            tokens = encode.first_rows(tokens.take_along_dim(order[:images], 1), most)  # attention knows no order
            encoded.append(tokens.reshape(len(taken), most, tokens.shape[2]))  # (B, most, d)
        place = torch.where(from_teacher, encoded[0].shape[1] + from_teacher.cumsum(1), (~from_teacher).cumsum(1)) - 1
        return torch.cat(encoded, dim=1).take_along_dim(place[:, :, None], 1) + position

    def _lift(self, features: Tensor, lift: nn.Module, position: Tensor | None) -> Tensor:
        """``(B, C, h, w) -> (B, N, d)`` with positions."""
        k, (h, w) = self.patch_size, features.shape[-2:]
        if h % k or w % k:
            features = F.pad(features, (0, -w % k, 0, -h % k))
        if autocast_dtype(features.device) is None:
            features = features.to(self.output.weight.dtype)  # a teacher of another precision
        tokens: Tensor = lift(features).flatten(2).mT  # (B, d, gh, gw) -> (B, N, d)
        return tokens if position is None else tokens + position

    def _position(self, grid: tuple[int, int]) -> Tensor | None:
        if self.position is None or grid == self.made_for:
            return self.position
        table = self.position.mT.unflatten(1, self.made_for)[None]  # (1, d, gh, gw)
        return F.interpolate(table, grid, mode="bicubic", align_corners=False)[0].flatten(1).mT

    def extra_repr(self) -> str:
        """Returns what the printed module says of itself."""
        return f"patch_size={self.patch_size}, grid={self.made_for}"


def draw_from_teacher(kind: MaskKind, batch: int, grid: tuple[int, int], share: Tensor) -> Tensor:
    """Draws for each image which tokens are the teacher's: ``round(share * N)`` of them, without reading the share.

    Args:
        kind: "random", "block" or "grid" (Table 6).
        batch: number of images B.
        grid: ``(gh, gw)``, N cells.
        share: scalar from 0 to 1, on the device of the result.

    Returns:
        ``(B, N)`` bool.

    Example:
        >>> draw_from_teacher("random", 2, (4, 4), torch.tensor(0.3)).sum(1)
        tensor([5, 5])
    """
    scores = cell_scores(kind, batch, grid, share.device)  # (B, N)
    rank = scores.argsort(dim=1, stable=True).argsort(dim=1)
    return rank < (share.double() * math.prod(grid)).round()


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes a map bilinearly if it has another size.

    Args:
        x: ``(B, C, h, w)``.
        size: ``(h, w)`` wanted.

    Example:
        >>> resize(torch.zeros(1, 2, 4, 4), (7, 7)).shape
        torch.Size([1, 2, 7, 7])
    """
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def least_patch_size(size: tuple[int, int]) -> int:
    """Returns the least k with which a map gives at most 49 tokens.

    Args:
        size: ``(h, w)``.

    Example:
        >>> [least_patch_size((side, side)) for side in (7, 8, 14, 28, 56)]
        [1, 2, 2, 4, 8]
    """
    k = 1
    while math.ceil(size[0] / k) * math.ceil(size[1] / k) > MOST_TOKENS:
        k += 1
    return k
