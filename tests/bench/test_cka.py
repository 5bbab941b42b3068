"""The benchmark of CKA on tiny layers: its ways agree, and its targets name ways that it has."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from fastmkd.bench import peers
from fastmkd.bench.cases import cka
from fastmkd.bench.registry import Case, Setting
from fastmkd.bench.targets import TARGETS
from fastmkd.bench.verify import Oracle

CPU = torch.device("cpu")
KINDS = ["16 x 16 layers", "one pair"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cka, "CNN", [(3, 8, 8), (6, 4, 4)])


def install(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    """Makes `pytorch-cka` look installed in a version, computing what it does, or missing."""
    monkeypatch.setattr(peers, "util", SimpleNamespace(find_spec=lambda name: version))
    monkeypatch.setattr(peers, "metadata", SimpleNamespace(version=lambda name: version))
    monkeypatch.setitem(sys.modules, "cka", SimpleNamespace(cka_from_features=cka.pairwise))


def case_of(kind: str, dtype: str = "fp32") -> Case:
    return cka.cka(Setting(CPU, dtype), kind, batch=8)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_ways_agree(kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, peers.PYTORCH_CKA)
    case = case_of(kind, dtype)
    names = ["pairwise, three terms", "one Gram a layer, PyTorch", "cka_matrix", "Grams alone"]
    assert [v.name for v in case.variants] == names + ["pytorch-cka"] * (dtype == "fp32")
    oracle = Oracle(case.variants)
    assert all(oracle.judge(v).ok for v in case.variants)


@pytest.mark.parametrize(("version", "sentence"), [(None, "is not installed"), ("1.0", "pytorch-cka 1.0 is installed")])
def test_a_missing_peer_is_listed_with_the_reason(
    version: str | None, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, version)
    assert sentence in str(case_of(KINDS[0]).variants[-1].unavailable)


def test_targets_name_what_the_benchmark_has() -> None:
    mine = [t for t in TARGETS if t.benchmark == "cka" and not t.gpu]
    assert len(mine) == 4
    for target in mine:
        assert target.label in KINDS
        case = case_of(target.label)
        assert {target.variant, target.against or case.baseline} <= {v.name for v in case.variants}
        assert case.panel.startswith(target.panel.removesuffix("64"))
