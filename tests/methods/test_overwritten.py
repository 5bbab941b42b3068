"""Layers whose output a later one overwrites: what is compared is what the layer returned, in every method."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

import fastmkd
from fastmkd.methods import FeatureKD
from fastmkd.methods.features import observe_maps, probe

TARGETS = torch.tensor([0, 1, 2, 3])
LAYERS = {"stem.1": "stem.1"}


class Cnn(nn.Module):
    """A network whose layers work in place, or the same one whose layers do not."""

    def __init__(self, channels: int, inplace: bool, last: nn.Module | None = None) -> None:
        super().__init__()
        stem = nn.Conv2d(3, channels, 3, 4, 1), nn.BatchNorm2d(channels), nn.ReLU(inplace)
        self.stem = nn.Sequential(*stem, *([] if last is None else [last]))
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).mean((2, 3)))


def networks(inplace: bool) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return Cnn(4, inplace), Cnn(6, inplace)


def pictures() -> Tensor:
    return torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def feature_kd(base: str, inplace: bool, **options) -> nn.Module:
    return FeatureKD(*networks(inplace), base, LAYERS, image_size=24, **options)


def dpk(inplace: bool, **options) -> nn.Module:
    options = {"encoder_depth": 1, "decoder_depth": 1, "width": 16, "image_size": 24, **options}
    return fastmkd.DPK(*networks(inplace), LAYERS, **options)


def dense_kd(inplace: bool, **options) -> nn.Module:
    return fastmkd.DenseKD(*networks(inplace), "fitnet", layers=LAYERS, image_size=64, **options)


BASES = ("fitnet", "at", "reviewkd", "crd-batch", "align")
MAKERS = {base: lambda inplace, base=base, **o: feature_kd(base, inplace, **o) for base in BASES}
MAKERS |= {"dpk": dpk, "dense-kd": dense_kd}


def learned(method: nn.Module, compiled: bool = False) -> list[Tensor]:
    torch.manual_seed(3)
    run = torch.compile(method, backend="aot_eager") if compiled else method
    out = run(pictures(), TARGETS)
    out.loss.backward()
    return [out.loss, *(p.grad for p in method.student.parameters())]


def same_heads(method: nn.Module, other: nn.Module) -> nn.Module:
    method.heads.load_state_dict(other.heads.state_dict())
    return method


@pytest.mark.parametrize("name", MAKERS)
def test_methods_compare_what_the_layer_returned(name):
    plain, inplace = MAKERS[name](False), MAKERS[name](True)
    torch.testing.assert_close(learned(same_heads(inplace, plain)), learned(plain))


@pytest.mark.parametrize("name", ["fitnet", "dpk", "dense-kd"])
def test_and_compiled(name):
    plain, inplace = MAKERS[name](False), MAKERS[name](True)
    torch.testing.assert_close(learned(same_heads(inplace, plain), compiled=True), learned(plain))


@pytest.mark.parametrize("name", ["fitnet", "dpk", "dense-kd"])
def test_and_of_a_compiled_teacher(name, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, *, dynamic, mode: real(fn, backend="aot_eager", dynamic=dynamic))
    plain, inplace = MAKERS[name](False), MAKERS[name](True, teacher_compile=True)
    torch.testing.assert_close(learned(same_heads(inplace, plain)), learned(plain))


def test_layers_of_a_resnet():
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=5).eval()
    names = [name for name, part in network.named_modules() if isinstance(part, nn.Conv2d | nn.BatchNorm2d)]
    names += ["layer1", "layer2", "layer3", "layer4", "layer4.0", "layer4.1.act2"]
    right = {}
    for name in names:
        network.get_submodule(name).register_forward_hook(
            lambda _m, _a, out, name=name: right.update({name: out.clone()})
        )
    images = pictures()
    with torch.no_grad():
        network(images)
    _, copied = probe(network, "teacher", names, (3, 24, 24))
    found = observe_maps(network, images, names, copied).maps
    assert found.keys() == right.keys()
    assert all(torch.equal(found[name], right[name]) for name in names)
    assert "layer4.1.bn2" in copied
    assert not {"layer1", "layer2", "layer3", "layer4", "conv1"} & set(copied)  # a copy costs memory


def test_a_layer_that_is_overwritten_in_training_alone_is_refused():
    torch.manual_seed(0)
    student, teacher = Cnn(4, True, nn.Dropout(0.5, inplace=True)), Cnn(6, True)
    method = FeatureKD(student, teacher, "at", {"stem.2": "stem.2"}, image_size=24)
    method.eval()(pictures(), TARGETS)
    with pytest.raises(ValueError, match=r"the layer 'stem.2' was overwritten by a later one.*inplace=False"):
        method.train()(pictures(), TARGETS)
    with torch.inference_mode():  # keeps no counts
        copy.deepcopy(method).eval()(pictures(), TARGETS)
