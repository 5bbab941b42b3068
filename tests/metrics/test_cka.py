"""HSIC_1 and CKA against Eq. 6 and 7 written out in float64."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import fastmkd
from fastmkd.metrics.cka import as_rows
from fastmkd.ops.centred_gram import u_centre


def eq6(x: Tensor, y: Tensor) -> Tensor:
    """HSIC_1 term by term as the paper writes it, in float64."""
    k, el = (t.flatten(1).double() @ t.flatten(1).double().T for t in (x, y))
    k, el = k - k.diagonal().diag(), el - el.diagonal().diag()
    n, one = len(k), torch.ones(len(k), dtype=torch.float64)
    ends = (one @ k @ one) * (one @ el @ one) / ((n - 1) * (n - 2))
    return ((k @ el).trace() + ends - 2 / (n - 2) * (one @ k @ el @ one)) / (n * (n - 3))


def exact_cka(x: Tensor, y: Tensor) -> Tensor:
    return eq6(x, y) / (eq6(x, x) * eq6(y, y)).sqrt()


def related(n: int, widths: list[int], seed: int = 0, share: float = 0.7) -> list[Tensor]:
    """Layers that are partly the same function of the images, float64."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, 12, generator=g, dtype=torch.float64)
    layers = []
    for width in widths:
        mix = torch.randn(12, width, generator=g, dtype=torch.float64)
        noise = torch.randn(n, width, generator=g, dtype=torch.float64)
        layers.append(share * hidden @ mix / 12**0.5 + (1 - share) * noise)
    return layers


@pytest.mark.parametrize("n", [4, 5, 32])
def test_hsic1_is_eq_6(n: int) -> None:
    x, y = related(n, [20, 33])
    torch.testing.assert_close(fastmkd.hsic1(x, y), eq6(x, y), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(fastmkd.hsic1(x, x), eq6(x, x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("mean", [0, 1, 10, 100])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_error_does_not_grow_with_the_mean(mean: float, dtype: torch.dtype, allowed: float, backend: str) -> None:
    layers = [(t + mean).to(dtype) for t in related(64, [2048, 512, 6000], share=0.5)]
    with fastmkd.backend(backend):
        found = fastmkd.cka_matrix(layers, layers)
    # A mean changes nothing; with it the terms of Eq. 6 take each other away, in float64 too.
    centred = [t.double() - t.double().mean(0) for t in layers]
    exact = torch.stack([torch.stack([exact_cka(a, b) for b in centred]) for a in centred])
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < allowed


def test_case_in_which_a_bf16_gram_is_wrong() -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 8, generator=g)
    x, y = (2 + 0.03 * hidden @ torch.randn(8, 512, generator=g) for _ in range(2))
    x, y = x.bfloat16(), y.bfloat16()
    true = float(exact_cka(x, y))
    # Rounded once, at the end: the best that a Gram in bf16 can be.
    k, el = (u_centre((t.double() @ t.double().T).bfloat16().double()) for t in (x, y))
    naive = float((k * el).sum() / (k.norm() * el.norm()))
    assert true == pytest.approx(0.985, abs=5e-3)
    assert naive == pytest.approx(0.14, abs=5e-2)
    assert float(fastmkd.cka_matrix([x], [y])) == pytest.approx(true, abs=1e-3)


def test_negative_hsic_is_kept() -> None:
    g = torch.Generator().manual_seed(3)
    pairs = [(torch.randn(8, 400, generator=g), torch.randn(8, 400, generator=g)) for _ in range(20)]
    found = torch.stack([fastmkd.hsic1(x, y) for x, y in pairs])
    assert (found < 0).any()
    assert (found > 0).any()
    worst = min(range(20), key=lambda i: float(found[i]))
    cka = fastmkd.cka_matrix([pairs[worst][0]], [pairs[worst][1]])[0, 0]
    assert cka < 0
    torch.testing.assert_close(cka.double(), exact_cka(*pairs[worst]), rtol=0, atol=1e-6)
    acc = fastmkd.MinibatchCKA()
    assert torch.equal(acc.update([pairs[worst][0]], [pairs[worst][1]]), acc.compute())
    assert acc.compute() < 0


def test_minibatches_are_averaged_with_equal_weight_and_the_last_may_be_ragged() -> None:
    x, y = related(52, [30, 70])
    acc = fastmkd.MinibatchCKA()
    parts = [slice(0, 20), slice(20, 40), slice(40, 52)]
    single = torch.stack([acc.update([x[p]], [y[p], x[p]]) for p in parts])
    mean = [torch.stack([eq6(a[p], b[p]) for p in parts]).mean() for a, b in ((x, y), (x, x), (y, y))]
    assert acc.batches == 3
    torch.testing.assert_close(acc.compute()[0, 0], mean[0] / (mean[1] * mean[2]).sqrt())
    torch.testing.assert_close(acc.compute()[0, 1], torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(single[2, 0, 0], exact_cka(x[parts[2]], y[parts[2]]))
    acc.reset()
    with pytest.raises(ValueError, match="before any update"):
        acc.compute()


def test_cka_is_differentiable_as_a_loss() -> None:
    x, y = related(6, [9, 5])
    x.requires_grad_()
    y.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: fastmkd.cka_matrix([a, b], [b]), (x, y))
    n = len(x)
    (grad,) = torch.autograd.grad(fastmkd.hsic1(x, y), x)
    centred = fastmkd.ops.centred_gram([y.detach()])[0]
    torch.testing.assert_close(grad, 2 * centred @ x / (n * (n - 3)))  # the formula of DESIGN.md


def test_following_the_gradient_brings_two_layers_together() -> None:
    x, y = (t.float() for t in related(16, [20, 20], share=0.3))
    x.requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    losses = []
    for _ in range(40):
        loss = 1 - fastmkd.cka_matrix([x], [y])[0, 0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_dead_layer_is_nan_and_warned_of_at_compute_only() -> None:
    alive = torch.randn(8, 5)
    dead = torch.full((8, 7), 3.3)
    one_image = torch.zeros(8, 7)
    one_image[0] = torch.randn(7)  # centring leaves nothing of it
    layers = [alive, dead, one_image]
    acc = fastmkd.MinibatchCKA(names=(["a", "b", "c"], ["d"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        acc.update(layers, [alive])
        silent = fastmkd.cka_matrix(layers, [alive])
    with pytest.warns(RuntimeWarning) as caught:
        found = acc.compute()
    assert "for b (HSIC_1 with itself 0), c (HSIC_1 with itself 0):" in str(caught[0].message)
    assert found[:, 0].isnan().tolist() == silent[:, 0].isnan().tolist() == [False, True, True]
    with pytest.warns(RuntimeWarning, match="NaN for second"):
        fastmkd.cka_matrix([alive, dead], [alive, alive], names=["first", "second"])
    acc = fastmkd.MinibatchCKA()
    acc.update([alive / 0], [alive])
    with pytest.warns(RuntimeWarning, match=r"xs\[0\] .*nan"):
        acc.compute()


def test_layer_dead_in_one_minibatch_only_is_alive() -> None:
    x, y = torch.randn(8, 5), torch.randn(8, 5)
    acc = fastmkd.MinibatchCKA()
    acc.update([torch.ones(8, 5)], [y])
    acc.update([x], [x])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert acc.compute().isfinite().all()


def test_memory_format_and_mixed_dtypes() -> None:
    x = torch.randn(8, 6, 5, 5)
    last = x.to(memory_format=torch.channels_last)
    assert as_rows(last).data_ptr() == last.data_ptr()
    tokens = torch.randn(8, 10, 6)[:, 1:]
    assert as_rows(tokens).data_ptr() == tokens.data_ptr()
    expected = fastmkd.cka_matrix([x, tokens], [x])
    torch.testing.assert_close(fastmkd.cka_matrix([last, tokens], [last]), expected)
    mixed = fastmkd.cka_matrix([x.double(), tokens.bfloat16(), tokens], [x.half(), x[:, 0, 0, 0]])
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed[0, 0], torch.tensor(1.0), rtol=0, atol=1e-4)
    torch.testing.assert_close(mixed[1], mixed[2], rtol=0, atol=1e-2)
    assert fastmkd.cka_matrix([x.double()], [x.double()]).dtype == torch.float64


def test_compiled_in_one_graph_whatever_the_size_and_the_memory_format() -> None:
    compiled = torch.compile(lambda x, y: fastmkd.cka_matrix([x], [y]), fullgraph=True, backend="aot_eager")
    y = torch.randn(8, 3, 5)
    for size in ((4, 4), (5, 5), (6, 7)):  # from the second on the sizes, so the strides too, are not known
        x = torch.randn(8, 6, *size)
        for stored in (x, x.to(memory_format=torch.channels_last), x.mT):
            torch.testing.assert_close(compiled(stored, y), fastmkd.cka_matrix([x], [y]))


def test_same_list_twice_makes_each_gram_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmkd.metrics import cka

    made = []
    monkeypatch.setattr(cka, "centred_gram", lambda rows: made.append(len(rows)) or fastmkd.ops.centred_gram(rows))
    layers = [torch.randn(8, 5), torch.randn(8, 3)]
    fastmkd.cka_matrix(layers, layers)
    assert made == [2]


@pytest.mark.parametrize(
    ("xs", "ys", "error", "said"),
    [
        ([torch.randn(3, 2)], [torch.randn(3, 2)], ValueError, "at least 4"),
        ([torch.randn(8, 2)], [torch.randn(7, 2)], ValueError, r"ys\[0\] has shape \(7, 2\)"),
        ([], [torch.randn(8, 2)], ValueError, "xs is empty"),
        (torch.randn(8, 2), [torch.randn(8, 2)], TypeError, "xs is a tensor"),
        ([torch.ones(8, 2).long()], [torch.randn(8, 2)], TypeError, "floating-point"),
        ([torch.tensor(1.0)], [torch.randn(8, 2)], ValueError, "has shape"),
        ([torch.randn(0, 2, 3)], [torch.randn(0, 6)], ValueError, "holds 0 images; .* at least 4"),
        (
            [torch.randn(8, 2).to(torch.float8_e4m3fn)],
            [torch.randn(8, 2)],
            TypeError,
            "^centred_gram got float8_e4m3fn and takes float32, bfloat16, float16, float64; cast the inputs",
        ),
    ],
)
def test_wrong_input_is_named(xs: list[Tensor], ys: list[Tensor], error: type[Exception], said: str) -> None:
    for call in (fastmkd.cka_matrix, fastmkd.MinibatchCKA().update):
        with pytest.raises(error, match=said):
            call(xs, ys)


def test_names_and_layers_must_fit() -> None:
    x = [torch.randn(8, 2)]
    with pytest.raises(ValueError, match="2 and 2 names for 1 and 1 layers"):
        fastmkd.cka_matrix(x, x, names=["a", "b"])
    acc = fastmkd.MinibatchCKA()
    acc.update(x, x)
    with pytest.raises(ValueError, match="2 x 1 layers after minibatches of 1 x 1"):
        acc.update(x * 2, x)
