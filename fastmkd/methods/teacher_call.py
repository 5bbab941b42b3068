"""Asks a frozen teacher: eval mode, no gradients, its own device and precision, compiled if that is wanted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Generic, Literal, get_args

import torch
from torch import Tensor, nn

from ..nn.ragged import RaggedKeep
from ..nn.vit import MaskedViT
from ..ops.autocast import no_autocast
from .lanes import A

__all__ = ["CompileMode", "TeacherCall"]

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


class TeacherCall(Generic[A]):
    """One way to ask a teacher, for all methods.

    The teacher runs under `torch.no_grad`, not in inference mode. An inference tensor cannot be saved for a backward
    pass, so every answer would have to be copied, and what a network caches in its forward (timm's rotary positions)
    would stay such a tensor after the method has given the network back.

    Args:
        observe: ``observe(network, images, *rest)`` runs a network and returns what a loss reads of it.
        dtype: precision of its autocast; float32 switches autocast off, None leaves it to the caller.
        compile: run `observe` through ``torch.compile`` with static shapes: True takes CUDA graphs ("reduce-overhead")
            on a GPU and "default" elsewhere, a name is a mode of ``torch.compile``. Each shape is compiled once; after
            PyTorch's limit of eight, others run uncompiled.

    Raises:
        ValueError: a dtype or a mode that there is not.

    Example:
        >>> from fastmkd.methods.features import observe_maps
        >>> call, net = TeacherCall(observe_maps, torch.bfloat16), nn.Sequential(nn.Conv2d(1, 2, 1))
        >>> answer = call(net, torch.zeros(1, 1, 2, 2), ["0"])
        >>> answer.output.requires_grad, answer.maps["0"].dtype
        (False, torch.bfloat16)
    """

    def __init__(
        self,
        observe: Callable[..., A],
        dtype: torch.dtype | None = None,
        compile: bool | CompileMode = False,
    ) -> None:
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"teacher_dtype is {dtype}; expected torch.bfloat16, float16, float32 or None.")
        if not isinstance(compile, bool) and compile not in get_args(CompileMode):
            modes = ", ".join(map(repr, get_args(CompileMode)))
            raise ValueError(f"teacher_compile is {compile!r}; expected True, False or a mode: {modes}.")
        self.observe, self.dtype, self.compile = observe, dtype, compile
        self._compiled: dict[str, Callable[..., A]] = {}

    @torch.no_grad()
    def __call__(self, teacher: nn.Module | None, images: Tensor, *rest: Any) -> A:
        """Runs the teacher and brings what was observed to the device of the images.

        Args:
            teacher: the network.
            images: ``(B, C, H, W)`` on any device, in any precision.
            rest: passed on to `observe`, tensors on the teacher's device.
        """
        assert teacher is not None
        network = teacher.model if isinstance(teacher, MaskedViT) else teacher
        if network.training:  # somebody called teacher.train() since
            network.eval()
        weight = next(network.parameters())
        home, device = images.device, weight.device
        wait = device.type != "cuda"  # the host would read a copy that has not arrived
        images = images.to(device=device, dtype=weight.dtype, non_blocking=not wait)
        rest = tuple(x.to(device, non_blocking=not wait) if isinstance(x, Tensor | RaggedKeep) else x for x in rest)
        autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.dtype == torch.float32:
            autocast = no_autocast(device)
        elif self.dtype is not None and device.type != "meta":
            autocast = torch.autocast(device.type, self.dtype)
        with autocast, _guarded_hooks() if self.compile else contextlib.nullcontext():
            answer = self._observer(device)(teacher, images, *rest)
        # CUDA graphs write every answer to the same place.
        return answer.map(lambda x: x.to(home, copy=bool(self.compile)))

    def _observer(self, device: torch.device) -> Callable[..., A]:
        if self.compile is False:
            return self.observe
        mode = self.compile
        if mode is True:
            mode = "reduce-overhead" if device.type == "cuda" else "default"
        if mode not in self._compiled:
            self._compiled[mode] = torch.compile(self.observe, dynamic=False, mode=mode)
        return self._compiled[mode]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": {}}  # a copy compiles its own; compiled code cannot be pickled


def _guarded_hooks() -> Any:
    """What is observed is recorded by hooks, which change from call to call; compiled code must notice that."""
    return torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
