"""Images that keep different numbers of patches: the rule by saliency mass, and a ViT on such a choice."""

from __future__ import annotations

import copy
from fractions import Fraction
from itertools import pairwise

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

import fastmkd
from fastmkd import MaskedViT, keep_by_mass
from fastmkd.nn import RaggedKeep
from fastmkd.nn.spectrogram import SpectrogramTransformer
from fastmkd.ops.accuracy import judge
from fastmkd.ops.select_tokens import resize

COUNTS = (5, 16, 1, 9)


def by_hand(scores: list[float], mass: float, least: int, most: int) -> list[int]:
    """Adds the best patches one by one, in exact arithmetic; the share of the total is a float64."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    held, total, kept = Fraction(0), sum(map(Fraction, scores)), 0
    while kept < most and (kept < least or held < mass * float(total)):
        held += Fraction(scores[order[kept]])
        kept += 1
    return sorted(order[:kept])


@pytest.mark.parametrize("bounds", [(1, None), (3, 7), (5, 5)])
@pytest.mark.parametrize("mass", [0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("kind", ["softmax", "ties", "sparse"])
def test_the_smallest_number_that_holds_the_mass(kind, mass, bounds):
    g = torch.Generator().manual_seed(3)
    noise = torch.randn(20, 12, generator=g)
    scores = {"softmax": (3 * noise).softmax(1) * 6, "ties": (noise > 0.3) + 0.25, "sparse": noise.relu()}[kind].float()
    indices, starts = keep_by_mass(scores, mass, *bounds)
    expected = [by_hand(row, mass, bounds[0], bounds[1] or 12) for row in scores.tolist()]
    assert indices.dtype == torch.int64
    assert starts.dtype == torch.int32
    assert [indices[a:b].tolist() for a, b in pairwise(starts)] == expected


def test_an_image_without_saliency_keeps_the_least():
    keep = keep_by_mass(torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1e-30]]), 0.9, 2)
    assert keep.indices.tolist() == [0, 1, 0, 2]


def test_another_grid():
    saliency = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    expected = keep_by_mass(resize(saliency.view(3, 4, 4), (6, 5)).flatten(1), 0.6)
    found = keep_by_mass(saliency, 0.6, grid=(4, 4), target_grid=(6, 5))
    assert all(map(torch.equal, found, expected))
    assert torch.equal(found.visible(30).sum(1), found.counts)


SALIENCY = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("args", "options", "error", "match"),
    [
        (([1.0], 0.5), {}, TypeError, "saliency is list"),
        ((SALIENCY.long(), 0.5), {}, TypeError, "saliency is torch.int64"),
        ((SALIENCY[0], 0.5), {}, ValueError, "saliency has shape"),
        ((SALIENCY, 0.0), {}, ValueError, "mass is 0.0"),
        ((SALIENCY, float("nan")), {}, ValueError, "mass is nan"),
        ((SALIENCY, 0.5, 0), {}, ValueError, "min_keep is 0"),
        ((SALIENCY, 0.5, 3, 2), {}, ValueError, "min_keep is 3 and max_keep 2"),
        ((SALIENCY, 0.5, 1, 5), {}, ValueError, "max_keep 5"),
        ((-SALIENCY, 0.5), {}, ValueError, "negative"),
        ((SALIENCY / 0, 0.5), {}, ValueError, "infinity"),
        ((SALIENCY, 0.5), {"target_grid": (2, 2)}, ValueError, "without grid"),
        ((SALIENCY, 0.5), {"grid": (3, 2)}, ValueError, "grid is"),
        ((SALIENCY, 0.5), {"grid": (2, 2), "target_grid": (0, 2)}, ValueError, "target_grid is"),
    ],
)
def test_wrong_arguments_are_named(args, options, error, match):
    with pytest.raises(error, match=match):
        keep_by_mass(*args, **options)


def tiny(kind=VisionTransformer, **options):
    torch.manual_seed(0)
    defaults = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 2, "num_classes": 5}
    model = kind(**{**defaults, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def images(channels: int = 3, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    return torch.randn(4, channels, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def ragged(counts=COUNTS, patches: int = 16) -> RaggedKeep:
    g = torch.Generator().manual_seed(2)
    indices = [torch.randperm(patches, generator=g)[:count] for count in counts]
    return RaggedKeep(torch.cat(indices), torch.tensor([0, *counts]).cumsum(0).int())


def one_by_one(vit: MaskedViT, x: torch.Tensor, keep: RaggedKeep) -> torch.Tensor:
    """Each image alone, with its own patches."""
    parts = keep.indices.split(keep.counts.tolist())
    return torch.cat([vit(image[None], keep=part[None]) for image, part in zip(x, parts, strict=True)])


MODELS = {
    "vit": tiny,
    "deit_distilled": lambda: tiny(VisionTransformerDistilled),
    "deit3": lambda: tiny(no_embed_class=True, init_values=0.5),
    "clip": lambda: tiny(pre_norm=True, qk_norm=True),
    "registers": lambda: tiny(reg_tokens=3, qkv_bias=False),
    "mae": lambda: tiny(global_pool="avg"),
    "no_class_token": lambda: tiny(class_token=False, global_pool="avg"),
    "rectangular": lambda: tiny(img_size=(32, 40), patch_size=(8, 10), in_chans=1),
    "padded": lambda: tiny(img_size=30, dynamic_img_size=True, dynamic_img_pad=True),
    "own_scale": lambda: tiny(scale_attn_norm=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_image_is_as_if_alone(name):
    model = MODELS[name]()
    embed = model.patch_embed
    vit, x, keep = MaskedViT(model), images(embed.proj.in_channels, tuple(embed.img_size)), ragged()
    expected = one_by_one(vit, x, keep)
    for grad in (True, False):  # without gradients a CPU runs the blocks in place
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(vit(x, keep=keep), expected, rtol=1e-10, atol=1e-10)


def test_overlapping_patches():
    model = tiny(SpectrogramTransformer, img_size=(16, 28), stride=6, in_chans=1)
    vit, x, keep = MaskedViT(model), images(1, (16, 28)), ragged((3, 8, 1, 5), 8)
    torch.testing.assert_close(vit(x, keep=keep), one_by_one(vit, x, keep), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["vit", "mae"])
def test_gradients_are_those_of_the_images(name, checkpointing):
    model = MODELS[name]().train()
    vit, keep = MaskedViT(model), ragged()
    parameters, gradients = list(model.parameters()), []
    for run in (one_by_one, lambda vit, x, keep: vit(x, keep=keep)):
        x = images().requires_grad_()
        model.set_grad_checkpointing(checkpointing)
        gradients.append(torch.autograd.grad(run(vit, x, keep).square().sum(), [x, *parameters]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@torch.no_grad()
def test_in_float32(backend):
    exact = MaskedViT(tiny())
    vit, keep = copy.deepcopy(exact).float(), ragged()
    with fastmkd.backend(backend):
        out = vit(images().float(), keep=keep)
    plain = one_by_one(vit, images().float(), keep)
    verdict = judge(out, one_by_one(exact, images(), keep), plain)
    assert verdict.ok, verdict


def test_equal_counts_are_the_ordinary_keep():
    vit, keep = MaskedViT(tiny()), ragged((6, 6, 6, 6))
    torch.testing.assert_close(vit(images(), keep=keep), vit(images(), keep=keep.indices.view(4, 6)))


def test_autocast():
    vit, keep = MaskedViT(tiny(qk_norm=True).float()), ragged()
    expected = one_by_one(vit, images().float(), keep)
    with torch.autocast("cpu", torch.bfloat16):
        plain, out = one_by_one(vit, images().float(), keep), vit(images().float(), keep=keep)
    assert out.dtype == plain.dtype
    assert (out - expected).abs().max() <= 2 * (plain - expected).abs().max() + 1e-3


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: timm.create_model("eva02_tiny_patch14_224", img_size=56, depth=1), "rotary"),
        (lambda: timm.create_model("cait_xxs24_224", img_size=64, depth=1), "attends in its own way"),
        (lambda: tiny(global_pool="max"), "max pooling"),
        (lambda: tiny(global_pool="map", class_token=False), "map pooling"),
        (lambda: tiny(drop_path_rate=0.1).train(), "drops paths"),
        (lambda: tiny(attn_drop_rate=0.1).train(), "drops paths"),
        (lambda: tiny(patch_drop_rate=0.5).train(), "drops paths"),
    ],
)
def test_what_cannot_be_packed_says_why(model, why):
    vit = MaskedViT(model())
    with pytest.raises(ValueError, match=why):
        vit(torch.zeros(4, 3, 64, 64), keep=ragged())


def test_a_hook_on_a_block_is_refused():
    vit = MaskedViT(tiny())
    vit.model.blocks[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="block 1"):
        vit(images(), keep=ragged())


INDICES, STARTS = ragged()


@pytest.mark.parametrize(
    ("keep", "error", "match"),
    [
        (RaggedKeep(INDICES.int(), STARTS), TypeError, "keep.indices has dtype"),
        (RaggedKeep(INDICES, STARTS.long()), TypeError, "keep.starts has dtype"),
        (RaggedKeep(INDICES[None], STARTS), ValueError, "keep.indices has shape"),
        (RaggedKeep(INDICES, STARTS[:-1]), ValueError, "keep.starts has shape"),
        (RaggedKeep(INDICES, STARTS.to("meta")), ValueError, "keep.starts is on meta"),
        (RaggedKeep(INDICES[:-1], STARTS), ValueError, "keep.starts does not rise"),
        (RaggedKeep(INDICES, torch.tensor([0, 5, 5, 6, 31]).int()), ValueError, "at least one patch"),
        (RaggedKeep(INDICES + 1, STARTS), ValueError, "outside 0 to 15"),
        (RaggedKeep(torch.cat((INDICES[:1], INDICES[:-1])), STARTS), ValueError, "twice"),
    ],
)
def test_a_wrong_choice_is_named(keep, error, match):
    with pytest.raises(error, match=match):
        MaskedViT(tiny())(images(), keep=keep)


def test_saliency_and_intermediates_want_one_number_of_patches():
    vit = MaskedViT(tiny())
    with pytest.raises(ValueError, match="return_saliency gives"):
        vit(images(), keep=ragged(), return_saliency=True)
    with pytest.raises(TypeError, match="keep is a RaggedKeep"):
        vit.forward_intermediates(images(), keep=ragged())
