"""Methods between classifiers, on small ViTs in float64; eight images in all."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import torch
from agreement import Found, own, step
from timm.models.deit import VisionTransformerDistilled
from tiny_vits import pictures, tiny
from torch import Tensor, nn

from fastmkd.methods import DMAE, DPK, FeatureKD, MaskedDINO, MaskedKD, MoCoV3, Supervised
from fastmkd.methods.crd import CRD, Memory
from fastmkd.methods.dpk_ratio import CosineGap

IMAGES, TARGETS = pictures(count=8), torch.arange(8) % 5
LAYERS = {"blocks.1": "blocks.1"}
TEACHER = partial(tiny, seed=7)


def classify(make: Any, rank: int, world: int, **told: Tensor) -> Found:
    """A step of a method that takes images and targets; `make` gets a seed."""
    images, targets = own(IMAGES, rank, world), own(TARGETS, rank, world)
    more = {name: own(value, rank, world) for name, value in told.items()}
    return step(lambda seed: make(seed).double().train(), lambda run: run(images, targets, **more), rank, world)


def seeded(seed: int, kind: Any, *args: Any, **options: Any) -> Any:
    """A method whose heads are drawn from a seed."""
    torch.manual_seed(seed)
    return kind(*args, **options)


def with_still_norms(method: nn.Module) -> nn.Module:
    """Batch norms in eval mode: DDP leaves each rank its own batch statistics."""
    for part in method.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.eval()
    return method


def case_supervised(rank: int, world: int) -> Found:
    return classify(lambda seed: Supervised(tiny(seed)), rank, world)


def case_supervised_distilled(rank: int, world: int) -> Found:
    return classify(lambda seed: Supervised(tiny(seed, VisionTransformerDistilled)), rank, world)


def masked_kd(rank: int, world: int, kind: Any = None, **options: Any) -> Found:
    kinds = {} if kind is None else {"kind": kind}
    return classify(lambda seed: seeded(seed, MaskedKD, tiny(seed, **kinds), TEACHER(), **options), rank, world)


def case_maskedkd(rank: int, world: int) -> Found:
    return masked_kd(rank, world)


def case_maskedkd_attention(rank: int, world: int) -> Found:
    return masked_kd(rank, world, base="attention", strategy="middle")


def case_maskedkd_linear_probe(rank: int, world: int) -> Found:
    return masked_kd(rank, world, linear_probe=True)


def case_maskedkd_g2sd(rank: int, world: int) -> Found:
    return masked_kd(rank, world, VisionTransformerDistilled, base="g2sd")


def case_maskedkd_random(rank: int, world: int) -> Found:
    return masked_kd(rank, world, strategy="random")


def case_maskedkd_micro_batches(rank: int, world: int) -> Found:
    return masked_kd(rank, world, micro_batches=2)


def dmae(rank: int, world: int, pool: str, teacher: bool = True, **options: Any) -> Found:
    """Classifier and pool are frozen, everything else gets the gradient of the global batch."""

    def make(seed: int) -> Any:
        small = {"decoder_depth": 1, "decoder_width": 8, "decoder_heads": 2, **options}
        student = tiny(seed, global_pool=pool)
        return seeded(seed, DMAE, student, TEACHER() if teacher else None, **small)

    return classify(make, rank, world)


def case_dmae_token(rank: int, world: int) -> Found:
    return dmae(rank, world, "token")


def case_dmae_average(rank: int, world: int) -> Found:
    return dmae(rank, world, "avg", normalize_target=True)


def case_dmae_pool(rank: int, world: int) -> Found:
    return dmae(rank, world, "map", mask_ratio=0.9)


def case_mae(rank: int, world: int) -> Found:
    return dmae(rank, world, "token", teacher=False)


def like_the_student() -> Any:
    """A teacher close enough to the student of rank 0 for CKA between 0 and 1."""
    teacher = tiny(0)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return teacher


def dpk(rank: int, world: int, **options: Any) -> Found:
    small = {"encoder_depth": 1, "decoder_depth": 1, "width": 8, **options}
    return classify(lambda seed: seeded(seed, DPK, tiny(seed), like_the_student(), LAYERS, **small), rank, world)


def case_dpk_fixed(rank: int, world: int) -> Found:
    return dpk(rank, world, ratio=0.5)


def case_dpk_cka(rank: int, world: int) -> Found:
    """The dynamic ratio is that of the global batch, and so are the masks drawn with it."""
    found = dpk(rank, world, ratio="cka")
    assert 0 < found.mean["ratio"] < 1
    return found


def case_dpk_cosine_block(rank: int, world: int) -> Found:
    return dpk(rank, world, ratio=CosineGap(), mask="block", target="non-masked")


def feature_kd(rank: int, world: int, base: str, **options: Any) -> Found:
    layers = None if base in ("kd", "dkd") else LAYERS
    return classify(lambda seed: seeded(seed, FeatureKD, tiny(seed), TEACHER(), base, layers, **options), rank, world)


def case_feature_kd(rank: int, world: int) -> Found:
    return feature_kd(rank, world, "kd")


def case_feature_dkd(rank: int, world: int) -> Found:
    return feature_kd(rank, world, "dkd")


def case_feature_fitnet(rank: int, world: int) -> Found:
    return feature_kd(rank, world, "fitnet", logit_weight=0.8)


def case_feature_attention_transfer(rank: int, world: int) -> Found:
    return feature_kd(rank, world, "at")


def case_feature_review(rank: int, world: int) -> Found:
    """The batch norms of its heads use what they have: else each rank has its own statistics."""
    images, targets = own(IMAGES, rank, world), own(TARGETS, rank, world)

    def make(seed: int) -> Any:
        method = seeded(seed, FeatureKD, tiny(seed), TEACHER(), "reviewkd", LAYERS).double().train()
        return with_still_norms(method)

    return step(make, lambda run: run(images, targets), rank, world)


def case_feature_align(rank: int, world: int) -> Found:
    return feature_kd(rank, world, "align")


def case_crd(rank: int, world: int) -> Found:
    """Every rank's bank takes in the images of all ranks; DDP does not send banks around."""

    def make(seed: int) -> Any:
        base = CRD(negatives=3, width=4)
        method = seeded(seed, FeatureKD, tiny(seed), TEACHER(), base, LAYERS, train_labels=torch.arange(11))
        assert any(name.startswith("heads.memory") for name in method._ddp_params_and_buffers_to_ignore)
        return method

    drawn = lambda self, numbers: (numbers[:, None] + 1 + torch.arange(3)) % 11  # noqa: E731
    with mock.patch.object(Memory, "draw", drawn):
        return classify(make, rank, world, numbers=torch.tensor([4, 0, 3, 2, 10, 7, 1, 5]))


def views(rank: int, world: int, make: Any) -> Found:
    """Three updates of a self-distillation on two views: its averages and centre must stay those of one process."""

    def call(run: Any) -> Any:
        crops = [own(IMAGES, rank, world), own(IMAGES.flip(3), rank, world)]
        return run(crops)

    found = step(make, call, rank, world)
    method = make(0)
    run = nn.parallel.DistributedDataParallel(method) if world > 1 else method
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        call(run).loss.backward()
        optimizer.step()
    found.same |= {f"trained {name}": value for name, value in method.state_dict().items()}
    return found


def case_dino(rank: int, world: int) -> Found:
    def make(seed: int) -> Any:
        small = {"out_features": 6, "hidden": 8, "bottleneck": 4, "local_crops": 0}
        return seeded(seed, MaskedDINO, tiny(seed), **small).double().train()

    found = views(rank, world, make)
    assert found.same["trained center"].abs().max() > 0
    return found


def case_moco(rank: int, world: int) -> Found:
    """The keys of all ranks are candidates."""

    def make(seed: int) -> Any:
        return with_still_norms(seeded(seed, MoCoV3, tiny(seed), hidden=8, out_features=6).double().train())

    return views(rank, world, make)
