r"""U-centred Gram matrices: what unbiased HSIC and CKA are made of (DPK, Eq. 6; Song et al. 2012).

For the features :math:`X` ``(n, d)`` of one layer over n images, :math:`K = X X^T` with a zero diagonal, and

.. math:: U(K)_{ij} = K_{ij} - \frac{r_i + r_j}{n - 2} + \frac{s}{(n - 1)(n - 2)} \quad (i \neq j), \qquad U(K)_{ii} = 0

with row sums :math:`r` and total :math:`s`. Then Eq. 6 is an inner product,
:math:`\mathrm{HSIC}_1(K, L) = \langle U(K), U(L) \rangle / (n (n - 3))`, so that M x N pairs of layers are one matrix
product after each layer's Gram is made once. One call takes a ragged list of layers, ``[(n, d_1), (n, d_2), ...]``, and
returns ``(L, n, n)``.

Every row of ``U(K)`` sums to zero, so adding one vector to all images changes nothing. The first image's features are
therefore taken off all of them beforehand: a common mean would drown the differences in rounding. The difference is
rounded to the features' own dtype (exact wherever two values are within a factor of two) in the reference and in
Triton, whose matrix units take no other; the C++ and CUDA kernels and the gradient keep it in float32. Two float16
values can differ by more than float16 holds, 65504: Triton alone then gives NaN. Products are accumulated in float32,
and the centring is done in float64, where a layer that says the same of all images comes out as exact zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import native, triton
from .registry import Backend, BadInput, Cost, Sample, declare

__all__ = ["centred_gram", "u_centre"]

SCHEMA = "centred_gram(Tensor[] features) -> Tensor"
LOW = (torch.float32, torch.bfloat16, torch.float16)
MIN_BATCH = 4  # n (n - 3) must be positive


def centred_gram(features: Sequence[Tensor]) -> Tensor:
    """Returns the U-centred linear Gram matrix of each layer (DPK, Eq. 6).

    Args:
        features: one ``(n, d)`` tensor a layer, of one dtype (float32, bfloat16, float16 or float64) on one device; n
            is the same for all and at least 4, d is free. Rows may be strided, the last dimension is contiguous.

    Returns:
        ``(L, n, n)``, symmetric with a zero diagonal; float32 whatever the input dtype (float64 for float64).

    Raises:
        ValueError: no layer, shapes that do not fit together, n below 4.
        TypeError: dtypes that differ or are not floating point.

    Example:
        >>> gram = centred_gram([torch.tensor([[0.0], [1.0], [0.0], [1.0]]) + 100])
        >>> gram[0, 0]
        tensor([ 0.0000, -0.1667,  0.3333, -0.1667])
    """
    return _entry(list(features))


def reference(features: Sequence[Tensor]) -> Tensor:
    return torch.stack([_gram(x) for x in features])


def _gram(x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    shifted = x.to(wide) - x[:1].to(wide)  # (n, d)
    # As a GPU's matrix units take it, but for the differences that float16 has no number for.
    rounded = shifted.to(x.dtype).to(wide)
    shifted = torch.where(rounded.isfinite(), rounded, shifted)
    return u_centre(shifted @ shifted.mT).to(wide)


def u_centre(gram: Tensor) -> Tensor:
    """U-centres symmetric matrices ``(..., n, n)``; the result is float64.

    Example:
        >>> centred = u_centre(torch.arange(16.0).view(4, 4) + torch.arange(16.0).view(4, 4).T)
        >>> bool(centred.sum(-1).abs().max() < 1e-12)
        True
    """
    n = gram.shape[-1]
    off_diagonal = 1 - torch.eye(n, dtype=torch.float64, device=gram.device)
    gram = gram * off_diagonal
    # In this order a matrix of equal entries gives exact zeros.
    mean = gram.sum(-1) / (n - 2)  # (..., n)
    centred = gram - mean[..., :, None] - mean[..., None, :] + mean.sum(-1)[..., None, None] / (n - 1)
    return centred * off_diagonal


def check(features: Sequence[Tensor]) -> None:
    if not features:
        raise ValueError("features is empty; expected at least one layer, a list of (n, d) tensors.")
    first = features[0]
    if not first.dtype.is_floating_point:
        raise TypeError(f"features[0] has dtype {first.dtype}; expected a floating-point dtype.")
    for i, x in enumerate(features):
        if x.dtype != first.dtype:
            raise TypeError(f"features[{i}] has dtype {x.dtype} but features[0] has {first.dtype}; cast one of them.")
        if x.device != first.device:
            raise ValueError(f"features[{i}] is on {x.device} but features[0] is on {first.device}; move one of them.")
        if x.dim() != 2 or x.shape[1] < 1:
            raise ValueError(
                f"features[{i}] has shape {tuple(x.shape)}; expected (n, d), one row an image; flatten it."
            )
        if x.shape[0] < MIN_BATCH:
            raise ValueError(
                f"features[{i}] holds {x.shape[0]} images; unbiased HSIC divides by n (n - 3) and needs at least "
                f"{MIN_BATCH}; use a larger batch."
            )
        if x.shape[0] != first.shape[0]:
            raise ValueError(
                f"features[{i}] holds {x.shape[0]} images but features[0] holds {first.shape[0]}; give all layers the "
                "same images."
            )
        if x.shape[1] > 1 and x.stride(1) != 1:
            raise ValueError(f"features[{i}] has strides {x.stride()}; its last dimension must be contiguous.")


def fake(features: Sequence[Tensor]) -> Tensor:
    n = features[0].shape[0]
    dtype = torch.promote_types(features[0].dtype, torch.float32)
    return features[0].new_empty((len(features), n, n), dtype=dtype)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[0])


def backward(ctx: Any, grad: Tensor) -> tuple[list[Tensor | None]]:
    """``U`` is its own adjoint on symmetric matrices, so ``dX = 2 U(sym(grad)) X``."""
    inner = 2 * u_centre((grad + grad.mT).double() / 2).to(grad.dtype)  # (L, n, n)
    grads: list[Tensor | None] = []
    for i, (x, needed) in enumerate(zip(ctx.saved_tensors, ctx.needs_input_grad[0], strict=True)):
        # The rows of `inner` sum to zero too: the shift costs nothing and saves digits here as well.
        grads.append((inner[i] @ (x.to(grad.dtype) - x[:1].to(grad.dtype))).to(x.dtype) if needed else None)
    return (grads,)


def samples(device: str, dtype: torch.dtype) -> list[Sample]:
    def make(n: int, *widths: int, mean: float = 0.0, padding: int = 0) -> tuple[list[Tensor]]:
        g = torch.Generator().manual_seed(n * 7919 + sum(widths))
        layers = [torch.randn(n, d + padding, generator=g, dtype=torch.float64) + mean for d in widths]
        return ([x.to(device=device, dtype=dtype)[:, :d] for x, d in zip(layers, widths, strict=True)],)

    def huge() -> tuple[list[Tensor]]:
        # 2^31 elements: offsets need 64 bits
        return ([torch.randn(8, 1 << 28, device=device, dtype=dtype), torch.randn(8, 3, device=device, dtype=dtype)],)

    return [
        Sample("one_layer", lambda: make(8, 48), grad=(0,)),
        Sample("ragged", lambda: make(7, 33, 1, 130), grad=(0,)),
        Sample("smallest_batch", lambda: make(4, 5, 64), grad=(0,)),
        Sample("far_from_zero", lambda: make(16, 200, 48, mean=100.0), grad=(0,)),
        Sample("strided_rows", lambda: make(12, 40, 17, padding=9), grad=(0,)),
        Sample("odd_batch", lambda: make(37, 1000, 3)),
        Sample("batch_over_one_tile", lambda: make(130, 300, 64, mean=1.0)),
        Sample("cnn_layers", lambda: make(32, 12544, 6272, 3136, mean=0.5)),
        Sample("huge", huge, huge=True),
    ]


def tile_sample(device: str, dtype: torch.dtype) -> Sample:
    large = next(sample for sample in samples(device, dtype) if sample.name == "batch_over_one_tile")
    return replace(large, name="tiles")


def bad_inputs() -> list[BadInput]:
    x = torch.zeros(5, 3)
    return [
        BadInput("no_layer", ([],), ValueError, "features is empty"),
        BadInput("integer", ([x.long()],), TypeError, r"features\[0\] has dtype"),
        BadInput("mixed_dtypes", ([x, x.half()],), TypeError, r"features\[1\] has dtype"),
        BadInput("not_flattened", ([x, x[None]],), ValueError, r"features\[1\] has shape"),
        BadInput("no_feature", ([x[:, :0]],), ValueError, r"features\[0\] has shape"),
        BadInput("three_images", ([x[:3]],), ValueError, "holds 3 images; .* at least 4"),
        BadInput("other_images", ([x, torch.zeros(6, 3)],), ValueError, r"features\[1\] holds 6 images"),
        BadInput("strided_dim", ([torch.zeros(3, 5).mT],), ValueError, "must be contiguous"),
        BadInput("meta_device", ([x, x.to("meta")],), ValueError, r"features\[1\] is on meta"),
    ]


def cost(features: Sequence[Tensor]) -> Cost:
    n, size = features[0].shape[0], features[0].element_size()
    width = sum(x.shape[1] for x in features)
    out = len(features) * n * n * max(size, 4)
    return Cost(flops=float(n * (n + 1) * width), bytes=float(n * width * size + out))  # one triangle


_entry = declare(
    SCHEMA,
    reference=reference,
    check=check,
    fake=fake,
    backward=backward,
    setup_context=setup_context,
    samples=samples,
    tile_sample=tile_sample,
    bad_inputs=bad_inputs,
    cost=cost,
    backends=[
        Backend("cpp", native.entry("centred_gram"), "cpu", LOW, native.missing_cpu),
        Backend(
            "triton", triton.launcher("centred_gram"), "cuda", LOW, triton.missing, tiles=triton.tiles("centred_gram")
        ),
        # Built and tested; stays out of `auto` until a GPU shows it faster than Triton.
        Backend("cuda", native.entry("centred_gram"), "cuda", LOW, native.missing_cuda, default=False),
    ],
)
