"""What the tests of MaskedViT share: small random models, and the comparisons with the oracle in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastmkd import MaskedViT
from fastmkd.reference import masked_vit_forward, masked_vit_intermediates, masked_vit_saliency


def randomize(model: nn.Module) -> nn.Module:
    """Every parameter takes part: class tokens and layer scales start near zero otherwise."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double().eval()


def pictures(model: nn.Module, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, model.patch_embed.proj.in_channels, *model.patch_embed.img_size, dtype=torch.float64)


def choose(batch: int, patches: int, k: int) -> torch.Tensor:
    return torch.rand(batch, patches).argsort(1)[:, :k]


def assert_same(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    assert mine.shape == theirs.shape
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def check_outputs(model: nn.Module) -> None:
    """Unmasked it is the model; masked it is the oracle, for one, half and all patches in any order."""
    vit, images = MaskedViT(model), pictures(model)
    patches = model.patch_embed.num_patches
    kept = [choose(3, patches, k) for k in (1, (patches + 1) // 2, patches)]
    expected = [masked_vit_forward(model, images, keep) for keep in kept]
    for grad in (True, False):  # without gradients a CPU runs plain blocks in place
        with torch.set_grad_enabled(grad):
            assert_same(vit(images), model(images))
            for keep, output in zip(kept, expected, strict=True):
                assert_same(vit(images, keep=keep), output)


def check_saliency(model: nn.Module) -> None:
    """The saliency is that of the full attention matrix, and asking for it changes no logit."""
    vit, images = MaskedViT(model), pictures(model)
    patches = model.patch_embed.num_patches
    for keep in (None, choose(3, patches, patches - 1)):
        for include_prefix in (False, True):
            logits, saliency = vit(images, keep, return_saliency=True, include_prefix=include_prefix)
            assert_same(saliency, masked_vit_saliency(model, images, keep, include_prefix))
            assert_same(logits, masked_vit_forward(model, images, keep))
    assert vit.float()(images.float(), return_saliency=True)[1].dtype == torch.float32
    vit.double()


def gradients(model: nn.Module, *outputs: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of a weighing of all entries of the outputs; zeros where a parameter has no part."""
    loss = 0.0
    for i, output in enumerate(outputs):
        weights = torch.linspace(i - 1, 1, output.numel(), dtype=output.dtype).view_as(output)
        loss = loss + (output * weights).sum() + output.square().mean()
    parameters = list(model.parameters())
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


def seeded(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Some models draw random coordinates for their rotary positions in training: the same ones here."""
    torch.manual_seed(1)
    return function(*args, **options)


def check_gradients(model: nn.Module) -> None:
    """In training mode every parameter's gradient is the oracle's."""
    model.train()
    vit, images = MaskedViT(model), pictures(model)
    patches, scored = model.patch_embed.num_patches, model.num_prefix_tokens > 0
    keep = choose(3, patches, (patches + 1) // 2)
    theirs = [seeded(masked_vit_forward, model, images, keep)]
    if scored:
        theirs.append(seeded(masked_vit_saliency, model, images, keep))
        mine = list(seeded(vit, images, keep, return_saliency=True))
    else:
        mine = [vit(images, keep)]
    for (name, _), a, b in zip(
        model.named_parameters(), gradients(model, *mine), gradients(model, *theirs), strict=True
    ):
        assert torch.isfinite(b).all(), name
        if name.startswith("rope."):  # timm computes learnt angles in float32 whatever the model's dtype
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        else:
            assert_same(a, b)
    model.eval()


def check_intermediates(model: nn.Module) -> None:
    """Block outputs are the oracle's, and only the blocks that are needed run."""
    vit, images = MaskedViT(model), pictures(model)
    patches, depth = model.patch_embed.num_patches, len(model.blocks)
    keep = choose(3, patches, (patches + 1) // 2)
    expected = masked_vit_intermediates(model, images, keep)
    for indices, blocks in (([0], [0]), ([-1], [depth - 1]), (None, list(range(depth)))):
        for grad in (True, False):  # without gradients a CPU runs plain blocks in place
            with torch.set_grad_enabled(grad):
                outputs = vit.forward_intermediates(images, indices=indices, keep=keep)
            for output, i in zip(outputs, blocks, strict=True):
                assert_same(output, expected[i])
    seen: list[int] = []
    handles = [b.register_forward_hook(lambda *_, i=i: seen.append(i)) for i, b in enumerate(model.blocks)]
    vit.forward_intermediates(images, indices=[0], keep=keep)
    for handle in handles:
        handle.remove()
    assert seen == [0]


def rows_of_last_mlp(model: nn.Module) -> int:
    """How many tokens of the last block go through its MLP."""
    seen = []
    handle = model.blocks[-1].mlp.register_forward_hook(lambda _module, args, _out: seen.append(args[0].shape[1]))
    MaskedViT(model)(pictures(model))
    handle.remove()
    assert len(seen) == 1
    return seen[0]
