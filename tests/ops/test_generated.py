"""Tests generated from the registry: a new op gets all of them by being declared."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import fastmkd
from fastmkd.ops import OPS
from fastmkd.ops.arguments import map_tensors, tensors
from fastmkd.ops.check import check_sample
from fastmkd.ops.choice import BackendUnavailableError
from fastmkd.ops.registry import FLOATS, Backend, BadInput, Op, Sample

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HALVES = (torch.bfloat16, torch.float16)


def _cases(device: str, huge: bool) -> list[Any]:
    """(op, backend, dtype, sample) of everything that runs on `device`, the reference itself left out."""
    return [
        pytest.param(op, backend, dtype, sample, id=f"{op.name}-{backend.name}-{str(dtype)[6:]}-{sample.name}")
        for op in OPS.values()
        for backend in op.backends.values()
        if backend.device == device
        for dtype in backend.dtypes
        for sample in op.samples(device, dtype)
        if sample.huge == huge
    ]


def _require(backend: Backend) -> None:
    reason = backend.reason()
    if reason is not None:
        pytest.skip(f"{backend.name}: {reason}")


@pytest.mark.parametrize(("op", "backend", "dtype", "sample"), _cases("cpu", huge=False))
def test_parity_cpu(op: Op, backend: Backend, dtype: torch.dtype, sample: Sample, poisoned: None) -> None:
    _require(backend)
    row = check_sample(op, backend, sample, dtype)
    assert row.outcome == "right", row


def _with_a_huge_sample() -> list[str]:
    """Ops with a sample that only a GPU's memory holds."""
    return [name for name in sorted(OPS) if any(sample.huge for sample in OPS[name].samples("cpu", torch.float32))]


HUGE = [pytest.param(name, True, marks=pytest.mark.long) for name in _with_a_huge_sample()]


def test_the_ops_without_a_huge_sample_are_known() -> None:
    assert set(OPS) - set(_with_a_huge_sample()) == {"masked_conv2d", "masked_conv2d_weight"}


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "huge"), [*((name, False) for name in sorted(OPS)), *HUGE])
def test_parity_gpu(name: str, huge: bool, poisoned: None) -> None:
    backends = [backend for backend in OPS[name].backends.values() if backend.device == "cuda"]
    if [backend.name for backend in backends] == ["cuda"]:
        _require(backends[0])  # only nvcc makes it
    rows = [
        check_sample(OPS[name], backend, sample, dtype)
        for backend in backends
        if backend.reason() is None
        for dtype in backend.dtypes
        for sample in OPS[name].samples("cuda", dtype)
        if sample.huge == huge
    ]
    assert rows, f"no GPU backend of {name} is usable here"
    assert [row for row in rows if row.outcome != "right"] == []


class _LargestOnTheHost(TorchDispatchMode):
    """The elements of the largest tensor that a call makes on the CPU."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        mine = [tensor.numel() for tensor in tensors((out,)) if tensor.device.type == "cpu"]
        self.elements = max([self.elements, *mine])
        return out


@pytest.mark.parametrize("name", _with_a_huge_sample())
def test_a_huge_sample_is_drawn_where_it_is_needed(name: str) -> None:
    with FakeTensorMode(), _LargestOnTheHost() as host:
        for sample in OPS[name].samples("cuda", torch.float32):
            if sample.huge:
                with suppress(DynamicOutputShapeException):  # a mask's cells are counted when it is drawn
                    sample.make()
    assert host.elements < 1e7, "a sample for the GPU's memory goes through the host's"


def _float64_samples(device: str) -> list[Any]:
    return [
        pytest.param(op, sample, id=f"{op.name}-{sample.name}")
        for op in OPS.values()
        for sample in op.samples(device, torch.float64)
        if sample.grad
    ]


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_()


@pytest.mark.parametrize(("op", "sample"), _float64_samples("cpu"))
def test_gradcheck(op: Op, sample: Sample) -> None:
    args = list(sample.args)
    wanted = [i for i in sample.grad if args[i] is not None]

    def call(*leaves: torch.Tensor) -> torch.Tensor:
        rest = iter(leaves)
        for i in wanted:
            (args[i],) = map_tensors(lambda _: next(rest), (args[i],))
        return op.entry(*args)

    inputs = [_leaf(t) for i in wanted for t in tensors((args[i],))]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=sum(t.numel() for t in inputs) > 400)


@pytest.mark.parametrize("traced", [1, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", sorted(OPS))
def test_opcheck(name: str, device: str, traced: int) -> None:
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    for number, sample in enumerate(OPS[name].samples(device, torch.float32)[:4]):
        args = [map_tensors(_leaf, (a,))[0] if i in sample.grad else a for i, a in enumerate(sample.args)]
        # The last one traces the op and its gradient with unknown sizes: seconds a sample, or half a minute.
        quick = number >= traced or (traced == 1 and name == "recovered_loss_grad")
        torch.library.opcheck(OPS[name].entry, args, test_utils=checks[:-1] if quick else checks)


def _bad() -> list[Any]:
    return [pytest.param(op, bad, id=f"{op.name}-{bad.name}") for op in OPS.values() for bad in op.bad_inputs()]


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize(("op", "bad"), _bad())
def test_bad_input_is_refused(op: Op, bad: BadInput, backend: str) -> None:
    with fastmkd.backend(backend), pytest.raises(bad.error) as caught:
        op.entry(*bad.args)
    assert re.search(bad.match, str(caught.value))
    assert str(caught.value).endswith("."), "an error is a sentence"


@pytest.mark.parametrize("name", sorted(OPS))
def test_compiles_without_a_graph_break(name: str) -> None:
    torch._dynamo.reset()  # one function for all ops: PyTorch compiles it at most eight times
    op = OPS[name]
    sample = op.samples("cpu", torch.float32)[0]
    args, entry = sample.args, _public(name)
    compiled = torch.compile(lambda *a: entry(*a), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args), op.entry(*args), rtol=0, atol=0)


def _public(name: str) -> Any:
    """The callable that the op's file and everything else calls."""
    return sys.modules[OPS[name].reference.__module__]._entry


@pytest.mark.parametrize("way", ["dual_level", "jvp"])
@pytest.mark.parametrize("name", sorted(name for name, op in OPS.items() if op.differentiable))
def test_forward_mode_is_refused(name: str, way: str) -> None:
    sample = next(sample for sample in OPS[name].samples("cpu", torch.float64) if sample.grad)
    args = list(sample.args)
    place = next(i for i in sample.grad if args[i] is not None)
    (point, *_) = tensors((args[place],))

    def call(x: torch.Tensor) -> Any:
        rest = iter([x])
        (changed,) = map_tensors(lambda t: next(rest, t), (args[place],))
        return _public(name)(*args[:place], changed, *args[place + 1 :])

    def derive() -> None:
        direction = torch.ones_like(point)
        if way == "jvp":
            torch.func.jvp(call, (point,), (direction,))
        with forward_ad.dual_level():
            call(forward_ad.make_dual(point, direction))

    with pytest.raises(NotImplementedError, match=f"^{name} has no forward-mode derivative"):
        derive()
    with forward_ad.dual_level():
        call(point)  # nothing to differentiate


def _layout(out: Any) -> list[tuple[Any, ...]]:
    return [(tuple(t.shape), t.dtype, t.stride()) for t in tensors((out,))]


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_backend_lays_its_output_out_as_promised(name: str) -> None:
    # Generated code takes the fake's strides for granted.
    op = OPS[name]
    usable = [b for b in op.backends.values() if b.device in ("any", "cpu") and b.reason() is None]
    for backend, dtype in ((b, dtype) for b in usable for dtype in b.dtypes):
        for sample in op.samples("cpu", dtype):
            args = () if sample.huge else sample.args
            if args and sum(t.numel() for t in tensors(args)) <= 400_000:
                with FakeTensorMode(allow_non_fake_inputs=False) as mode:
                    promised = op.entry(*map_tensors(mode.from_tensor, args))
                assert _layout(backend.run(*args)) == _layout(promised), (backend.name, dtype, sample.name)


@pytest.mark.parametrize("name", sorted(OPS))
def test_schema_of_compiled_entry_point_matches(name: str) -> None:
    from fastmkd import _native_loader

    if not _native_loader.load().cpu:
        pytest.skip(str(_native_loader.load().cpu_reason))
    public = torch.ops.fastmkd.__getattr__(name).default._schema
    native = getattr(torch.ops.fastmkd_native, name).default._schema
    assert str(native).replace("fastmkd_native::", "fastmkd::") == str(public)


@pytest.mark.parametrize("name", sorted(OPS))
def test_declaration_is_whole(name: str) -> None:
    op = OPS[name]
    assert op.name == name == op.schema.split("(", 1)[0]
    assert {"eager"} < set(op.backends), "an op has a reference and at least one faster backend"
    assert len(op.samples("cpu", torch.float32)) >= 6
    assert len(op.bad_inputs()) >= 5
    for dtype in FLOATS:
        for sample in op.samples("cpu", dtype)[:1]:
            assert op.cost(*sample.args).bytes > 0


def test_forcing_a_backend_that_cannot_run_says_why() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is there, so Triton can run")
    scores = torch.rand(1, 4)
    with fastmkd.backend("triton"), pytest.raises(BackendUnavailableError, match="takes cuda tensors"):
        fastmkd.select_tokens(scores, 2)


def test_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match=r"'fast'.*'eager'"), fastmkd.backend("fast"):
        pass
