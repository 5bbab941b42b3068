"""Methods between detectors and segmenters in float64; four images in all, of one size, so that padding is the same."""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn.functional as F
from agreement import Found, own, step
from dense_nets import SMALL, Segmenter, detector, teacher_of
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from fastmkd.methods import MKD, DenseKD
from fastmkd.methods.dense_bases import DPKFGD

GENERATOR = torch.Generator().manual_seed(3)
IMAGES = [torch.rand(3, 96, 80, generator=GENERATOR, dtype=torch.float64) for _ in range(4)]
BOXES = [[[10.0, 12, 60, 70], [30, 8, 44, 30]], [[5.0, 40, 70, 90]], [], [[20.0, 20, 50, 60]]]
TARGETS = [
    {"boxes": torch.tensor(boxes, dtype=torch.float64).view(-1, 4), "labels": torch.arange(1, len(boxes) + 1)}
    for boxes in BOXES
]


def detect(rank: int, world: int, kind: Any, epoch: float = 0.0, **options: Any) -> Found:
    """A step on RetinaNets with frozen batch norm."""

    def make(seed: int) -> Any:
        student, teacher = detector(seed=seed, norm=FrozenBatchNorm2d), teacher_of(norm=FrozenBatchNorm2d)
        torch.manual_seed(seed)
        method = kind(student.double(), teacher.double(), **options).double().train()
        method.set_epoch(epoch)
        return method

    images, targets = own(IMAGES, rank, world), own(TARGETS, rank, world)
    return step(make, lambda run: run(images, targets), rank, world)


def case_mkd_retinanet(rank: int, world: int) -> Found:
    return detect(rank, world, MKD, mask_ratio=0.3, global_weight=3e-3, logits_weight=0.1, **SMALL)


def case_mkd_last_epochs(rank: int, world: int) -> Found:
    """Without a teacher, and so without a use for the decoders, whose gradients DDP waits for all the same."""
    found = detect(rank, world, MKD, epoch=3.0, mask_ratio=0.3, epochs=4, last_mask_ratio=0.4, **SMALL)
    assert "feat" not in found.mean
    return found


def case_mkd_segmenter_sync_batch_norm(rank: int, world: int) -> Found:
    """A student whose batch norms count visible positions over all ranks; DDP takes such a one on GPUs only."""
    images = torch.stack([image[:, :64, :64] for image in IMAGES])
    labels = torch.randint(3, (4, 64, 64), generator=torch.Generator().manual_seed(4))

    def make(seed: int) -> Any:
        student = nn.SyncBatchNorm.convert_sync_batchnorm(Segmenter(seed=seed)).double()
        teacher = Segmenter((4, 8, 8, 16), seed=7).double()
        torch.manual_seed(seed)
        return MKD(student, teacher, mask_ratio=0.3, weight=7.0, image_size=64, **SMALL).double().train()

    mine = own(images, rank, world), own(labels, rank, world)
    return step(make, lambda run: run(*mine), rank, world, ddp=False)


def case_dense_mgd(rank: int, world: int) -> Found:
    return detect(rank, world, DenseKD, base="mgd", weight=1e-2)


def case_dense_fgd(rank: int, world: int) -> Found:
    return detect(rank, world, DenseKD, base="fgd")


def case_dense_dpk(rank: int, world: int) -> Found:
    return detect(rank, world, DenseKD, base=DPKFGD(encoder_depth=1, decoder_depth=1, width=8))


def case_dense_fitnet(rank: int, world: int) -> Found:
    return detect(rank, world, DenseKD, base="fitnet")


def case_dense_cwd(rank: int, world: int) -> Found:
    return detect(rank, world, DenseKD, base="cwd", logits_weight=0.5)


def case_mkd_swin_classifier(rank: int, world: int) -> Found:
    """Channels-last maps, and cells that stick out of the image: 96 pixels in cells of 64."""
    images = torch.stack([F.pad(image, (0, 16)) for image in IMAGES])
    small = {"img_size": 96, "strict_img_size": False, "embed_dim": 16, "depths": (1, 1, 1, 1)}
    small |= {"num_heads": (1, 1, 1, 1), "window_size": 3, "drop_path_rate": 0.0, "num_classes": 3}

    def make(seed: int) -> Any:
        nets = []
        for each in (7, seed):  # every rank has the same teacher, and a student of its own that DDP replaces
            torch.manual_seed(each)
            nets.append(timm.create_model("swin_tiny_patch4_window7_224", **small).double())
        return MKD(nets[1], nets[0], mask_ratio=0.3, mask_patch=64, image_size=96, **SMALL).double().train()

    labels = torch.tensor([0, 2, 1, 1])
    return step(make, lambda run: run(own(images, rank, world), own(labels, rank, world)), rank, world)
