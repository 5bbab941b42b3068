"""One benchmark for each op of the registry, ``op.<name>``: every backend on the op's larger samples.

Nothing is written here for a new op; declaring it (`fastmkd.ops.registry.declare`) is enough. The records are also what
the tables of `fastmkd.ops.choice` are made from (`fastmkd.bench.tables`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch

from fastmkd.ops import choice
from fastmkd.ops.accuracy import upcast
from fastmkd.ops.arguments import lead, tensors
from fastmkd.ops.registry import OPS, Op, Sample

from .registry import DTYPES, Answer, Benchmark, Case, Setting, Variant

__all__ = ["compile_variant", "compiled", "generate", "op_params", "op_variants", "why_no_compiler"]

LARGEST = 3  # samples of an op that are timed


def generate() -> dict[str, Benchmark]:
    """The benchmarks of all declared ops, by name."""
    return {f"op.{op.name}": _entry(op) for op in OPS.values()}


def op_variants(op: Op, args: tuple[Any, ...], setting: Setting) -> list[Variant]:
    """Every way to run `op` on `args`: the reference, its compiled form, each backend, and ``auto`` (the operator).

    Args:
        op: a declared op.
        args: valid arguments on the setting's device.
        setting: where the case runs; ``quick`` leaves out ``torch.compile``.

    Returns:
        Variants with one answer; ``eager`` is the plain one.
    """
    cost = op.cost(*args)
    answer = Answer(lambda: op.reference(*upcast(args)), cost.flops, cost.bytes)
    device, dtype = setting.device.type, lead(args).dtype
    variants = [Variant("eager", lambda: op.reference(*args), answer, plain=True)]
    if not setting.quick:
        variants.append(compiled("torch.compile", op.reference, args, answer))
    for backend in op.backends.values():
        if backend.name == "eager" or backend.device != device:
            continue
        reason = backend.reason()
        if not backend.takes(device, dtype):
            reason = f"the {backend.name} backend does not take {str(dtype).removeprefix('torch.')}"
        variants.append(Variant(backend.name, _call(backend.run, args), answer, unavailable=reason))
    variants.append(Variant("auto", _call(op.entry, args), answer))
    return variants


def op_params(op: Op, args: tuple[Any, ...]) -> dict[str, Any]:
    """What a record says of an op's arguments; `fastmkd.bench.tables` reads it."""
    return {
        "op": op.name,
        "op_dtype": str(lead(args).dtype).removeprefix("torch."),
        "size_class": choice.size_class(args),
        "shapes": [list(t.shape) for t in tensors(args)],
    }


def compiled(name: str, function: Callable[..., Any], args: tuple[Any, ...], answer: Answer) -> Variant:
    """A variant that runs ``torch.compile(function)`` on `args`; see `compile_variant`."""
    return compile_variant(name, function, answer, lambda fast: _call(fast, args))


def compile_variant(
    name: str,
    function: Callable[..., Any],
    answer: Answer,
    bind: Callable[[Callable[..., Any]], Callable[[], Any]],
) -> Variant:
    """A variant that runs ``torch.compile(function)`` with static shapes; compiled at its first call, before timing.

    Args:
        name: label.
        function: what to compile.
        answer: the function that it computes.
        bind: gives the compiled function its arguments and context.
    """
    return Variant(name, bind(torch.compile(function, dynamic=False)), answer, unavailable=why_no_compiler())


def why_no_compiler() -> str | None:
    """None where ``torch.compile`` can build its code, else a sentence."""
    if any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return None
    return "torch.compile needs a C++ compiler, and there is none on PATH"


def _call(function: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: function(*args)


def _size(args: tuple[Any, ...]) -> int:
    return sum(t.numel() for t in tensors(args))


def _largest(op: Op, setting: Setting) -> list[Sample]:
    samples = [s for s in op.samples(str(setting.device), setting.torch_dtype) if not s.huge]
    samples.sort(key=lambda s: _size(s.args), reverse=True)
    return samples[: 1 if setting.quick else LARGEST]


def _entry(op: Op) -> Benchmark:
    def grid(setting: Setting) -> list[dict[str, Any]]:
        return [{"sample": s.name} for s in _largest(op, setting)]

    def build(setting: Setting, sample: str) -> Case:
        found = next(s for s in op.samples(str(setting.device), setting.torch_dtype) if s.name == sample)
        args = found.args
        return Case(
            label=sample,
            panel=op.name,
            variants=op_variants(op, args, setting),
            baseline="eager",
            device_time=True,
            params=op_params(op, args),
        )

    dtypes = tuple(name for name, dtype in DTYPES.items() if any(dtype in b.dtypes for b in _kernels(op)))
    dtypes = dtypes or ("fp32",)  # an op on integers runs once, whatever a run is about
    return Benchmark(f"op.{op.name}", f"every backend of {op.name}", build, grid, ("cpu", "cuda"), dtypes)


def _kernels(op: Op) -> list[Any]:
    own = [b for b in op.backends.values() if b.name != "eager"]
    return own or list(op.backends.values())
