"""The dense way of a masked convolution: the numbers of the packed op, taken where a table says so and only there."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from random_masks import draw_mask, masks, pixels

import fastmkd
from fastmkd.nn import crossings, masked_conv
from fastmkd.nn.dense_way import dense_convolve
from fastmkd.nn.masked_conv import MaskedConv2d, convolve
from fastmkd.nn.packed import PackedFeatures, pack
from fastmkd.nn.plan import MaskPlan, Window

# channels in and out, groups, window
GEOMETRIES = {
    "3x3": (3, 5, 1, Window((3, 3), (1, 1), (1, 1), (1, 1))),
    "3x3_stride2": (4, 6, 1, Window((3, 3), (2, 2), (1, 1), (1, 1))),
    "stem": (3, 4, 1, Window((7, 7), (4, 4), (3, 3), (1, 1))),
    "patches": (3, 4, 1, Window((4, 4), (4, 4), (0, 0), (1, 1))),
    "one_channel": (1, 1, 1, Window((3, 3), (1, 1), (1, 1), (1, 1))),
    "grouped": (6, 4, 2, Window((3, 3), (1, 1), (1, 1), (1, 1))),
    "depthwise": (5, 5, 5, Window((5, 5), (2, 2), (2, 2), (1, 1))),
    "depthwise_multiplier": (3, 6, 3, Window((3, 3), (1, 1), (1, 1), (1, 1))),
    "dilated": (3, 4, 1, Window((3, 3), (1, 1), (2, 2), (2, 2))),
    "rectangular": (3, 4, 1, Window((1, 7), (2, 1), (0, 3), (1, 1))),
}
SQUARE = Window((3, 3), (1, 1), (1, 1), (1, 1))
NAMED = "float32/4 channels/3x3/stride 1/cell 2"


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", GEOMETRIES)
@settings(max_examples=12, deadline=None)
@given(visible=masks, cell=st.tuples(st.sampled_from((4, 8)), st.just(4)), seed=st.integers(0, 99))
def test_equals_the_packed_op_and_a_convolution_between_masks(name, biased, visible, cell, seed):
    torch.manual_seed(seed)
    c_in, c_out, groups, window = GEOMETRIES[name]
    plan, size = MaskPlan(visible), (visible.shape[1] * cell[0], visible.shape[2] * cell[1])
    x = torch.randn(len(visible), c_in, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(c_out, c_in // groups, *window.kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(c_out, dtype=torch.float64, requires_grad=True) if biased else None
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
    twin = F.conv2d(x * pixels(visible, size), weight, bias, window.stride, window.padding, window.dilation, groups)
    twin = twin * pixels(visible, twin.shape[2:])
    loss = torch.randn_like(twin)
    want = torch.autograd.grad((twin * loss).sum(), leaves)
    packed = convolve(pack(x, plan), weight, bias, window, groups)
    rows = dense_convolve(pack(x, plan).values, weight, bias, plan, cell, window, groups)
    dense = packed.with_values(rows).to_dense()
    torch.testing.assert_close(rows, packed.values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dense, twin, rtol=1e-12, atol=1e-12)
    for g, w in zip(torch.autograd.grad((dense * loss).sum(), leaves), want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-11)


def test_gradients_of_gradients():
    torch.manual_seed(0)
    plan = MaskPlan(draw_mask("mixed", 2, (2, 2), 4))
    values = torch.randn(plan.num_rows((2, 2)), 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def run(values, weight):
        return dense_convolve(values, weight, None, plan, (2, 2), SQUARE, 1)

    assert torch.autograd.gradcheck(run, (values, weight))
    assert torch.autograd.gradgradcheck(run, (values, weight))


def test_hidden_positions_are_zeros_whatever_lay_in_memory(poisoned):
    visible = draw_mask("one", 2, (2, 2), 1)
    plan, ones = MaskPlan(visible), torch.ones(1, 1, 3, 3)
    rows = dense_convolve(torch.ones(plan.num_rows((2, 2)), 1), ones, None, plan, (2, 2), SQUARE, 1)
    assert torch.equal(rows, torch.full_like(rows, 4))  # of nine taps the cell's own four


def test_cells_stay_whole():
    plan = MaskPlan(torch.ones(1, 2, 2).bool())
    with pytest.raises(ValueError, match="do not stay whole"):
        dense_convolve(
            torch.ones(16, 1), torch.ones(1, 1, 3, 3), None, plan, (2, 2), SQUARE._replace(padding=(0, 0)), 1
        )


def test_tables_are_built_once_and_outlast_an_inference_pass():
    plan = MaskPlan(draw_mask("mixed", 2, (2, 2), 4))
    x, weight = torch.randn(plan.num_rows((2, 2)), 3), torch.randn(3, 3, 3, 3, requires_grad=True)
    with torch.inference_mode():
        dense_convolve(x, weight, None, plan, (2, 2), SQUARE, 1)
    kept = plan.runs(2)
    dense_convolve(x, weight, None, plan, (2, 2), SQUARE, 1).sum().backward()
    assert plan.runs(2) is kept
    assert len(plan._runs) == 1


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a table of crossings for this device, and lists the dense calls that follow from it."""
    taken = []

    def spy(*args):
        taken.append(args[0].dtype)
        return dense_convolve(*args)

    def write(content):
        path = tmp_path / f"{crossings.device_key(torch.device('cpu'))}.json"
        path.write_text(content if isinstance(content, str) else json.dumps({"choices": {}, "dense_from": content}))
        crossings.read_table.cache_clear()
        return taken

    monkeypatch.setattr(crossings, "TABLES", tmp_path)
    monkeypatch.setattr(masked_conv, "dense_convolve", spy)
    yield write
    crossings.read_table.cache_clear()


def three_quarters(channels: int = 4) -> PackedFeatures:
    return pack(torch.randn(1, channels, 4, 4), torch.tensor([[[True, False], [True, True]]]))


@pytest.mark.parametrize(
    ("content", "dense"),
    [
        ({NAMED: 0.75}, 1),
        ({NAMED: 0.5}, 1),
        ({NAMED: 0.76}, 0),
        ({NAMED: None}, 0),
        ({NAMED.replace("float32", "bfloat16"): 0.5}, 0),
        ({NAMED.replace("cell 2", "cell 4"): 0.5}, 0),
        ({NAMED.replace("stride 1", "stride 2"): 0.5}, 0),
        ({NAMED.replace("4 channels", "depthwise, 4 channels"): 0.5}, 0),
        ({}, 0),
        ("{}", 0),
    ],
)
def test_the_table_decides(table, content, dense):
    taken, x, conv = table(content), three_quarters(), MaskedConv2d(4, 4, 3, padding=1)
    out = conv(x)
    assert len(taken) == dense
    with fastmkd.backend("eager"):
        expected = conv(x)
    assert len(taken) == dense
    torch.testing.assert_close(out.values, expected.values, rtol=1e-5, atol=1e-5)
    assert torch.equal(out.values, conv(x).values)


@pytest.mark.parametrize("name", [name for name in fastmkd.ops.choice.NAMES if name != "auto"])
def test_a_forced_backend_stays_packed(table, name):
    table({NAMED: 0.1})
    x, weight = three_quarters(), torch.zeros(4, 4, 3, 3, requires_grad=True)
    arguments = (x.values, weight, x.plan, x.cell, SQUARE, 1)
    assert crossings.goes_dense(*arguments)
    with fastmkd.backend(name):
        assert not crossings.goes_dense(*arguments)
        with fastmkd.backend("auto"):
            assert crossings.goes_dense(*arguments)


def test_bits_that_must_not_depend_on_threads_stay_packed(table, poisoned):
    taken = table({NAMED: 0.1})
    assert torch.are_deterministic_algorithms_enabled()
    MaskedConv2d(4, 4, 3, padding=1)(three_quarters())
    assert not taken


def test_a_pass_without_gradient_has_a_crossing_of_its_own(table):
    taken = table({NAMED: 0.5, f"{NAMED}/forward": 0.9})
    conv, x = MaskedConv2d(4, 4, 3, padding=1), three_quarters()
    with torch.no_grad():
        conv(x)
    assert not taken
    conv(x)
    assert len(taken) == 1
    conv.requires_grad_(False)(x)
    assert len(taken) == 1
    table({NAMED: 0.9, f"{NAMED}/forward": 0.5})
    conv(x)
    assert len(taken) == 2


def test_uneven_padding_stays_packed(table):
    taken = table({NAMED.replace("3x3", "2x2"): 0.1})
    MaskedConv2d(4, 4, 2, padding="same")(three_quarters())
    assert not taken


def test_float32_with_avx512_bf16_takes_the_table_of_avx512(tmp_path, monkeypatch):
    monkeypatch.setattr(crossings, "TABLES", tmp_path)
    monkeypatch.setattr(crossings, "device_key", lambda device: "cpu-avx512_bf16")
    low = NAMED.replace("float32", "bfloat16")
    (tmp_path / "cpu-avx512.json").write_text(json.dumps({"dense_from": {NAMED: 0.5, low: 0.5}}))
    assert crossings._crossing(torch.device("cpu"), NAMED) == 0.5
    assert crossings._crossing(torch.device("cpu"), low) is None
    (tmp_path / "cpu-avx512_bf16.json").write_text(json.dumps({"dense_from": {low: 0.25}}))
    crossings.read_table.cache_clear()
    assert crossings._crossing(torch.device("cpu"), NAMED) is None
    assert crossings._crossing(torch.device("cpu"), low) == 0.25


def test_an_unknown_device_stays_packed(monkeypatch):
    monkeypatch.setattr(crossings, "device_key", lambda device: "nobody-measured-this")
    x = pack(torch.randn(1, 4, 4, 4), torch.ones(1, 2, 2).bool())
    assert not crossings.goes_dense(x.values, torch.zeros(4, 4, 3, 3, requires_grad=True), x.plan, x.cell, SQUARE, 1)


def test_autocast_looks_up_the_dtype_that_runs(table):
    taken = table({NAMED.replace("float32", "bfloat16"): 0.5})
    x, conv = three_quarters(), MaskedConv2d(4, 4, 3, padding=1)
    exact = conv(x)
    assert not taken
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(x)
    assert taken == [torch.bfloat16]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.values.float(), exact.values, rtol=0.05, atol=0.05)
    out.values.float().square().sum().backward()
    assert conv.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("inside", [True, False])
def test_compiles(table, inside):
    torch._dynamo.reset()
    taken = table({NAMED: 0.75})
    conv = MaskedConv2d(4, 4, 3, padding=1)
    compiled = torch.compile(
        (lambda images, visible: conv(pack(images, visible)).values) if inside else lambda x, _: conv(x).values,
        backend="aot_eager",
        fullgraph=not inside,  # a CPU's mask is checked, and its cells are counted, between two graphs
    )
    for hidden in (1, 2):
        visible = torch.ones(1, 2, 2).bool()
        visible[0, 0, :hidden] = False
        images = torch.randn(1, 4, 4, 4)
        out = compiled(images if inside else pack(images, visible), visible)
        expected = conv(pack(images, visible)).values
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        got, want = (torch.autograd.grad(y.square().sum(), conv.parameters()) for y in (out, expected))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)
    assert taken


def test_a_count_that_a_graph_does_not_know_stays_packed(table):
    torch._dynamo.reset()
    table({NAMED: 0.5})
    x, weight = three_quarters(), torch.zeros(4, 4, 3, 3, requires_grad=True)
    plan = copy.copy(x.plan)

    def run(visible):
        plan.cells = visible.flatten().nonzero()[:, 0]
        return visible + 1 if crossings.goes_dense(x.values, weight, plan, (2, 2), SQUARE, 1) else visible + 2

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        out = torch.compile(run, backend="eager", fullgraph=True)(x.visible.int())
    assert out.min() == 2


@pytest.mark.parametrize("share", [0, 1.5, -0.2, "0.9", True, [0.9]])
def test_a_share_that_is_none_is_refused(table, share):
    table({NAMED: share})
    with pytest.raises(
        ValueError, match=r"has .* for 'float32/4 channels.*expected a visible share in \(0, 1\] or null"
    ):
        MaskedConv2d(4, 4, 3, padding=1)(three_quarters())


@pytest.mark.parametrize("content", ["no json", "[]", '{"dense_from": [1]}'])
def test_a_broken_table_is_refused(table, content):
    table(content)
    with pytest.raises(ValueError, match=r"is not a table of a device .*rebuild it with `python -m fastmkd\.bench"):
        MaskedConv2d(4, 4, 3, padding=1)(three_quarters())


def test_shipped_tables_name_classes_of_layers():
    kind = r"((depthwise|grouped), )?(4|16|32|64|256) channels"
    form = rf"(float32|bfloat16|float16)/{kind}/(\d)x\d/stride \d/cell \d+(/forward)?"
    found = [crossings.read_table(path) for path in crossings.TABLES.glob("*.json")]
    assert any(found)
    assert not [named for read in found for named in read if not re.fullmatch(form, named)]
