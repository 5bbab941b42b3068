"""The first half of every measurement: is the result right? A wrong variant gets no speed-up.

Errors are judged by the rule of the op tests (`fastmkd.ops.accuracy.judge`): no further from float64 than twice what
plain PyTorch is in the same dtype, plus a small floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmkd.ops.accuracy import Verdict, judge

from .registry import Answer, Variant

__all__ = ["Oracle", "tensors"]


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a variant's result, in order; a result of None has none.

    Raises:
        TypeError: the result holds something else.

    Example:
        >>> [t.shape for t in tensors((torch.ones(2), torch.ones(3)))]
        [torch.Size([2]), torch.Size([3])]
    """
    if result is None:
        return []
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Sequence) and not isinstance(result, str):
        return [t for part in result for t in tensors(part)]
    raise TypeError(f"a variant returned {type(result).__name__}; expected a tensor, a tuple of tensors, or None.")


class Oracle:
    """Knows the right results of a case and judges its variants.

    The float64 results and those of the plain variants are computed once and kept, on the variants' device.

    Args:
        variants: the variants of the case that can run here.

    Example:
        >>> x = torch.linspace(0, 1, 5)
        >>> answer = Answer(exact=lambda: x.double().exp())
        >>> right = Variant("torch", x.exp, answer, plain=True)
        >>> wrong = Variant("wrong", lambda: x.exp() + 1, answer)
        >>> oracle = Oracle([right, wrong])
        >>> oracle.judge(right).ok, oracle.judge(wrong).ok
        (True, False)
    """

    def __init__(self, variants: Sequence[Variant]) -> None:
        self._plain = {id(v.answer): v for v in variants if v.plain}
        self._known: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    def judge(self, variant: Variant) -> Verdict:
        """Runs `variant` once, on buffers that were poisoned with NaN before, and compares its result.

        Returns:
            The worst verdict over the result's tensors. A variant whose answer has no exact form only has to be finite.
        """
        answer = variant.answer
        if answer.exact is None:
            finite = all(bool(t.isfinite().all()) for t in _results(variant))
            return Verdict(finite, 0.0, 0.0, "" if finite else "the result holds NaN or infinity")
        exact, plain = self._reference(answer, variant)
        _poison(plain)
        found = _results(variant)
        if len(found) != len(plain):
            return Verdict(False, float("nan"), 0.0, f"{len(found)} tensors, not {len(plain)}")
        floors = answer.floor if isinstance(answer.floor, tuple) else (answer.floor,) * len(found)
        verdicts = [_judge(*parts) for parts in zip(found, exact, plain, floors, strict=True)]
        return min(verdicts, key=lambda v: (v.ok, v.allowed - v.error if v.ok else 0.0))

    def _reference(self, answer: Answer, variant: Variant) -> tuple[list[Tensor], list[Tensor]]:
        if id(answer) not in self._known:
            plain = self._plain.get(id(answer))
            if plain is None:
                raise ValueError(f"no plain variant computes what {variant.name!r} does; mark one with plain=True.")
            assert answer.exact is not None
            self._known[id(answer)] = (tensors(answer.exact()), [t.detach().clone() for t in _results(plain)])
        return self._known[id(answer)]


def _results(variant: Variant) -> list[Tensor]:
    return tensors(variant.read(variant.run()))


def _judge(found: Tensor, exact: Tensor, plain: Tensor, floor: float) -> Verdict:
    verdict = judge(found.detach(), exact.detach(), plain.detach())
    if verdict.ok or not floor or not verdict.error <= (more := floor * float(exact.abs().max()) + verdict.allowed):
        return verdict
    return Verdict(True, verdict.error, more)


def _poison(like: list[Tensor]) -> None:
    # Freed at once, so that the caching allocator hands these very blocks to the next result of the same size.
    blocks = [torch.full_like(t, float("nan")) for t in like if t.is_floating_point()]
    del blocks
