"""A DPK training step, ResNet-18 from ResNet-34, last stage: a good eager implementation against the library's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmkd import DPK

from ..models import images_for
from ..registry import Answer, Case, Setting, Variant, benchmark

CLASSES, ALPHA, BETA = 100, 0.8, 0.2
# A share that rounds to another number of tokens in one image in some hundred moves the loss by this much.
FLOORS = {"fp32": 1e-3, "bf16": 5e-2}

Losses = tuple[Tensor, Tensor, Tensor]  # cross-entropy, logits, features
Step = Callable[[], tuple[Tensor, ...]]


def networks(setting: Setting) -> tuple[nn.Module, nn.Module]:
    """Student in training mode and frozen teacher, random weights, channels-last.

    Args:
        setting: where they go.
    """
    torch.manual_seed(0)
    pair = [timm.create_model(name, num_classes=CLASSES) for name in ("resnet18", "resnet34")]
    student, teacher = (net.to(setting.device, memory_format=torch.channels_last) for net in pair)  # type: ignore[call-overload]
    return student.train(), teacher.eval().requires_grad_(False)


def eager_share(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - CKA as one writes it: two Grams, U-centred, in float32."""
    x, y = student.flatten(1).float(), teacher.flatten(1).float()
    x, y = x - x[:1], y - y[:1]
    n, grams = len(x), []
    for rows in (x, y):
        gram = (rows @ rows.T).fill_diagonal_(0)
        sums = gram.sum(1) / (n - 2)
        grams.append((gram - sums[:, None] - sums + sums.sum() / (n - 1)).fill_diagonal_(0))
    gram_x, gram_y = grams
    cka = (gram_x * gram_y).sum() / (gram_x.square().sum().sqrt() * gram_y.square().sum().sqrt())
    return (1 - cka).nan_to_num(1.0).clamp(0, 1)


def eager_losses(student: nn.Module, teacher: Any, stage: Any, images: Tensor, targets: Tensor, share: Any) -> Losses:
    """DPK without the library's ops: forward_features instead of hooks, SDPA in the blocks, where + addition."""
    mine: Any = student
    s = mine.forward_features(images)
    with torch.no_grad():
        t = teacher.forward_features(images)
        of_teacher = teacher.forward_head(t)
        given = eager_share(s.detach(), t) if share is None else torch.full((), share, device=s.device)
        noise = torch.rand(len(s), s[0, 0].numel(), device=s.device)
        mask = noise.argsort(dim=1, stable=True).argsort(dim=1) < (given.double() * noise.shape[1]).round()
    tokens = [
        encode.norm(encode.blocks(lift(x).flatten(2).mT + stage.position))
        for x, lift, encode in (
            (s, stage.lift_student, stage.encode_student),
            (t, stage.lift_teacher, stage.encode_teacher),
        )
    ]
    hybrid = torch.where(mask[:, :, None], tokens[1], tokens[0]) + stage.position
    decoded = stage.decode.blocks.norm(stage.decode.blocks.blocks(stage.decode.embed(hybrid)))
    predicted = stage.output(decoded).mT.unflatten(2, t.shape[2:])
    logits = mine.forward_head(s)
    wide = torch.promote_types(logits.dtype, torch.float32)
    kd = F.kl_div(
        logits.to(wide).log_softmax(1), of_teacher.to(wide).log_softmax(1), reduction="batchmean", log_target=True
    )
    return F.cross_entropy(logits.to(wide), targets), kd, (predicted.to(wide) - t.to(wide)).square().mean()


def our_losses(method: DPK, images: Tensor, targets: Tensor) -> Losses:
    """The library's step; logged terms carry no gradient, so the whole gradient rides on the first."""
    out = method(images, targets)
    kd, feat = out.terms["kd"], out.terms["feat"]
    return out.loss - ALPHA * kd - BETA * feat, kd, feat


def _step(setting: Setting, modules: list[nn.Module], losses: Callable[[], Losses]) -> Step:
    fused = {"fused": True} if setting.on_gpu else {}
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    # A learning rate of zero does all the work of a step and leaves the weights, so that every step can be compared.
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, **fused)

    def run() -> tuple[Tensor, ...]:
        torch.manual_seed(3)  # the same masks in every variant
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(setting.device.type, setting.torch_dtype, enabled=setting.dtype != "fp32"):
            ce, kd, feat = losses()
        (ce + ALPHA * kd + BETA * feat).backward()
        optimizer.step()
        return ce.detach(), kd.detach(), feat.detach()

    return run


def _grid(setting: Setting) -> list[dict[str, Any]]:
    return [{"side": side} for side in ([64] if setting.quick and not setting.on_gpu else [64, 224])]


@benchmark(
    "dpk_step", summary="training step, ResNet-18 from ResNet-34 with 2-2 heads: forward, backward, SGD", grid=_grid
)
def dpk_step(setting: Setting, side: int) -> Case:
    """At 224 pixels the last stage has 7 x 7 cells; at 64 pixels, the size of CIFAR's maps, 2 x 2."""
    return step_case(setting, side, 256 if setting.on_gpu else 16)


def step_case(setting: Setting, side: int, batch: int) -> Case:
    """The case of one image size.

    Args:
        setting: device and dtype.
        side: of the images in pixels.
        batch: images.
    """
    images = images_for(batch, setting, side).contiguous(memory_format=torch.channels_last)
    targets = torch.arange(batch, device=setting.device) % CLASSES
    student, teacher = networks(setting)
    torch.manual_seed(1)
    options = {"encoder_depth": 2, "decoder_depth": 2, "image_size": side}
    model = DPK(copy.deepcopy(student), copy.deepcopy(teacher), **options)  # type: ignore[arg-type]

    def exact() -> Losses:
        own, other, stage = (copy.deepcopy(net).double() for net in (student, teacher, model.heads["layer4"]))
        torch.manual_seed(3)
        with torch.no_grad():
            return eager_losses(own, other, stage, images.double(), targets, None)

    def eager(share: float | None) -> Step:
        own, stage = copy.deepcopy(student), copy.deepcopy(model.heads["layer4"])
        return _step(setting, [own, stage], lambda: eager_losses(own, teacher, stage, images, targets, share))

    def ours(**changes: Any) -> Step:
        method = DPK(copy.deepcopy(student), copy.deepcopy(teacher), **{**options, **changes})
        method.heads.load_state_dict(model.heads.state_dict())
        return _step(setting, [method], lambda: our_losses(method, images, targets))

    same = Answer(exact, floor=FLOORS[setting.dtype])
    variants = [
        Variant("eager", eager(None), same, plain=True),
        Variant("fastmkd", ours(), same),
        Variant("fastmkd, teacher in bf16", ours(teacher_dtype=torch.bfloat16), Answer()),
        Variant("eager, fixed share", eager(0.5), Answer()),
        Variant("fastmkd, fixed share", ours(ratio=0.5), Answer()),
    ]
    return Case(
        label=f"{side} pixels",
        panel=f"ResNet-18 from ResNet-34, batch {batch}",
        variants=variants,
        baseline="eager",
        items=batch,
        params={"batch": batch, "side": side},
    )
