"""Unbiased HSIC and CKA between layers (DPK, Eq. 6 and 7; Song et al. 2012; Nguyen et al. 2020).

Each layer's U-centred Gram is made once (`fastmkd.ops.centred_gram`); all pairs are then one matrix product in float64.
HSIC_1 between two layers is an unbiased estimate and may be negative; it is never clamped. That of a layer with itself
is zero only when the layer says the same of all images: such a dead layer has no CKA, and its entries are NaN.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops import centred_gram

__all__ = ["MinibatchCKA", "NoMinibatchError", "as_rows", "cka_matrix", "hsic1"]

Names = Sequence[str] | tuple[Sequence[str], Sequence[str]]
NO_COUNT = 1 << 31  # its negative stands for the layers of a rank that had no minibatch: never the most, nor the least
Moments = tuple[Tensor, Tensor, Tensor]  # HSIC_1 of all pairs (M, N), of xs with themselves (M,), of ys (N,); float64


def hsic1(x: Tensor, y: Tensor) -> Tensor:
    """Returns the unbiased HSIC of two batches of features under linear kernels (DPK, Eq. 6). Differentiable.

    Args:
        x: ``(n, ...)`` features of n images, n at least 4; flattened per image.
        y: ``(n, ...)`` other features of the same images.

    Returns:
        Scalar in float32 (float64 for float64 features); 0 on average for independent features, so it may be negative.

    Raises:
        ValueError: fewer than 4 images, or another number of them in `y`.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [0.0], [1.0]])
        >>> hsic1(x, x)
        tensor(0.1667)
    """
    gram_x, gram_y = _both_grams([x], [y])
    return _pair_products(gram_x, gram_y)[0, 0].to(_result_dtype(gram_x, gram_y))


def cka_matrix(xs: Sequence[Tensor], ys: Sequence[Tensor], names: Names | None = None) -> Tensor:
    """Returns the CKA of every layer of `xs` with every layer of `ys` on one minibatch (DPK, Eq. 7 with k = 1).

    Differentiable: ``1 - cka_matrix([student], [teacher])[0, 0]`` is a loss. Pass the same list twice for the layers of
    one network. Nothing waits for the device unless `names` is given.

    Args:
        xs: M tensors ``(n, ...)`` over the same n images, n at least 4; any sizes and floating-point dtypes.
        ys: N tensors ``(n, ...)``.
        names: names of the layers, one list for both or a pair of lists; then a dead layer is warned of by name.

    Returns:
        ``(M, N)`` in float32 (float64 when all features are); below 0 is possible, NaN where a layer is dead.

    Raises:
        ValueError: an empty list, fewer than 4 images, or tensors of different numbers of images.
        TypeError: a single tensor in place of a list, or integer features.

    Example:
        >>> x = torch.randn(8, 3, 4, 4)
        >>> cka_matrix([x, 2 * x + 1], [x]).round(decimals=3).T
        tensor([[1., 1.]])
    """
    gram_x, gram_y = _both_grams(xs, ys)
    moments = _moments(gram_x, gram_y)
    if names is not None:
        _warn_of_dead_layers(moments[1], moments[2], names)
    return _normalise(*moments).to(_result_dtype(gram_x, gram_y))


class NoMinibatchError(ValueError):
    """`MinibatchCKA.compute` was called before any update: its own, or that of any rank if it counts over ranks."""


class MinibatchCKA:
    """CKA over many minibatches and ranks: mean HSIC_1 over minibatches, then the quotient (DPK, Eq. 7).

    Every minibatch has the same weight whatever its size, as in Eq. 7; each estimate is unbiased, but a small one is
    noisy, so drop a ragged last batch that is much smaller than the others. Only sums are kept, on the layers' device.

    Args:
        names: names of the layers, one list for both or a pair of lists, for the warning about dead layers.
        across_ranks: `compute` adds up all ranks of the default process group, if there is one; each must call it.

    Example:
        >>> x, y = torch.randn(2, 16, 5), torch.randn(2, 16, 7)
        >>> cka = MinibatchCKA()
        >>> for i in range(2):
        ...     of_this_batch = cka.update([x[i]], [x[i], y[i]])
        >>> cka.compute().shape
        torch.Size([1, 2])
    """

    def __init__(self, names: Names | None = None, across_ranks: bool = True) -> None:
        self.names, self.across_ranks = names, across_ranks
        self.reset()

    def reset(self) -> None:
        """Forgets all minibatches."""
        self.batches = 0
        self._sums: Moments | None = None

    @torch.no_grad()
    def update(self, xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
        """Adds a minibatch; nothing waits for the device.

        Args:
            xs: see `cka_matrix`.
            ys: see `cka_matrix`.

        Returns:
            ``(M, N)`` float64, the CKA of this minibatch alone.

        Raises:
            ValueError: see `cka_matrix`; or the number of layers has changed.
        """
        return self.update_grams(*_both_grams(xs, ys))

    @torch.no_grad()
    def update_grams(self, gram_x: Tensor, gram_y: Tensor) -> Tensor:
        """Adds a minibatch whose Grams are made already, for instance inside forward hooks.

        Args:
            gram_x: ``(M, n, n)`` from `fastmkd.ops.centred_gram`.
            gram_y: ``(N, n, n)``.

        Returns:
            ``(M, N)`` float64, the CKA of this minibatch alone.

        Raises:
            ValueError: the number of layers has changed.
        """
        moments = _moments(gram_x, gram_y)
        if self._sums is None:
            self._sums = moments
        elif self._sums[0].shape != moments[0].shape:
            raise ValueError(
                f"update got {' x '.join(map(str, moments[0].shape))} layers after minibatches of "
                f"{' x '.join(map(str, self._sums[0].shape))}; give the same layers each time, or call reset()."
            )
        else:
            self._sums = (self._sums[0] + moments[0], self._sums[1] + moments[1], self._sums[2] + moments[2])
        self.batches += 1
        return _normalise(*moments)

    def compute(self) -> Tensor:
        """Returns CKA over all minibatches so far, of all ranks (Eq. 7); a dead layer is warned of and gives NaN.

        Returns:
            ``(M, N)`` float64.

        Raises:
            ValueError: there was no minibatch; or ranks have other numbers of layers, which each of them raises.
        """
        moments = self._all_ranks() if self.across_ranks and _distributed() else self._sums
        if moments is None:
            raise NoMinibatchError("compute() was called before any update(); there is no minibatch to average.")
        _warn_of_dead_layers(moments[1], moments[2], self.names)
        return _normalise(*moments)

    def _all_ranks(self) -> Moments | None:
        """Sums over ranks; one that had no minibatch adds zeros."""
        own = self._sums
        device = own[0].device if own is not None else _collective_device()
        # Most and least of all ranks at once: if they differ every rank must raise, or the others would wait for it.
        sizes = [-NO_COUNT] * 4 if own is None else [sign * count for sign in (1, -1) for count in own[0].shape]
        bounds = torch.tensor(sizes, device=device)
        dist.all_reduce(bounds, dist.ReduceOp.MAX)
        m, n, least_m, least_n = bounds.tolist()
        if m == -NO_COUNT:
            return None
        if (m, n) != (-least_m, -least_n):
            here = "no minibatch" if own is None else f"{' x '.join(map(str, own[0].shape))} layers"
            raise ValueError(
                f"compute() found {here} on this rank, but over all ranks from {-least_m} to {m} layers in xs and from "
                f"{-least_n} to {n} in ys; give the same layers on every rank."
            )
        flat = torch.cat([t.flatten() for t in own]) if own is not None else None
        total = torch.zeros(m * n + m + n, dtype=torch.float64, device=device) if flat is None else flat
        dist.all_reduce(total)
        cross, self_x, self_y = total.split([m * n, m, n])
        return cross.view(m, n), self_x, self_y


def as_rows(x: Tensor) -> Tensor:
    """``(n, ...) -> (n, d)`` in the order of memory: Grams do not depend on it, and channels-last is not copied.

    Compiled code takes the order of the dimensions: it cannot sort by strides that it does not know.

    Args:
        x: features, one image an entry of the first dimension.

    Raises:
        ValueError: a scalar.

    Example:
        >>> x = torch.zeros(4, 3, 8, 8).to(memory_format=torch.channels_last)
        >>> as_rows(x).data_ptr() == x.data_ptr()
        True
    """
    if x.dim() == 0:
        raise ValueError("features are a scalar; expected (n, ...), one image an entry of the first dimension.")
    if not torch.compiler.is_compiling():
        x = x.permute(0, *sorted(range(1, x.dim()), key=lambda i: x.stride(i), reverse=True))
    rows = x.reshape(x.shape[0], math.prod(x.shape[1:]))  # -1 would not do for no images
    return rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()


def _both_grams(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    for name, layers in (("xs", xs), ("ys", ys)):
        if isinstance(layers, Tensor):
            raise TypeError(
                f"{name} is a tensor of shape {tuple(layers.shape)}; expected a list with one (n, ...) a layer."
            )
        if len(layers) == 0:
            raise ValueError(f"{name} is empty; expected at least one layer.")
    n = len(xs[0]) if xs[0].dim() else 0
    for name, layers in (("xs", xs), ("ys", ys)):
        for i, layer in enumerate(layers):
            if layer.dim() == 0 or len(layer) != n:
                raise ValueError(
                    f"{name}[{i}] has shape {tuple(layer.shape)} but xs[0] holds {n} images; every layer must be "
                    "(n, ...) over the same images."
                )
    gram_x = _grams(xs)
    same = not torch.compiler.is_compiling() and ys is xs  # PyTorch 2.11 compiles no `is` of lists
    return gram_x, gram_x if same else _grams(ys).to(gram_x.device)


def _grams(layers: Sequence[Tensor]) -> Tensor:
    """One call for all layers; under autocast their dtypes may differ, and then one for each dtype and device."""
    rows = [as_rows(layer) for layer in layers]
    kinds = {(x.dtype, x.device): None for x in rows}
    if len(kinds) == 1:
        return centred_gram(rows)  # (L, n, n)
    home = rows[0].device
    made: dict[int, Tensor] = {}
    for kind in kinds:
        where = [i for i, x in enumerate(rows) if (x.dtype, x.device) == kind]
        grams = centred_gram([rows[i] for i in where]).to(home)
        made.update(zip(where, grams.unbind(), strict=True))
    dtype = torch.float64 if any(gram.dtype == torch.float64 for gram in made.values()) else torch.float32
    return torch.stack([made[i].to(dtype) for i in range(len(rows))])


def _pair_products(gram_x: Tensor, gram_y: Tensor) -> Tensor:
    """HSIC_1 of all pairs: ``(M, n, n), (N, n, n) -> (M, N)`` float64."""
    n = gram_x.shape[-1]
    return gram_x.flatten(1).double() @ gram_y.flatten(1).double().mT / (n * (n - 3))


def _own_products(gram: Tensor) -> Tensor:
    """HSIC_1 of each layer with itself, never below 0: ``(L, n, n) -> (L,)`` float64."""
    n = gram.shape[-1]
    return gram.double().square().sum((1, 2)) / (n * (n - 3))


def _moments(gram_x: Tensor, gram_y: Tensor) -> Moments:
    own_x = _own_products(gram_x)
    return _pair_products(gram_x, gram_y), own_x, own_x if gram_y is gram_x else _own_products(gram_y)


def _normalise(cross: Tensor, own_x: Tensor, own_y: Tensor) -> Tensor:
    return cross / (own_x.sqrt()[:, None] * own_y.sqrt())


def _result_dtype(gram_x: Tensor, gram_y: Tensor) -> torch.dtype:
    return torch.float64 if gram_x.dtype == gram_y.dtype == torch.float64 else torch.float32


def _warn_of_dead_layers(own_x: Tensor, own_y: Tensor, names: Names | None) -> None:
    of_x, of_y = _split_names(names, len(own_x), len(own_y))
    found = []
    for own, labels in ((own_x, of_x), (own_y, of_y)):
        values = own.tolist()
        found += [
            f"{label} (HSIC_1 with itself {v:g})"
            for label, v in zip(labels, values, strict=True)
            if not 0 < v < float("inf")
        ]
    if found:
        warnings.warn(
            f"CKA is NaN for {', '.join(dict.fromkeys(found))}: a layer whose features are the same for all images has "
            "no CKA, nor has one with values that are not finite.",
            RuntimeWarning,
            stacklevel=3,
        )


def _split_names(names: Names | None, m: int, n: int) -> tuple[list[str], list[str]]:
    if names is None:
        return [f"xs[{i}]" for i in range(m)], [f"ys[{i}]" for i in range(n)]
    pair = names if len(names) == 2 and not isinstance(names[0], str) else (names, names)
    of_x, of_y = ([str(name) for name in part] for part in pair)
    if (len(of_x), len(of_y)) != (m, n):
        raise ValueError(
            f"names holds {len(of_x)} and {len(of_y)} names for {m} and {n} layers; give one list for both sides or a "
            "pair of lists, one name a layer."
        )
    return of_x, of_y


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _collective_device() -> torch.device:
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
