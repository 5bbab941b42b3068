"""The model on paper: it agrees with its simulation, the page is what it says, and the counts are the library's."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fastmkd.bench.scaling import GPUS, H100, Work, all_reduce, gather, predict, ring, tree
from fastmkd.bench.scaling_page import AGREEMENT, PAGE, load, render
from fastmkd.bench.scaling_simulation import simulate, simulate_ring, simulate_tree
from fastmkd.bench.scaling_works import _vits

WORKS = load()


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.name)
def test_formula_and_simulation_agree(work: Work) -> None:
    for gpus in GPUS:
        assert simulate(work, gpus, H100) == pytest.approx(predict(work, gpus).step, rel=AGREEMENT), gpus


@pytest.mark.parametrize("gpus", [8, 64, 1024])
@pytest.mark.parametrize("size", [4e3, 4e6, 25e6])
def test_collectives_agree(gpus: int, size: float) -> None:
    assert simulate_ring(size, gpus, H100) == pytest.approx(ring(size, gpus, H100), rel=0.05)
    assert simulate_ring(size, gpus, H100, gather=True) == pytest.approx(gather(size, gpus, H100), rel=0.05)
    if gpus > 8:
        assert simulate_tree(size, gpus, H100) == pytest.approx(tree(size, gpus, H100), rel=0.15)


def test_bounds_that_no_network_beats() -> None:
    """Each GPU gets nearly all bytes twice within its node, each node likewise from the others; delays never vanish."""
    for gpus in GPUS:
        m = H100.nodes(gpus)
        least = 2e8 * max((m - 1) / m / H100.bandwidth(gpus), (gpus - 1) / gpus / H100.bandwidth(1))
        played = [simulate_ring(1e8, gpus, H100)] + [simulate_tree(1e8, gpus, H100)] * (m > 1)
        assert min(all_reduce(1e8, gpus, H100), *played, 1.0) >= least
        assert all_reduce(8, gpus, H100) >= H100.launch
    work = Work("compute alone", 64, 1e10, 1e10, gradients=1.0)
    found = predict(work, 8, replace(H100, spread=0.0))
    assert found.compute == pytest.approx(64 * 4e10 / (H100.peak * H100.reached))
    assert found.step == pytest.approx(found.compute, rel=0.01)
    assert predict(work, 8).step > found.step
    assert predict(replace(work, teacher=5e9), 8).compute < found.compute


def test_gathered_cka_grows_with_the_square_and_sums_do_not() -> None:
    gathered = next(work for work in WORKS if work.gathered)
    summed = next(work for work in WORKS if work.summed and work.name.startswith(gathered.name))
    growth = predict(gathered, 1024).waits / predict(gathered, 128).waits
    assert 16 < growth < 64
    assert predict(summed, 1024).waits < 1e-3
    assert predict(gathered, 1024).memory > 100 * predict(gathered, 8).memory > 0


def test_the_page_is_what_the_model_says() -> None:
    page = PAGE.read_text()
    assert render(page, WORKS) == page, "run python -m fastmkd.bench.scaling"


def test_the_counts_are_those_of_the_library() -> None:
    known = {work.name: work for work in WORKS}
    for counted in _vits():
        assert known[counted.name] == counted
    assert {name.partition(",")[0] for name in known} == {"Supervised", "KD", "MaskedKD", "DMAE", "DPK", "MKD"}
    assert all(math.isfinite(work.student) and work.student > 1e8 for work in WORKS)
