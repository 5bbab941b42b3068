"""RepPoints (Yang et al., ICCV 2019): an object is nine points, first guessed, then moved, then read as a box.

With the face of torchvision's one-stage detectors, whose transform and feature pyramid it uses. Written from the paper;
what the paper leaves open says so beside the line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import DeformConv2d, batched_nms, box_iou, clip_boxes_to_image, sigmoid_focal_loss

from ...ops.autocast import no_autocast
from ..box_checks import check_boxes
from .precision import widen
from .reppoints_targets import BASE, IGNORED, assign_by_centre, assign_by_overlap, boxes_from_points, centres

__all__ = ["RepPoints", "RepPointsHead", "tap_offsets"]

POINTS = 9  # as many as taps of a 3x3 convolution, which samples them
# What reaches the first guess through the places that the second stage samples; the authors' code damps it as well.
SAMPLING_GRADIENT = 0.1


def tap_offsets(points: Tensor) -> Tensor:
    """Returns how far a 3x3 deformable convolution must move its taps to read the map at the points.

    Args:
        points: ``(B, 18, H, W)``, nine pairs (y, x) relative to each place, in steps of the map.

    Returns:
        ``(B, 18, H, W)``; zero where the points stand as the taps of an ordinary convolution.

    Example:
        >>> tap_offsets(torch.zeros(1, 18, 1, 1)).view(9, 2)[[0, 4, 5]].tolist()
        [[1.0, 1.0], [0.0, 0.0], [0.0, -1.0]]
    """
    at = torch.arange(-1, 2, device=points.device, dtype=points.dtype)
    taps = torch.stack(torch.meshgrid(at, at, indexing="ij"), dim=-1)  # (3, 3, 2)
    return points - taps.view(1, 2 * POINTS, 1, 1)


class RepPointsHead(nn.Module):
    """Two towers and two deformable convolutions, shared by all levels (Figure 2).

    Args:
        in_channels: of each level.
        num_classes: with the background, which torchvision counts though no place predicts it.
        width: channels of the towers.
        depth: convolutions of each.

    Example:
        >>> logits, guess, points = RepPointsHead(32, 4, width=32)([torch.zeros(1, 32, 8, 8)])[0]
        >>> logits.shape, guess.shape, points.shape
        (torch.Size([1, 4, 8, 8]), torch.Size([1, 18, 8, 8]), torch.Size([1, 18, 8, 8]))
    """

    def __init__(self, in_channels: int, num_classes: int, width: int = 256, depth: int = 3) -> None:
        super().__init__()
        self.class_tower = _tower(in_channels, width, depth)
        self.point_tower = _tower(in_channels, width, depth)
        self.guess = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 2 * POINTS, 1))
        self.class_sample = DeformConv2d(width, width, 3, padding=1)
        logits = nn.Conv2d(width, num_classes, 1)
        self.class_out = nn.Sequential(nn.ReLU(), logits)
        self.point_sample = DeformConv2d(width, width, 3, padding=1)
        self.point_out = nn.Sequential(nn.ReLU(), nn.Conv2d(width, 2 * POINTS, 1))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | DeformConv2d):
                nn.init.normal_(layer.weight, std=0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        assert logits.bias is not None
        nn.init.constant_(logits.bias, -math.log(99))  # focal loss starts from a probability of 1 %

    def forward(self, levels: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Returns for each level logits, first points and refined points.

        Args:
            levels: ``(B, in_channels, h, w)`` each.

        Returns:
            ``(B, num_classes, h, w)``, ``(B, 18, h, w)``, ``(B, 18, h, w)``; points are pairs (y, x) relative to the
            place, in strides.
        """
        out = []
        for level in levels:
            for_class, for_points = self.class_tower(level), self.point_tower(level)
            guess = widen(self.guess(for_points))
            where = tap_offsets(SAMPLING_GRADIENT * guess + (1 - SAMPLING_GRADIENT) * guess.detach())
            logits = self.class_out(_sample(self.class_sample, for_class, where))
            moved = self.point_out(_sample(self.point_sample, for_points, where))
            out.append((logits, guess, guess.detach() + moved))
        return out


class RepPoints(nn.Module):
    """A one-stage detector without anchors; called as torchvision's RetinaNet is.

    Args:
        backbone: a network with a feature pyramid, as torchvision's ``BackboneWithFPN``; tells ``out_channels``.
        num_classes: with the background.
        min_size: the shorter side that images are resized to.
        max_size: the longer side at most.
        image_mean: per channel, of pixels in [0, 1].
        image_std: per channel.
        strides: of the pyramid's levels.
        points_to_box: "moment" (the paper's best) or "minmax".
        width: channels of the head's towers.
        score_thresh: least score of a detection.
        nms_thresh: overlap from which the lower of two boxes of one class is dropped.
        detections_per_img: at most.
        topk_candidates: of each level, before that.
        kwargs: further arguments of torchvision's ``GeneralizedRCNNTransform``, for example size_divisible.

    Example:
        >>> from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
        >>> body = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
        >>> model = RepPoints(body, 3, min_size=64, max_size=64, strides=(4, 8, 16, 32, 64), width=32).eval()
        >>> sorted(model([torch.zeros(3, 48, 64)])[0])
        ['boxes', 'labels', 'scores']
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        min_size: int | Sequence[int] = 800,
        max_size: int = 1333,
        image_mean: Sequence[float] = (0.485, 0.456, 0.406),
        image_std: Sequence[float] = (0.229, 0.224, 0.225),
        *,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        points_to_box: Literal["moment", "minmax"] = "moment",
        width: int = 256,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        detections_per_img: int = 100,
        topk_candidates: int = 1000,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if points_to_box not in ("moment", "minmax"):
            raise ValueError(f"points_to_box is {points_to_box!r}; expected 'moment' or 'minmax'.")
        self.backbone = backbone
        self.head = RepPointsHead(backbone.out_channels, num_classes, width)  # type: ignore[arg-type]
        self.log_scale = nn.Parameter(torch.zeros(2)) if points_to_box == "moment" else None
        self.transform = GeneralizedRCNNTransform(min_size, max_size, list(image_mean), list(image_std), **kwargs)
        self.num_classes, self.strides = num_classes, tuple(strides)
        self.score_thresh, self.nms_thresh = score_thresh, nms_thresh
        self.detections_per_img, self.topk_candidates = detections_per_img, topk_candidates

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Returns losses in training, detections otherwise.

        Args:
            images: ``(3, H, W)`` in [0, 1] each, of any sizes.
            targets: in training, a dict for each image: boxes ``(n, 4)`` corners in pixels, labels ``(n,)`` int64 from
                1; n may be 0.

        Returns:
            In training ``classification``, ``bbox_guess`` and ``bbox_refined``; otherwise a dict for each image:
            boxes, labels, scores, best first.

        Raises:
            ValueError: targets missing or not one for each image, no image, boxes of a wrong shape, not finite or
                without area, labels out of range, or a pyramid whose levels are not those of `strides`.
            TypeError: targets of another type, labels that are not int64.
        """
        if self.training:
            targets = self._checked(images, targets)
        original = [(image.shape[-2], image.shape[-1]) for image in images]
        batch, targets = self.transform(images, targets)
        levels = self.backbone(batch.tensors)
        levels = list(levels.values()) if isinstance(levels, Mapping) else [levels]
        self._check_levels(levels, batch.tensors.shape[-2:])
        sizes = [(level.shape[-2], level.shape[-1]) for level in levels]
        outputs = self.head(levels)
        logits, guess, points = (
            widen(torch.cat([part.flatten(2).transpose(1, 2) for part in parts], dim=1))  # (B, L, channels)
            for parts in zip(*outputs, strict=True)
        )
        places, steps = centres(sizes, self.strides, logits.device)
        first, refined = (self._boxes(part, places, steps) for part in (guess, points))
        if self.training:
            assert targets is not None
            return self._losses(logits, first, refined, steps, targets, sizes)
        lengths = [h * w for h, w in sizes]
        found = [self._detect(*one, lengths) for one in zip(logits, refined, batch.image_sizes, strict=True)]
        return self.transform.postprocess(found, batch.image_sizes, original)

    def _boxes(self, points: Tensor, places: Tensor, steps: Tensor) -> Tensor:
        """Pseudo boxes ``(B, L, 4)`` in pixels of ``(B, L, 18)`` points."""
        pairs = points.unflatten(-1, (POINTS, 2)).flip(-1)  # (y, x) as the convolution wants -> (x, y)
        boxes = boxes_from_points(pairs, self.log_scale)
        return boxes * steps[:, None] + places.repeat(1, 2)

    def _losses(
        self,
        logits: Tensor,
        first: Tensor,
        refined: Tensor,
        steps: Tensor,
        targets: list[dict[str, Tensor]],
        sizes: list[tuple[int, int]],
    ) -> dict[str, Tensor]:
        """Focal loss, and smooth L1 of the corners in units of `BASE` strides; sums over the batch / its positives."""
        classification, guess_loss, refined_loss = logits.sum() * 0, first.sum() * 0, refined.sum() * 0
        guessed: Any = 0
        answered: Any = 0
        for score, before, after, target in zip(logits, first, refined, targets, strict=True):
            truth, labels = target["boxes"].float(), target["labels"]
            owner = assign_by_centre(truth, sizes, self.strides)
            here = owner >= 0
            guess_loss = guess_loss + _corner_loss(before[here], truth[owner[here]], steps[here])
            guessed += here.sum()
            # The first boxes decide which places answer for an object in the end (Section 3.2).
            owner = assign_by_overlap(box_iou(truth, before.detach()))
            here = owner >= 0
            refined_loss = refined_loss + _corner_loss(after[here], truth[owner[here]], steps[here])
            wanted = torch.zeros_like(score)
            wanted[here, labels[owner[here]]] = 1.0
            judged = owner != IGNORED
            classification = classification + sigmoid_focal_loss(score[judged], wanted[judged], reduction="sum")
            answered += here.sum()
        guessed, answered = (torch.as_tensor(n, device=logits.device).clamp(min=1) for n in (guessed, answered))
        return {
            "classification": classification / answered,
            "bbox_guess": 0.5 * guess_loss / guessed,
            "bbox_refined": refined_loss / answered,
        }

    def _detect(self, logits: Tensor, boxes: Tensor, size: tuple[int, int], lengths: list[int]) -> dict[str, Tensor]:
        """Detections of one image from ``(L, K)`` logits and ``(L, 4)`` boxes; `lengths` places on each level."""
        found = []
        for of_level, at in zip(logits.split(lengths), boxes.split(lengths), strict=True):
            scores = of_level.sigmoid().flatten()
            scores, index = scores.topk(min(self.topk_candidates, len(scores)))
            good = scores > self.score_thresh
            scores, index = scores[good], index[good]
            place, label = index // self.num_classes, index % self.num_classes
            found.append((clip_boxes_to_image(at[place], size), scores, label))
        places, scores, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        keep = batched_nms(places, scores, labels, self.nms_thresh)[: self.detections_per_img]
        return {"boxes": places[keep], "labels": labels[keep], "scores": scores[keep]}

    def _checked(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None) -> list[dict[str, Tensor]]:
        if targets is None:
            raise ValueError(f"targets is None for {len(images)} images; in training each image needs one.")
        check_boxes(images, targets, (1, self.num_classes - 1), on_any_device=True)
        return targets

    def _check_levels(self, levels: list[Tensor], size: Sequence[int]) -> None:
        expected = [tuple(-(-side // stride) for side in size) for stride in self.strides]
        given = [tuple(level.shape[-2:]) for level in levels]
        if given != expected:
            raise ValueError(
                f"the backbone gave levels of sizes {given} for images of {tuple(size)}; with strides {self.strides} "
                f"expected {expected}. Give the strides of its levels."
            )


def _sample(layer: DeformConv2d, x: Tensor, where: Tensor) -> Tensor:
    """A deformable convolution in the dtype of its weights; on CPUs torchvision has none for autocast's bfloat16."""
    dtype = layer.weight.dtype
    with no_autocast(x.device):
        sampled: Tensor = layer(x.to(dtype), where.to(dtype))
    return sampled


def _corner_loss(boxes: Tensor, truth: Tensor, steps: Tensor) -> Tensor:
    unit = BASE * steps[:, None]
    return F.smooth_l1_loss(boxes / unit, truth / unit, beta=0.11, reduction="sum")


def _tower(in_channels: int, width: int, depth: int) -> nn.Sequential:
    groups = math.gcd(32, width, max(1, width // 8))  # of 8 channels: a level may have one pixel
    layers: list[nn.Module] = []
    for number in range(depth):
        conv = nn.Conv2d(width if number else in_channels, width, 3, padding=1, bias=False)
        layers += [conv, nn.GroupNorm(groups, width), nn.ReLU()]
    return nn.Sequential(*layers)
