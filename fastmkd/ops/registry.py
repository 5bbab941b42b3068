"""The registry of ops: what a declaration holds, and how it becomes a PyTorch operator.

An op lives in one file of this folder and is declared by one call to `declare`. The declaration is the single source
for everything else: the operator ``torch.ops.fastmkd.<name>``, the parity, opcheck, gradcheck and bad-input tests, the
ahead-of-time compile checks, the benchmark entries, ``fastmkd check`` and the rows of ``docs/gpu-status.md``.

A call runs ``check`` (shapes and dtypes), ``check_values`` (what only the data can tell), asks `fastmkd.ops.choice` for
a backend, and runs it. The backward pass of a call to which `fastmkd.backend` gave a backend runs on that one too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import choice, ranges
from .arguments import lead, tensors
from .autocast import no_autocast

__all__ = ["OPS", "Backend", "BadInput", "Cost", "Op", "Sample", "declare", "get_op", "require"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Backend:
    """One way to run an op.

    Args:
        name: ``"eager"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.
        run: callable with the arguments of the op's schema, positional.
        device: device type it runs on; ``"any"`` for plain PyTorch.
        dtypes: dtypes of the op's first tensor that it takes.
        reason: returns None when usable on this machine, else a sentence that says why not and what to do.
        default: False keeps ``auto`` from ever taking it (built and tested, but not measured to be faster yet).
        tiles: of a kernel of matrix products that `run` has in several tile sizes: for a kind of product (``"half"``,
            ``"ieee"`` or ``"tf32"`` for float32) each of them, by name, as a callable like `run` that takes this one.
    """

    name: str
    run: Callable[..., Any]
    device: str
    dtypes: tuple[torch.dtype, ...] = FLOATS
    reason: Callable[[], str | None] = lambda: None
    default: bool = True
    tiles: Callable[[str], dict[str, Callable[..., Any]]] | None = None

    def takes(self, device: str, dtype: torch.dtype) -> bool:
        """True when tensors of this device type and dtype can be handed to `run`."""
        return self.device in ("any", device) and dtype in self.dtypes


@dataclass(frozen=True)
class Sample:
    """Valid arguments of an op.

    Args:
        name: short label that appears in test names.
        make: builds the positional arguments; called when they are needed, since some are large.
        grad: positions of the arguments that a gradient check differentiates.
        huge: larger than 32-bit offsets or a small machine can hold; run on GPUs only.
    """

    name: str
    make: Callable[[], tuple[Any, ...]]
    grad: tuple[int, ...] = ()
    huge: bool = False

    @property
    def args(self) -> tuple[Any, ...]:
        """The positional arguments, freshly built."""
        return self.make()


@dataclass(frozen=True)
class BadInput:
    """Arguments that the op must refuse with `error`, in a message that matches `match`."""

    name: str
    args: tuple[Any, ...]
    error: type[Exception]
    match: str


@dataclass(frozen=True)
class Cost:
    """What a call must at least do: floating-point operations and bytes moved (inputs once, outputs once)."""

    flops: float
    bytes: float


@dataclass
class Op:
    """A declared op; see `declare` for the meaning of the fields."""

    name: str
    schema: str
    reference: Callable[..., Any]
    check: Callable[..., None]
    backends: dict[str, Backend]
    samples: Callable[[str, torch.dtype], list[Sample]]
    bad_inputs: Callable[[], list[BadInput]]
    cost: Callable[..., Cost]
    check_values: Callable[..., Iterable[tuple[Tensor, str]]] | None = None
    tile_sample: Callable[[str, torch.dtype], Sample] | None = None
    entry: Callable[..., Any] = field(init=False, repr=False)

    @property
    def differentiable(self) -> bool:
        """True when some sample names arguments with a gradient."""
        return any(sample.grad for sample in self.samples("cpu", torch.float64))

    def run(self, *args: Any) -> Any:
        """Checks the arguments, chooses a backend and runs it (the body of ``torch.ops.fastmkd.<name>``)."""
        self.check(*args)
        if self.check_values is not None:
            for condition, sentence in self.check_values(*args):
                require(condition, sentence)
        # The caller has settled the dtypes; autocast would lower them again inside the reference.
        with no_autocast(lead(args).device), ranges.annotate(self.name):
            return choice.choose(self, args).run(*args)


OPS: dict[str, Op] = {}


def get_op(name: str) -> Op:
    """Returns the declared op called `name`.

    Raises:
        KeyError: no such op; the message lists those that exist.
    """
    if name not in OPS:
        raise KeyError(f"there is no op {name!r}; the ops are {', '.join(sorted(OPS))}.")
    return OPS[name]


def declare(
    schema: str,
    *,
    reference: Callable[..., Any],
    check: Callable[..., None],
    fake: Callable[..., Any],
    backends: Iterable[Backend],
    samples: Callable[[str, torch.dtype], list[Sample]],
    bad_inputs: Callable[[], list[BadInput]],
    cost: Callable[..., Cost],
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
    check_values: Callable[..., Iterable[tuple[Tensor, str]]] | None = None,
    tile_sample: Callable[[str, torch.dtype], Sample] | None = None,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> Callable[..., Any]:
    """Declares an op and registers it with PyTorch as ``fastmkd::<name>``.

    Args:
        schema: ``name(Tensor a, int b) -> Tensor``, without a namespace; no default values, no overloads.
        reference: the meaning of the op in plain PyTorch; also its ``eager`` backend.
        check: raises ValueError or TypeError for wrong shapes, dtypes, devices or numbers; must not read tensor data.
        fake: output shape and dtype from the inputs' (``register_fake``); runs after `check`.
        backends: the other ways to run it.
        samples: ``samples(device, dtype)``, valid inputs: ordinary, awkward and huge ones.
        bad_inputs: inputs that must be refused.
        cost: least work of a call, from the arguments, for the physical bound in benchmarks.
        backward: ``backward(ctx, *grads)``, in plain PyTorch.
        setup_context: saves for backward, as in ``torch.library.register_autograd``.
        check_values: yields (boolean scalar tensor, sentence) pairs. On the CPU a False raises ValueError; on a GPU it
            is an asynchronous assert, so that no step waits for it.
        tile_sample: the sample on which each of a backend's tiles is tried: several of the largest tile in rows and
            columns, and a part of one. `samples` are too small for large tiles, so `run` would not take those.
        dtypes: of the first tensor that the reference takes.

    Returns:
        The operator, a callable with the schema's positional arguments. It refuses forward-mode differentiation, which
        PyTorch would answer with a derivative of zero.
    """
    name = schema.split("(", 1)[0]
    eager = Backend("eager", reference, "any", dtypes)
    op = Op(
        name=name,
        schema=schema,
        reference=reference,
        check=check,
        backends={b.name: b for b in (eager, *backends)},
        samples=samples,
        bad_inputs=bad_inputs,
        cost=cost,
        check_values=check_values,
        tile_sample=tile_sample,
    )

    def checked_fake(*args: Any) -> Any:
        check(*args)
        return fake(*args)

    custom = torch.library.custom_op(f"fastmkd::{name}", op.run, mutates_args=(), schema=schema[len(name) :])
    custom.register_fake(checked_fake)
    custom.register_autograd(_on_the_backend_of_the_forward(backward), setup_context=_and_the_backend(setup_context))
    operator = op.entry = getattr(torch.ops.fastmkd, name).default
    OPS[name] = op

    def entry(*args: Any) -> Any:
        # Inside the operator PyTorch shows no tangent any more. Outside of forward mode the level is -1.
        if forward_ad._current_level >= 0 and op.differentiable and _has_tangent(args):
            raise NotImplementedError(
                f"{name} has no forward-mode derivative, but an input carries a tangent (torch.func.jvp or jacfwd, "
                "dual_level); use reverse mode: backward or torch.autograd.grad."
            )
        return operator(*args)

    return entry


def _has_tangent(args: tuple[Any, ...]) -> bool:
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors(args) if t.is_floating_point())


def _and_the_backend(setup_context: Callable[..., None]) -> Callable[..., None]:
    """`setup_context` that also saves the backend which a `fastmkd.backend` block asks for."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.forced_backend = choice.forced()
        setup_context(ctx, inputs, output)

    return setup


def _on_the_backend_of_the_forward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`backward` on the backend saved: on a GPU it runs in a thread of PyTorch's, which does not see the block."""

    def run(ctx: Any, *grads: Any) -> Any:
        if ctx.forced_backend == "auto":
            return backward(ctx, *grads)
        with choice.backend(ctx.forced_backend):
            return backward(ctx, *grads)

    return run


def require(condition: Tensor, sentence: str) -> None:
    """Checks what only the data can tell: on a CPU at once, on a GPU by an asynchronous assert.

    Args:
        condition: boolean scalar.
        sentence: what is wrong when it is False.

    Raises:
        ValueError: it is False, on a CPU.
    """
    if condition.device.type != "cpu":
        torch._assert_async(condition, sentence)
    elif not condition:
        raise ValueError(sentence)
