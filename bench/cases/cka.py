"""CKA between all layers of two networks: all pairs from one Gram a layer, against the ways found in public code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastmkd

from .. import peers
from ..registry import Answer, Case, Setting, Variant, benchmark

CNN = [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]  # four layers of each
RESNET50 = [((256, 56, 56), 3), ((512, 28, 28), 4), ((1024, 14, 14), 6), ((2048, 7, 7), 3)]


def three_terms(x: Tensor, y: Tensor) -> Tensor:
    """HSIC_1 as Eq. 6 of DPK writes it: two Grams and three terms, which cancel when the features are far from zero."""
    k, el = (t.flatten(1).float() @ t.flatten(1).float().T for t in (x, y))  # (n, n)
    k.fill_diagonal_(0)
    el.fill_diagonal_(0)
    n = len(k)
    ends = k.sum() * el.sum() / ((n - 1) * (n - 2))
    return ((k * el).sum() + ends - 2 / (n - 2) * (k.sum(0) @ el.sum(1))) / (n * (n - 3))


def pairwise(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    """Holds all features, then Eq. 6 for every pair."""
    own_x, own_y = (torch.stack([three_terms(t, t) for t in layers]) for layers in (xs, ys))
    cross = torch.stack([torch.stack([three_terms(x, y) for y in ys]) for x in xs])
    return cross / (own_x[:, None] * own_y).sqrt()


def once_per_layer(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    """The best plain PyTorch: one Gram a layer, all of them U-centred at once, all pairs in one product."""
    grams_x = _centred(xs)
    grams_y = grams_x if ys is xs else _centred(ys)
    cross = grams_x @ grams_y.T
    return cross / (grams_x.norm(dim=1)[:, None] * grams_y.norm(dim=1))


def _centred(layers: list[Tensor]) -> Tensor:
    rows = [x.flatten(1) for x in layers]
    if rows[0].dtype == torch.float32:
        grams = torch.stack([x @ x.T for x in rows])  # (L, n, n)
    elif rows[0].is_cuda:
        grams = torch.stack([torch.mm(x, x.T, out_dtype=torch.float32) for x in rows])
    else:
        grams = torch.stack([x.float() @ x.float().T for x in rows])
    grams.diagonal(dim1=1, dim2=2).zero_()
    mean = grams.sum(2) / (grams.shape[1] - 2)
    grams -= mean[:, :, None] + mean[:, None] - mean.sum(1)[:, None, None] / (grams.shape[1] - 1)
    grams.diagonal(dim1=1, dim2=2).zero_()
    return grams.flatten(1)


def _features(shapes: list[tuple[int, ...]], batch: int, setting: Setting, seed: int) -> list[Tensor]:
    """What a rectifier leaves: positive, so far from zero mean; every image has its own share of a common pattern."""
    g = torch.Generator(setting.device).manual_seed(seed)
    make = {"generator": g, "device": setting.device}
    share = torch.randn(batch, 1, generator=torch.Generator().manual_seed(0)).to(setting.device)
    layers = []
    for shape in shapes:
        noise = torch.randn(batch, torch.Size(shape).numel(), **make)
        pattern = torch.randn(1, noise.shape[1], **make)
        layers.append((noise + share * pattern).relu().view(batch, *shape).to(setting.torch_dtype))
    return layers


def _grid(setting: Setting) -> list[dict[str, Any]]:
    if setting.on_gpu:
        return [{"kind": "ResNet-50 with itself", "batch": batch} for batch in (32, 256)]
    return [{"kind": kind, "batch": 64} for kind in ("16 x 16 layers", "one pair")]


@benchmark("cka", summary="CKA of all pairs of layers, against pairwise three-term HSIC and plain PyTorch", grid=_grid)
def cka(setting: Setting, kind: str, batch: int) -> Case:
    """All pairs of layers of two networks, features given."""
    if kind == "ResNet-50 with itself":
        xs = ys = _features([shape for shape, count in RESNET50 for _ in range(count)], batch, setting, 1)
    else:
        shapes = [shape for shape in CNN for _ in range(4)] if kind == "16 x 16 layers" else CNN[:1]
        xs, ys = (_features(shapes, batch, setting, seed) for seed in (1, 2))
    layers = xs if ys is xs else xs + ys
    width = sum(x[0].numel() for x in layers)
    answer = Answer(
        lambda: once_per_layer_exact(xs, ys),
        flops=float(batch * (batch + 1) * width),  # one triangle of each Gram
        bytes=float(batch * width * layers[0].element_size()),
        floor=2**-9 if setting.dtype == "bf16" else 1e-5,  # the shift is kept in the features' dtype
    )
    variants = [
        Variant("pairwise, three terms", lambda: pairwise(xs, ys), answer),
        Variant("one Gram a layer, PyTorch", lambda: once_per_layer(xs, ys), answer, plain=True),
        Variant("cka_matrix", lambda: fastmkd.cka_matrix(xs, ys), answer),
        Variant(
            "Grams alone",
            lambda: fastmkd.ops.centred_gram([x.flatten(1) for x in layers]),
            Answer(flops=answer.flops, bytes=answer.bytes),
        ),
    ]
    if setting.dtype == "fp32":  # it multiplies in the features' own dtype
        run, reason = lambda: peers.pytorch_cka(xs, ys), peers.why_no_pytorch_cka()
        variants.append(Variant("pytorch-cka", run, answer, unavailable=reason))
    return Case(
        label=kind,
        panel=f"batch {batch}",
        variants=variants,
        baseline="one Gram a layer, PyTorch",
        items=batch,
        min_rounds=3,
        params={"batch": batch, "layers": [len(xs), len(ys)], "features": width},
    )


def once_per_layer_exact(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    """CKA in float64, layer by layer, so that no second copy of the features is held."""

    def grams(layers: list[Tensor]) -> Tensor:
        return torch.cat([fastmkd.ops.centred_gram([x.flatten(1).double()]).flatten(1) for x in layers])

    of_x = grams(xs)
    of_y = of_x if ys is xs else grams(ys)
    return of_x @ of_y.T / (of_x.norm(dim=1)[:, None] * of_y.norm(dim=1))
