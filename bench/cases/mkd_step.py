"""An MKD training step, RetinaNet with ResNet-50 from ResNet-101: its masked backbone, and the whole step.

The baseline, "multiplied", is what one writes without the library: the map times the mask before each layer that looks
beyond one pixel, ordinary batch norm, every module of the decoders by itself, maps for both losses. The "dense twin"
takes batch statistics over visible positions, as the library does, in plain PyTorch, which costs it time; it is what
results are judged by. "plain, unmasked" is the step whose student sees everything. Teacher, pyramid, heads and
optimizer are the same in all, and the teacher runs no more than its backbone and pyramid in any.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastmkd import MKD, convert_cnn, pack, random_mask
from fastmkd.reference.dense import dense_twin, upsampled

from ..models import exact_dtype
from ..multiplied import Multiplied
from ..registry import Answer, Case, Setting, Variant, benchmark
from .masked_resnet import FLOORS, read_gradients, step
from .mkd_decoder import EAGER, GLOBAL_WEIGHT, WEIGHT

SIDE, CELL, CLASSES = 512, 32, 80
KINDS = ("masked backbone", "training step")

Targets = list[dict[str, Tensor]]
Work = tuple[nn.Module, Callable[[], Tensor]]  # what is trained, and its loss


def networks(setting: Setting, names: tuple[str, str] = ("resnet50", "resnet101"), **options: Any) -> list[nn.Module]:
    """Student in training mode and frozen teacher, random weights, channels-last.

    Args:
        setting: where they go.
        names: backbones of student and teacher.
        options: of `build_detector`.
    """
    from fastmkd.nn.detectors import build_detector  # torchvision, which not every benchmark needs

    torch.manual_seed(0)
    size = {"image_size": (SIDE, SIDE), **options}
    pair = [build_detector("retinanet", name, CLASSES, **size) for name in names]
    student, teacher = (net.to(setting.device, memory_format=torch.channels_last) for net in pair)  # type: ignore[call-overload]
    return [student.train(), teacher.eval().requires_grad_(False)]


def scenes(batch: int, side: int, setting: Setting) -> tuple[list[Tensor], Targets]:
    """Random images with four boxes each; the same for each call.

    Args:
        batch: images.
        side: pixels.
        setting: where they go.
    """
    generator = torch.Generator().manual_seed(1)
    images, targets = list(torch.rand(batch, 3, side, side, generator=generator).to(setting.device)), []
    for _ in images:
        corner = torch.rand(4, 2, generator=generator) * side / 2
        boxes = torch.cat([corner, corner + side / 8 + torch.rand(4, 2, generator=generator) * side / 4], 1)
        labels = torch.randint(1, CLASSES + 1, (4,), generator=generator)
        targets.append({"boxes": boxes.to(setting.device), "labels": labels.to(setting.device)})
    return images, targets


class MaskedBody(nn.Module):
    """A detector's body on masked images, in plain PyTorch.

    Args:
        network: the body as `Multiplied` or as a dense twin.
        visible: ``(B, gh, gw)`` bool.
    """

    def __init__(self, network: nn.Module, visible: Tensor) -> None:
        super().__init__()
        self.network, self.visible = network, visible

    def forward(self, images: Tensor) -> Any:
        """Returns the body's maps, zeros where hidden.

        Args:
            images: ``(B, 3, H, W)``.
        """
        maps = self.network(images, self.visible)
        for name, x in maps.items():
            maps[name] = x * upsampled(self.visible, x.shape[2:])[:, None]
        return maps


BODIES: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "plain, unmasked": lambda body, visible: body,
    "multiplied": lambda body, visible: MaskedBody(Multiplied(body), visible),
    "dense twin": lambda body, visible: MaskedBody(dense_twin(body), visible),
}


def eager_step(
    student: Any, teacher: Any, heads: nn.ModuleDict, images: list[Tensor], targets: Targets, visible: Tensor
) -> Tensor:
    """MKD's loss without the library.

    Args:
        student: a detector whose body is one of `BODIES`.
        teacher: a detector.
        heads: decoders and relations.
        images: ``(3, H, W)`` each.
        targets: as torchvision has them.
        visible: ``(B, gh, gw)`` bool.
    """
    seen: dict[str, Any] = {}
    hook = student.backbone.register_forward_hook(lambda _, args, out: seen.update(images=args[0], levels=out))
    losses = student(images, targets)
    hook.remove()
    with torch.no_grad():
        taught = teacher.backbone(seen["images"])
    maps, levels = list(seen["levels"].values()), list(taught.values())
    feat, relation = EAGER("decoders and losses", heads, maps, levels, visible)
    return sum(losses.values()) + WEIGHT * feat + GLOBAL_WEIGHT * relation


def _grid(setting: Setting) -> list[dict[str, Any]]:
    shares = [30] if setting.quick and not setting.on_gpu else [10, 30]
    return [{"kind": kind, "percent": percent} for kind in KINDS for percent in shares]


@benchmark(
    "mkd_step", summary="MKD step, RetinaNet R50 from R101 at 512 pixels: masked backbone, whole step", grid=_grid
)
def mkd_step(setting: Setting, kind: str, percent: int) -> Case:
    """Random weights, images and masks; batch norms learn; SGD with momentum."""
    student, teacher = networks(setting)
    return step_case(setting, student, teacher, kind, percent, *scenes(16 if setting.on_gpu else 4, SIDE, setting))


def step_case(
    setting: Setting,
    student: Any,
    teacher: Any,
    kind: str,
    percent: int,
    images: list[Tensor],
    targets: Targets,
    **options: Any,
) -> Case:
    """The case of one kind for a pair of detectors.

    Args:
        setting: device and dtype.
        student: in training mode; copied.
        teacher: in eval mode.
        kind: one of `KINDS`.
        percent: share of the cells that is hidden.
        images: ``(3, H, W)`` each, of one size that cells tile.
        targets: as torchvision has them.
        options: of `MKD`.
    """
    batch, grid = len(images), tuple(side // CELL for side in images[0].shape[1:])
    draw = lambda: torch.Generator().manual_seed(4)  # noqa: E731
    visible = random_mask(batch, grid, percent / 100, generator=draw()).to(setting.device)  # type: ignore[arg-type]
    build = _backbone if kind == KINDS[0] else _whole
    variants = build(setting, student, teacher, images, targets, visible, percent / 100, draw, **options)
    return Case(
        label=f"{percent} % hidden",
        panel=f"{kind}, RetinaNet R50 from R101, batch {batch}",
        variants=variants,
        baseline="multiplied",
        items=batch,
        min_rounds=5,
        params={"batch": batch, "percent": percent, "side": images[0].shape[1], "kind": kind},
    )


def _backbone(
    setting: Setting,
    student: Any,
    _teacher: Any,
    images: list[Tensor],
    _targets: Targets,
    visible: Tensor,
    *_: Any,
    **__: Any,
) -> list[Variant]:
    """Body alone, from a batch tensor to the sum of its squared maps."""
    whole = torch.stack(images).to(memory_format=torch.channels_last)

    def size(maps: Any) -> Tensor:
        wide = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in maps.values())
        return torch.stack([x.square().mean() for x in wide]).sum()

    def eager(way: str, wide: torch.dtype = torch.float32) -> Work:
        own, x = BODIES[way](copy.deepcopy(student.backbone.body).to(wide), visible), whole.to(wide)
        return own, lambda: size(own(x))

    packed = convert_cnn(copy.deepcopy(student.backbone.body))

    def ours() -> Tensor:
        return size({name: x.to_dense() for name, x in packed(pack(whole, visible)).items()})

    return _variants(setting, eager, (packed, ours))


def _whole(
    setting: Setting,
    student: Any,
    teacher: Any,
    images: list[Tensor],
    targets: Targets,
    visible: Tensor,
    ratio: float,
    draw: Callable[[], torch.Generator],
    **options: Any,
) -> list[Variant]:
    """Everything from the images to new weights."""
    method = MKD(copy.deepcopy(student), teacher, mask_ratio=ratio, image_size=images[0].shape[1], **options)
    heads = copy.deepcopy(method.heads)

    def eager(way: str, wide: torch.dtype = torch.float32) -> Work:
        own: Any
        own, other, parts = (copy.deepcopy(net).to(wide) for net in (student, teacher, heads))
        pictures = [image.to(wide) for image in images]
        boxes = [{**target, "boxes": target["boxes"].to(wide)} for target in targets]
        own.backbone.body = BODIES[way](own.backbone.body, visible)
        both = nn.ModuleList([own, parts])
        return both, lambda: eager_step(own, other, parts, pictures, boxes, visible)

    def ours() -> Tensor:
        method.generator = draw()  # the same mask in every step
        return method(images, targets).loss

    return _variants(setting, eager, (nn.ModuleList([method.student, method.heads]), ours))


def _variants(setting: Setting, eager: Callable[..., Work], ours: Work) -> list[Variant]:
    """Steps of all ways; the twin's and ours must agree on the loss and some gradients."""

    def exact() -> list[Tensor]:
        network, loss = eager("dense twin", exact_dtype(setting))
        value = loss()
        value.backward()
        return read_gradients(network)(value.detach())

    same = Answer(exact, floor=FLOORS[setting.dtype])

    def variant(name: str, work: Work) -> Variant:
        masked = name in ("dense twin", "fastmkd")
        run, read = step(setting, *work), read_gradients(work[0])
        return Variant(name, run, same if masked else Answer(), plain=name == "dense twin", read=read)

    return [*(variant(name, eager(name)) for name in BODIES), variant("fastmkd", ours)]
