"""RepPoints: geometry against numbers worked out by hand, assignment, and that it learns two pictures by heart."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import DeformConv2d, box_iou

from fastmkd.nn.detectors.reppoints import RepPoints, tap_offsets
from fastmkd.nn.detectors.reppoints_targets import (
    BACKGROUND,
    IGNORED,
    assign_by_centre,
    assign_by_overlap,
    boxes_from_points,
    centres,
)


class TinyPyramid(nn.Module):
    """Levels at strides 4, 8 and 16."""

    out_channels = 16

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.down = nn.ModuleList(nn.Conv2d(16, 16, 3, 2, 1) for _ in range(2))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        levels = {"0": self.stem(images)}
        for number, layer in enumerate(self.down):
            levels[str(number + 1)] = F.relu(layer(levels[str(number)]))
        return levels


def tiny(**kwargs) -> RepPoints:
    torch.manual_seed(0)
    return RepPoints(TinyPyramid(), 4, 64, 64, strides=(4, 8, 16), width=32, **kwargs)


def taps(height: int, width: int) -> torch.Tensor:
    """Points that stand where the taps of an ordinary 3x3 convolution are."""
    pairs = [(float(y), float(x)) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    return torch.tensor(pairs).view(1, 18, 1, 1).expand(1, 18, height, width)


def test_points_at_the_taps_make_an_ordinary_convolution():
    torch.manual_seed(0)
    layer, x = DeformConv2d(4, 5, 3, padding=1), torch.randn(1, 4, 7, 9)
    plain = F.conv2d(x, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(x, tap_offsets(taps(7, 9))), plain)


def test_points_one_row_down_and_two_columns_right_read_there():
    torch.manual_seed(0)
    layer, x = DeformConv2d(4, 5, 3, padding=1), torch.randn(1, 4, 9, 9)
    plain = F.conv2d(x, layer.weight, layer.bias, padding=1)
    moved = taps(9, 9) + torch.tensor([1.0, 2.0]).repeat(9).view(1, 18, 1, 1)  # pairs (y, x)
    torch.testing.assert_close(layer(x, tap_offsets(moved))[..., 1:-2, 1:-3], plain[..., 2:-1, 3:-1])


def test_boxes_from_points_by_hand():
    points = torch.tensor([[0.0, 0.0], [2.0, 4.0], [4.0, 8.0]])
    assert boxes_from_points(points).tolist() == [0, 0, 4, 8]
    # Mean (2, 4); deviations 2 and 4 (two degrees of freedom); scaled by 2 and 0.5.
    scale = torch.tensor([2.0, 0.5]).log()
    torch.testing.assert_close(boxes_from_points(points, scale), torch.tensor([-2.0, 2.0, 6.0, 6.0]))


@pytest.mark.parametrize("moment", [True, False])
def test_points_that_coincide_give_a_finite_gradient(moment):
    points = torch.ones(9, 2, requires_grad=True)
    scale = torch.zeros(2, requires_grad=True) if moment else None
    boxes_from_points(points, scale).square().sum().backward()
    assert torch.isfinite(points.grad).all()


def test_pseudo_boxes_lie_around_their_places():
    model = tiny(points_to_box="minmax")
    places, steps = centres([(2, 2), (1, 1)], (4, 8), torch.device("cpu"))
    pairs = torch.zeros(1, 5, 9, 2)  # (y, x)
    pairs[..., 0, :] = torch.tensor([-1.0, -2.0])
    pairs[..., 1, :] = torch.tensor([3.0, 0.5])
    boxes = model._boxes(pairs.flatten(2), places, steps)[0]
    assert boxes[1].tolist() == [6 - 8, 2 - 4, 6 + 2, 2 + 12]
    assert boxes[4].tolist() == [4 - 16, 4 - 8, 4 + 4, 4 + 24]


def test_centre_decides_the_bin_and_size_the_level():
    sizes, strides = [(8, 8), (4, 4), (2, 2)], (8, 16, 32)
    boxes = torch.tensor(
        [
            [0.0, 0.0, 8.0, 8.0],  # sqrt(64) / 4 = 2: below the finest level, centre (4, 4)
            [16.0, 0.0, 60.0, 44.0],  # 44 / 4 = 11: level of stride 8, centre (38, 22)
            [0.0, 0.0, 64.0, 64.0],  # 16: stride 16, centre (32, 32)
            [-600.0, -600.0, 664.0, 664.0],  # above the coarsest level
        ]
    )
    owner = assign_by_centre(boxes, sizes, strides)
    found = {int(place): int(owner[place]) for place in (owner >= 0).nonzero()[:, 0]}
    assert found == {0: 0, 2 * 8 + 4: 1, 64 + 2 * 4 + 2: 2, 80 + 3: 3}
    assert (owner[owner < 0] == BACKGROUND).all()


def test_of_two_objects_in_one_bin_the_smaller_wins():
    boxes = torch.tensor([[0.0, 0.0, 40.0, 40.0], [10.0, 10.0, 30.0, 30.0], [1.0, 1.0, 39.0, 39.0]])
    owner = assign_by_centre(boxes, [(4, 4)], (16,))
    assert owner.max() == 1
    assert (owner >= 0).sum() == 1
    assert (assign_by_centre(boxes[:0], [(4, 4)], (16,)) == BACKGROUND).all()


def test_overlap_assignment():
    overlap = torch.tensor([[0.55, 0.70, 0.45, 0.39, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0], [0.5, 0.1, 0.0, 0.42, 0.2]])
    assert assign_by_overlap(overlap).tolist() == [0, 0, IGNORED, IGNORED, BACKGROUND]
    weak = torch.tensor([[0.1, 0.3, 0.0]])
    assert assign_by_overlap(weak).tolist() == [BACKGROUND, 0, BACKGROUND]  # its best box answers for an object
    assert assign_by_overlap(overlap[:0]).tolist() == [BACKGROUND] * 5


def pictures() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Two pictures of other sizes with coloured boxes, and one without any."""
    first, second, empty = torch.zeros(3, 64, 64), torch.zeros(3, 48, 64), torch.zeros(3, 64, 40)
    first[0, 8:28, 10:30], first[1, 36:60, 30:62] = 1, 1
    second[2, 12:40, 16:44] = 1
    targets = [
        {"boxes": torch.tensor([[10.0, 8, 30, 28], [30.0, 36, 62, 60]]), "labels": torch.tensor([1, 2])},
        {"boxes": torch.tensor([[16.0, 12, 44, 40]]), "labels": torch.tensor([3])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    return [first, second, empty], targets


def test_it_learns_two_pictures_by_heart():
    model = tiny()
    images, targets = (part[:2] for part in pictures())
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    totals = []
    for _ in range(121):
        losses = model(images, targets)
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
        assert all(torch.isfinite(value) for value in losses.values())
    assert totals[-1] < 0.05 * totals[0]
    model.eval()
    with torch.no_grad():
        found = model(images)
    for one, target in zip(found, targets, strict=True):
        good = one["scores"] > 0.5
        assert sorted(one["labels"][good].tolist()) == sorted(target["labels"].tolist())
        for box, label in zip(target["boxes"], target["labels"], strict=True):
            mine = one["boxes"][good & (one["labels"] == label)]
            assert box_iou(mine, box[None]).max() > 0.75


@pytest.mark.parametrize("kind", ["moment", "minmax"])
def test_every_parameter_is_trained_and_nothing_else_is_told(kind):
    model = tiny(points_to_box=kind)
    images, targets = pictures()
    losses = model(images, targets)
    assert sorted(losses) == ["bbox_guess", "bbox_refined", "classification"]
    sum(losses.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]


def test_a_batch_without_objects_teaches_background_only():
    model = tiny()
    images, targets = pictures()
    losses = model(images[2:], targets[2:])
    assert losses["bbox_guess"] == losses["bbox_refined"] == 0
    assert losses["classification"] > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_detections_keep_to_their_limits():
    model = tiny(score_thresh=0.0, detections_per_img=7, topk_candidates=20).eval()
    images, _ = pictures()
    with torch.no_grad():
        found = model(images)
    for image, one in zip(images, found, strict=True):
        assert one["boxes"].shape == (7, 4)
        assert (one["scores"].diff() <= 0).all()
        assert one["boxes"].min() >= 0
        assert (one["boxes"][:, 2] <= image.shape[2] + 1e-3).all()
        assert (one["boxes"][:, 3] <= image.shape[1] + 1e-3).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"boxes": torch.tensor([[5.0, 5, 5, 9]])}, r"\['boxes'\]\[0\] is \[5.0, 5.0, 5.0, 9.0\], a box without area"),
        ({"boxes": torch.tensor([[5.0, 5, math.nan, 9]])}, r"\['boxes'\]\[0\] is \[5.0, 5.0, nan, 9.0\], no box"),
        ({"boxes": torch.zeros(1, 5)}, r"\['boxes'\] has shape \(1, 5\); expected \(n, 4\)"),
        ({"labels": torch.tensor([4])}, r"\['labels'\] holds 4, but this detector has the classes 1 to 3"),
        ({"labels": torch.tensor([0])}, r"\['labels'\] holds 0, but"),
    ],
)
def test_bad_targets_are_refused(change, said):
    target = {"boxes": torch.tensor([[1.0, 1, 9, 9]]), "labels": torch.tensor([1]), **change}
    with pytest.raises(ValueError, match=said):
        tiny()([torch.zeros(3, 64, 64)], [target])


def test_a_pyramid_of_other_strides_and_missing_targets_are_refused():
    with pytest.raises(ValueError, match="targets is None for 1 images"):
        tiny()([torch.zeros(3, 64, 64)])
    with pytest.raises(ValueError, match="images is empty; give a detector at least one image"):
        tiny()([], [])
    model = RepPoints(TinyPyramid(), 4, 64, 64, strides=(8, 16, 32), width=32)
    with pytest.raises(ValueError, match="Give the strides of its levels"):
        model.eval()([torch.zeros(3, 64, 64)])
    with pytest.raises(ValueError, match="points_to_box is 'mean'"):
        tiny(points_to_box="mean")
