"""Long runs: masks, sizes and batches that never stay the same, and memory, caches and file handles that do."""

from __future__ import annotations

import gc
import os
import random
import resource
import sys
from functools import partial
from pathlib import Path

import dpk_networks
import pytest
import torch
import torch.nn.functional as F
from dense_nets import SMALL, Segmenter
from timm.models import resnet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import fastmkd
from fastmkd.ops import cache, choice

MOST_GROWTH = 24 * 2**20  # of the process's memory: what an allocator cuts up for hundreds of sizes
PAGE = resource.getpagesize()


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    stages = {"layers": (1, 1, 1, 1), "channels": (8, 8, 12, 16), "stem_width": 4, "num_classes": 5}
    vit = partial(VisionTransformer, **tiny)
    segmenters = Segmenter(), Segmenter((4, 8, 8, 12), seed=1)
    return {
        "packed": fastmkd.convert_cnn(resnet.ResNet(resnet.BasicBlock, **stages)),
        "vit": fastmkd.MaskedViT(vit(dynamic_img_size=True)),
        "maskedkd": fastmkd.MaskedKD(vit(), vit(), keep_mass=0.8),
        "dmae": fastmkd.DMAE(vit(), vit(), decoder_depth=1, decoder_width=24, decoder_heads=2),
        "dpk": dpk_networks.make(layers={"stem": "stem", "last": "last"}).float(),
        "mkd": fastmkd.MKD(*segmenters, mask_ratio=0.25, **SMALL),
    }


def step(name: str, network: nn.Module, draw: random.Random) -> torch.Tensor:
    """The loss of a network on a batch of a size and with a mask that are drawn."""
    batch = draw.randint(2, 6)
    targets = torch.randint(0, 5, (batch,))
    if name == "packed":
        gh, gw = draw.randint(1, 4), draw.randint(1, 4)
        visible = fastmkd.random_mask(batch, (gh, gw), draw.random() * 0.9)
        return F.cross_entropy(network(fastmkd.pack(torch.randn(batch, 3, 32 * gh, 32 * gw), visible)), targets)
    if name == "vit":
        side = draw.randint(2, 6)
        keep = torch.rand(batch, side * side).argsort(1)[:, : draw.randint(1, side * side)]
        logits, saliency = network(torch.randn(batch, 3, 8 * side, 8 * side), keep=keep, return_saliency=True)
        return F.cross_entropy(logits, targets) + 0 * saliency.sum()
    if name == "mkd":
        size = 32 * draw.randint(2, 3), 32 * draw.randint(2, 3)
        network.mask_ratio = draw.choice((0.1, 0.25, 0.5))
        return network(torch.randn(2, 3, *size), torch.randint(0, 3, (2, *size))).loss
    size = 24 if name == "dpk" else 32
    return network(torch.randn(batch, 3, size, size), targets).loss


def cached() -> dict[str, int]:
    """Entries of every cache of the package, by name."""
    sizes = {"ops.choice._chosen": len(choice._chosen), "ops.cache._known": len(cache._known)}
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("fastmkd"):
            for name, value in vars(module).items():
                if getattr(value, "__module__", None) == module_name and hasattr(value, "cache_info"):
                    sizes[f"{module_name}.{name}"] = value.cache_info().currsize
    return sizes


def resources() -> dict[str, int]:
    gc.collect()
    tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
    memory = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
    return {"memory": memory, "tensors": tensors, "files": len(os.listdir("/proc/self/fd")), **cached()}


def soak(steps: int, warm_up: int) -> tuple[dict[str, int], dict[str, int]]:
    """What the process holds after the warm-up and at the end."""
    trained = networks()
    optimizers = {name: torch.optim.AdamW(net.parameters(), 1e-4) for name, net in trained.items()}
    draw, before, losses = random.Random(0), {}, []
    torch.manual_seed(1)
    for i in range(steps):
        if i == warm_up:
            before = resources()
        name = list(trained)[i % len(trained)]
        loss = step(name, trained[name].train(), draw)
        loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad(set_to_none=i % 2 == 0)
        losses.append(float(loss.detach()))
    for optimizer in optimizers.values():
        optimizer.zero_grad()
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    return before, resources()


def assert_flat(before: dict[str, int], after: dict[str, int]) -> None:
    assert after["memory"] - before["memory"] < MOST_GROWTH
    assert after["files"] == before["files"]
    assert after["tensors"] <= before["tensors"] + 20
    assert {"fastmkd.ops.tap_locate.locate", "ops.choice._chosen"} <= after.keys()
    grown = {name: size - before.get(name, 0) for name, size in after.items() if name not in ("memory", "tensors")}
    assert {name: more for name, more in grown.items() if more > 8} == {}


def test_memory_caches_and_files_stay_as_they_are():
    assert_flat(*soak(300, 100))


@pytest.mark.long
def test_thousands_of_steps():
    before, after = soak(4000, 1500)  # until then libraries fill their caches of shapes
    print(before, after, sep="\n")  # the numbers of docs/reliability.md
    assert_flat(before, after)
