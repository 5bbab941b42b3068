"""A training step of ResNet-50 on masked images: its time, the share of the plan in it, and its memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmkd import block_mask, convert_cnn, pack
from fastmkd.nn.plan import MaskPlan
from fastmkd.reference import dense_twin

from ..masked_layers import runs_here
from ..models import exact_dtype, images_for
from ..multiplied import Multiplied
from ..registry import Answer, Case, Setting, Variant, benchmark

KINDS = ("training step", "plan building", "peak memory")
CHECKED = 4  # weights whose gradients are compared, the first and the last among them
# Of the loss, and of the gradients: rectifiers and max pooling choose, and where rounding changes one choice, a whole
# pixel's gradient goes elsewhere (the float32 twin itself is off by some percent). The layers are judged strictly by
# the layer benchmarks.
FLOORS = {"fp32": (1e-4, *[0.1] * CHECKED), "bf16": (2e-2, *[0.2] * CHECKED)}

Loss = Callable[[], Tensor]


def step(setting: Setting, network: nn.Module, loss: Loss, keep_gradients: bool = False) -> Callable[[], Tensor]:
    """Forward, backward and SGD with momentum.

    Args:
        setting: half precisions run the forward under autocast.
        network: whose parameters are trained.
        loss: the forward.
        keep_gradients: zero the gradients in place, so that their memory does not count as the step's own.
    """
    # A learning rate of zero does all the work of a step and leaves the weights, so that every step can be compared.
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9)

    def run() -> Tensor:
        optimizer.zero_grad(set_to_none=not keep_gradients)
        with torch.autocast(setting.device.type, setting.torch_dtype, enabled=setting.dtype != "fp32"):
            value = loss()
        value.backward()
        optimizer.step()
        return value.detach()

    return run


def read_gradients(network: nn.Module) -> Callable[[Tensor], list[Tensor]]:
    """Adds to a step's loss the gradients of a few weights that lie evenly between first and last layer."""
    weights = [p for p in network.parameters() if p.dim() > 1]
    chosen = [weights[round(i * (len(weights) - 1) / (CHECKED - 1))] for i in range(CHECKED)]

    def read(loss: Tensor) -> list[Tensor]:
        gradients = [w.grad for w in chosen if w.grad is not None]
        return [loss, *(g.clone(memory_format=torch.contiguous_format) for g in gradients)]

    return read


def plan_building(used: MaskPlan) -> Callable[[], None]:
    """Everything that a step derives from its mask: a new plan, and each of the tables that `used` has by now."""

    def run() -> None:
        plan = MaskPlan(used.visible)
        for cell, window, transposed in used._tables:
            plan._table(cell, window, transposed)
        for cell, window in used._inside:
            plan.inside(cell, window)

    return run


def _grid(setting: Setting) -> list[dict[str, Any]]:
    if not runs_here(setting):
        return []
    shares = [75] if setting.quick and not setting.on_gpu else [10, 50, 75]
    steps = [{"kind": KINDS[0], "percent": percent} for percent in shares]
    return steps + [{"kind": kind, "percent": 75} for kind in KINDS[1:]]


@benchmark(
    "masked_resnet", summary="ResNet-50 training step, plan building, peak memory under a block mask", grid=_grid
)
def masked_resnet(setting: Setting, kind: str, percent: int) -> Case:
    """Random weights (no residual branch starts at zero) and images; cells of 32 x 32 pixels."""
    torch.manual_seed(0)
    network = timm.create_model("resnet50", zero_init_last=False)
    case = step_case(setting, network, kind, percent, images_for(256 if setting.on_gpu else 16, setting))
    case.panel = f"ResNet-50 {case.panel}"
    return case


def step_case(setting: Setting, network: nn.Module, kind: str, percent: int, images: Tensor, cell: int = 32) -> Case:
    """The case of one kind for a network; a new plan is made in every masked step.

    Args:
        setting: device and dtype.
        network: on the CPU; copied.
        kind: one of `KINDS`.
        percent: share of the cells that a block mask hides.
        images: ``(B, 3, H, W)``.
        cell: side of a cell in pixels.
    """
    batch, grid = images.shape[0], (images.shape[2] // cell, images.shape[3] // cell)
    visible = block_mask(batch, grid, percent / 100, generator=torch.Generator().manual_seed(4)).to(setting.device)
    images = images.to(memory_format=torch.channels_last)
    network = network.train().to(setting.device)
    targets = torch.randint(network.num_classes, (batch,), device=setting.device)

    def variant(name: str, own: nn.Module, logits: Callable[[], Tensor], answer: Answer, **more: Any) -> Variant:
        run = step(setting, own, lambda: F.cross_entropy(logits(), targets), keep_gradients=kind == KINDS[2])
        return Variant(name, run, answer, read=read_gradients(own), **more)

    def exact() -> list[Tensor]:
        wide = dense_twin(network).to(exact_dtype(setting))
        with torch.backends.cudnn.flags(allow_tf32=False):
            loss = F.cross_entropy(wide(images.to(exact_dtype(setting)), visible), targets)
            loss.backward()
        return read_gradients(wide)(loss.detach())

    packed = convert_cnn(copy.deepcopy(network))
    if kind == KINDS[1]:
        used = MaskPlan(visible)
        F.cross_entropy(packed(pack(images, used)), targets).backward()
        variants = [
            variant("fastmkd", packed, lambda: packed(pack(images, visible)), Answer()),
            Variant("plan building", plan_building(used), Answer()),
        ]
        baseline = "fastmkd"
    else:
        masked = Answer(exact, floor=FLOORS[setting.dtype])
        plain = copy.deepcopy(network).to(memory_format=torch.channels_last)
        multiplied = Multiplied(copy.deepcopy(plain))
        twin = dense_twin(plain)
        variants = [
            variant("plain, unmasked", plain, lambda: plain(images), Answer()),
            variant("multiplied", multiplied, lambda: multiplied(images, visible), Answer()),
            variant("dense twin", twin, lambda: twin(images, visible), masked, plain=True),
            variant("fastmkd", packed, lambda: packed(pack(images, visible)), masked),
        ]
        baseline = "plain, unmasked" if kind == KINDS[2] else "dense twin"
    return Case(
        label=f"{percent} % hidden",
        panel=f"{kind}, batch {batch}",
        variants=variants,
        baseline=baseline,
        items=batch if kind == KINDS[0] else 0,
        quantity="memory" if kind == KINDS[2] else "time",
        min_rounds=5,
        params={"batch": batch, "percent": percent, "grid": list(grid)},
    )
