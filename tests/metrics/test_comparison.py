"""compare(): hooks, freed activations, modes, names, and what it refuses."""

from __future__ import annotations

import copy
import re
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmkd
from fastmkd.metrics.comparison import layer_names
from fastmkd.metrics.cosine import compare_cosine


class TinyNet(nn.Module):
    """A stem, two stages of blocks, a head."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.stages = nn.ModuleList(nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(width, 4)
        self.forwards = 0

    def forward(self, images: Tensor) -> Tensor:
        self.forwards += 1
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


def batches(*sizes: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 8, 8, generator=g) for size in sizes]


def features(model: nn.Module, names: list[str], images: Tensor) -> list[Tensor]:
    kept: list[Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, i, out: kept.append(out.detach().clone()))
        for name in names
    ]
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()
    return kept


def test_equals_cka_of_collected_features() -> None:
    torch.manual_seed(0)
    a, b, data = TinyNet(), TinyNet(9), batches(16, 16, 7)
    names = ["stem.0", "stages.0", "stages.1", "head"]
    found = fastmkd.compare(a, b, [(x, torch.zeros(len(x))) for x in data], names)
    acc = fastmkd.MinibatchCKA()
    # stem.0 is overwritten by the ReLU after it: its Gram must be made before that.
    single = [acc.update(features(a, names, x), features(b, names, x)) for x in data]
    torch.testing.assert_close(found.cka, acc.compute())
    torch.testing.assert_close(found.per_batch, torch.stack(single))
    assert found.names_a == found.names_b == names


def test_activations_are_freed_while_the_network_runs() -> None:
    model = nn.Sequential(*[nn.Linear(5, 5) for _ in range(6)])
    alive: list[Any] = []
    most = 0

    def watch(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(output))
        most = max(most, sum(ref() is not None for ref in alive))

    with_hooks = [str(i) for i in range(6)]
    for layer in model:
        layer.register_forward_hook(watch)
    fastmkd.compare(model, model, [torch.randn(8, 5)] * 2, with_hooks)
    assert len(alive) == 12
    assert most <= 2, "the output of a layer outlived the next layer"


def test_same_network_runs_once_and_modes_and_hooks_come_back() -> None:
    model = TinyNet()
    model.stem.eval()
    before = {name: module.training for name, module in model.named_modules()}
    running = model.stem[1].running_mean.clone()
    found = fastmkd.compare(model, model, batches(8, 8), (["stem"], ["stages.*", "stem"]))
    assert found.cka.shape == (1, 3)
    assert model.forwards == 2
    torch.testing.assert_close(found.cka[0, 2], torch.tensor(1.0, dtype=torch.float64))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(model.stem[1].running_mean, running)
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(RuntimeError):
        fastmkd.compare(model, model, [torch.randn(8, 1, 8, 8)], ["stem"])
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training


def test_small_batches_are_left_out_with_a_warning() -> None:
    model = TinyNet()
    with pytest.warns(RuntimeWarning, match="3 images came in batches of fewer than 4"):
        found = fastmkd.compare(model, model, batches(8, 3), ["stem"])
    assert found.per_batch.shape == (1, 1, 1)
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match=r"^loader gave no batch of at least 4 images"):
        fastmkd.compare(model, model, batches(3), ["stem"])
    with pytest.raises(ValueError, match=r"^loader gave no batch of at least 4 images"):
        fastmkd.compare(model, model, [], ["stem"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_images_are_cast_to_the_network(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    images, plain = batches(16), TinyNet()
    other = copy.deepcopy(plain).to(dtype)
    expected = fastmkd.compare(plain, plain, images, ["stages.1"]).cka
    torch.testing.assert_close(fastmkd.compare(other, plain, images, ["stages.1"]).cka, expected, rtol=0, atol=1e-2)
    torch.testing.assert_close(compare_cosine(other, plain, images, ("head",) * 2).item(), 1.0, rtol=0, atol=1e-2)
    words = nn.Sequential(nn.Embedding(9, 5, dtype=dtype), nn.Flatten())
    assert fastmkd.compare(words, words, [torch.randint(9, (8, 3))], ["1"]).cka == pytest.approx(1.0)  # stay integers


def test_a_batch_without_images_is_said_to_be_one() -> None:
    model, images = TinyNet(), torch.randn(8, 3, 8, 8)
    for batch, said in (
        ({"x": images}, "loader gave a dict; expected images, or a tuple that starts with them."),
        (({"x": images},), "loader gave a tuple that starts with a dict; expected images"),
        ((), "loader gave a tuple; expected images"),
    ):
        with pytest.raises(TypeError, match=re.escape(said)):
            fastmkd.compare(model, model, [batch], ["stem"])
        with pytest.raises(TypeError, match=re.escape(said)):
            compare_cosine(model, model, [batch], ("stem", "stem"))


def test_layer_names() -> None:
    import timm

    resnet = timm.create_model("resnet18", num_classes=2)
    assert layer_names(resnet) == [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert layer_names(resnet, ["layer*.1", "conv1"]) == [*(f"layer{i}.1" for i in (1, 2, 3, 4)), "conv1"]
    assert layer_names(TinyNet()) == ["stem.0", "stem.1", "stem.2", "stages.0", "stages.1"]
    with pytest.raises(ValueError, match=r"model_a has no module 'stage.0'; modules with like names are stages.0"):
        fastmkd.compare(TinyNet(), TinyNet(), [], ["stage.0"])
    with pytest.raises(TypeError, match="the string 'stem'"):
        fastmkd.compare(TinyNet(), TinyNet(), [], "stem")
    with pytest.raises(ValueError, match="no blocks"):
        layer_names(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="is empty"):
        layer_names(TinyNet(), [])


class Odd(nn.Module):
    """Runs one layer twice, one never, and one that returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.table = nn.Linear(3, 3), nn.Linear(3, 3), Table()

    def forward(self, x: Tensor) -> Tensor:
        return self.table(self.twice(self.twice(x)))["x"]


class Table(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": x}


@pytest.mark.parametrize(
    ("layer", "error", "said"),
    [
        ("twice", ValueError, "'twice' runs more than once"),
        ("never", ValueError, "'never' did not run"),
        ("table", TypeError, "'table' returns dict"),
    ],
)
def test_layers_that_cannot_be_compared(layer: str, error: type[Exception], said: str) -> None:
    model = Odd()
    with pytest.raises(error, match=said):
        fastmkd.compare(model, model, [torch.randn(8, 3)], [layer])


class TokensFirst(nn.Module):
    """A sequence of tokens around which the images come first: ``(B, N, D)`` in and out, ``(N, B, D)`` inside."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
        self.out = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(x.transpose(0, 1)).transpose(0, 1))


def test_layers_whose_first_dimension_is_not_the_image() -> None:
    import timm

    tiny = {"img_size": 56, "window_size": 7, "depths": (1, 1), "num_heads": (2, 2), "embed_dim": 16, "num_classes": 3}
    swin = timm.create_model("swin_tiny_patch4_window7_224", **tiny)
    images = [torch.randn(8, 3, 56, 56)]
    windows = "layers.0.blocks.0.attn"
    said = re.escape(
        f"the layer {windows!r} returns shape (32, 49, 16) for 8 images; its first dimension is not the image (but a "
        "window, or a token). Name a layer that returns one entry an image, such as the block around it."
    )
    for layers in ([windows], [windows, "layers.1.blocks.0.attn"], ([windows.removesuffix(".attn")], [windows])):
        with pytest.raises(ValueError, match=said):
            fastmkd.compare(swin, swin, images, layers)
    with pytest.raises(ValueError, match=said):
        compare_cosine(swin, swin, images, (windows, windows))
    assert not any(module._forward_hooks for module in swin.modules())
    assert fastmkd.compare(swin, swin, images, ["layers.*.blocks.0"]).cka.shape == (2, 2)
    assert fastmkd.compare(swin, swin, images).names_a == ["layers.0", "layers.1"]  # chosen by itself

    sequence, tokens = TokensFirst(), [torch.randn(8, 5, 8)]
    with pytest.raises(ValueError, match=r"'encoder\.layers\.0' returns shape \(5, 8, 8\) for 8 images"):
        fastmkd.compare(sequence, sequence, tokens)  # not left out in silence
    assert fastmkd.compare(sequence, sequence, tokens, ["out"]).cka.isfinite().all()


def test_blocks_chosen_by_itself_that_hold_no_image_an_entry_are_named() -> None:
    import timm

    tnt = timm.create_model("tnt_s_patch16_224", img_size=32, depth=1, num_classes=2)  # first the pixels of each patch
    with pytest.raises(ValueError, match=r"'blocks\.0' returns shape \(16, 16, \d+\) for 4 images"):
        fastmkd.compare(tnt, tnt, [torch.randn(4, 3, 32, 32)])
    assert fastmkd.compare(tnt, tnt, [torch.randn(4, 3, 32, 32)], ["blocks.0.mlp"]).cka.shape == (1, 1)
