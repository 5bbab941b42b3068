"""CKA between the layers of two networks, each activation freed as soon as its Gram is made."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import centred_gram
from ..ops.centred_gram import MIN_BATCH
from .cka import MinibatchCKA, NoMinibatchError, as_rows

__all__ = ["Comparison", "Taps", "compare", "eval_mode", "images_of", "layer_names"]

Layers = Sequence[str] | tuple[Sequence[str], Sequence[str]]


class Comparison(NamedTuple):
    """CKA between M layers of one network and N of another.

    Attributes:
        cka: ``(M, N)`` float64 on the CPU: Eq. 7 over all minibatches and ranks.
        per_batch: ``(k, M, N)`` float64 on the CPU: each minibatch of this rank alone, what Fig. 5 of DPK shows.
        names_a: the M names.
        names_b: the N names.
    """

    cka: Tensor
    per_batch: Tensor
    names_a: list[str]
    names_b: list[str]


@torch.no_grad()
def compare(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Iterable[Any],
    layers: Layers | None = None,
) -> Comparison:
    """Returns the CKA of the layers of two networks over a data set (DPK, Eq. 7).

    Both networks see the same images, in eval mode, which is undone afterwards. A layer's Gram is made in its forward
    hook, so no activation is kept. Batches of fewer than 4 images are left out with a warning. Every minibatch has the
    same weight, see `MinibatchCKA`. With several ranks each gives its part of the data and all get the same matrix.

    Args:
        model_a: images to anything; may be on another device than `model_b`.
        model_b: may be the same object, which then runs once.
        loader: yields batches: images, or a tuple or list that starts with them.
        layers: names of modules as in ``named_modules()``, or patterns such as ``"layer*.*"``; one list for both
            networks or a pair of lists. None takes the blocks of each, see `layer_names`.

    Returns:
        A `Comparison`.

    Raises:
        ValueError: a name that no module has, a layer that does not run exactly once or whose first dimension is not
            the image, or no batch of 4 images.
        TypeError: a layer whose output is not a tensor (or a tuple that starts with one), or a batch without images.

    Example:
        >>> net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> compare(net, net, [torch.randn(16, 6)], layers=["0", "2"]).cka.diagonal().round(decimals=9)
        tensor([1., 1.], dtype=torch.float64)
    """
    of_a, of_b = _both_sides(layers)
    names_a, names_b = layer_names(model_a, of_a, "model_a"), layer_names(model_b, of_b, "model_b")
    same = model_a is model_b
    total = MinibatchCKA(names=(names_a, names_b))
    per_batch, skipped = [], 0
    taps_a = Taps(model_a, [*names_a, *names_b] if same else names_a)
    taps_b = taps_a if same else Taps(model_b, names_b)
    with eval_mode(model_a, model_b), taps_a, contextlib.nullcontext() if same else taps_b:
        for batch in loader:
            images = images_of(batch)
            if len(images) < MIN_BATCH:
                skipped += len(images)
                continue
            grams_a = taps_a.run(images)
            grams_b = grams_a if same else taps_b.run(images)
            gram_a = torch.stack([grams_a[name] for name in names_a])  # (M, n, n)
            gram_b = torch.stack([grams_b[name] for name in names_b]).to(gram_a.device)
            per_batch.append(total.update_grams(gram_a, gram_b))
    if skipped:
        warnings.warn(
            f"{skipped} images came in batches of fewer than {MIN_BATCH}, for which unbiased HSIC is not defined; they "
            "were left out.",
            RuntimeWarning,
            stacklevel=2,
        )
    own = torch.stack(per_batch).cpu() if per_batch else torch.empty(0, len(names_a), len(names_b), dtype=torch.float64)
    try:
        cka = total.compute().cpu()  # over all ranks: one of them may have had no batch
    except NoMinibatchError:
        raise ValueError(f"loader gave no batch of at least {MIN_BATCH} images.") from None
    return Comparison(cka, own, names_a, names_b)


def images_of(batch: Any) -> Tensor:
    """The images of what a loader gave.

    Args:
        batch: images, or a tuple or list that starts with them.

    Raises:
        TypeError: anything else.
    """
    images = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if isinstance(images, Tensor):
        return images
    inside = "" if images is batch else f" that starts with a {type(images).__name__}"
    raise TypeError(f"loader gave a {type(batch).__name__}{inside}; expected images, or a tuple that starts with them.")


def layer_names(model: nn.Module, layers: Sequence[str] | None = None, role: str = "model") -> list[str]:
    """Returns the modules of a network that patterns name, in the order of the patterns, then of the network.

    Args:
        model: the network.
        layers: names, or patterns in which ``*`` stands for (part of) one name between dots; None takes the blocks: the
            children of each outermost ``nn.Sequential`` or ``nn.ModuleList`` (a ViT's ``blocks.*``, a ResNet's
            ``layer*.*``).
        role: what messages call the network.

    Raises:
        ValueError: nothing matches; the message suggests names.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> layer_names(net), layer_names(net, ["1"])
        (['0', '1'], ['1'])
    """
    known = [name for name, _ in model.named_modules() if name]
    if layers is None:
        blocks = list(_blocks(model, ""))
        if not blocks:
            raise ValueError(f"{role} has no blocks (nn.Sequential or nn.ModuleList) to compare; name its layers.")
        return blocks
    if isinstance(layers, str):
        raise TypeError(f"layers of {role} is the string {layers!r}; expected a list of names.")
    found: dict[str, None] = {}
    for pattern in layers:
        depth = pattern.count(".")
        matching = [name for name in known if name.count(".") == depth and fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3) or known[:3]
            raise ValueError(f"{role} has no module {pattern!r}; modules with like names are {', '.join(near)}.")
        found.update(dict.fromkeys(matching))
    if not found:
        raise ValueError(f"layers of {role} is empty; name at least one module.")
    return list(found)


def _both_sides(layers: Layers | None) -> tuple[Any, Any]:
    """A pair of lists as it is; anything else, a list of names or None, for both networks."""
    if layers is not None and len(layers) == 2 and not any(isinstance(part, str) for part in layers):
        return layers[0], layers[1]
    return layers, layers


def _blocks(module: nn.Module, prefix: str) -> Iterator[str]:
    holds_blocks = isinstance(module, nn.Sequential | nn.ModuleList)
    for name, child in module.named_children():
        if holds_blocks:
            yield prefix + name
        else:
            yield from _blocks(child, f"{prefix}{name}.")


def _gram(features: Tensor) -> Tensor:
    return centred_gram([as_rows(features)])[0]  # (n, n)


class Taps:
    """Keeps something of each named module's output while the network runs; hooks live inside the ``with``.

    Args:
        model: the network.
        names: of its modules.
        keep: makes of an output what is kept, at once: later layers may overwrite it. The Gram, unless said otherwise.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], keep: Callable[[Tensor], Tensor] = _gram) -> None:
        self.model, self.names, self.keep = model, list(dict.fromkeys(names)), keep
        self.found: dict[str, Tensor] = {}
        self.images = 0  # of the batch that runs
        self.handles: list[Any] = []

    def __enter__(self) -> Taps:
        for name in self.names:
            self.handles.append(self.model.get_submodule(name).register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _hook(self, name: str) -> Any:
        def tap(module: nn.Module, inputs: Any, output: Any) -> None:
            features = output[0] if isinstance(output, tuple | list) else output
            if not isinstance(features, Tensor):
                raise TypeError(
                    f"the layer {name!r} returns {type(features).__name__}; name one that returns a tensor."
                )
            if name in self.found:
                raise ValueError(f"the layer {name!r} runs more than once in a forward; name one that runs once.")
            if features.dim() == 0 or len(features) != self.images:
                raise ValueError(
                    f"the layer {name!r} returns shape {tuple(features.shape)} for {self.images} images; its first "
                    "dimension is not the image (but a window, or a token). Name a layer that returns one entry an "
                    "image, such as the block around it."
                )
            self.found[name] = self.keep(features)

        return tap

    def run(self, images: Tensor) -> dict[str, Tensor]:
        """Runs the network on its own device, in the dtype of its parameters, and returns what was kept, by name.

        Args:
            images: ``(B, C, H, W)``.

        Raises:
            ValueError: a module that did not run exactly once, or whose first dimension is not the image.
            TypeError: one whose output is no tensor.
        """
        self.found, self.images = {}, len(images)
        first = next(self.model.parameters(), None)
        if first is not None:
            floating = images.is_floating_point() and first.is_floating_point()
            images = images.to(first.device, first.dtype if floating else None)
        self.model(images)
        silent = [name for name in self.names if name not in self.found]
        if silent:
            raise ValueError(f"the layer {silent[0]!r} did not run in the forward; name one that does.")
        return self.found


@contextlib.contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module is in the mode that it was in.

    Args:
        *models: the networks.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
