"""Pictures and tables of CKA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastmkd.metrics.figures import draw_curves, draw_heat_map, draw_ranked, rank_square, write_table

SIGNATURE = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


@pytest.mark.parametrize("kind", SIGNATURE)
def test_pictures(tmp_path: Path, kind: str) -> None:
    cka = torch.rand(2, 3, dtype=torch.float64)
    cka[0, 0] = float("nan")
    draw_heat_map(cka, ["a", "b"], ["c", "d", "e"], tmp_path / f"map.{kind}", "CKA", ("student", "teacher"))
    draw_ranked(torch.rand(400), tmp_path / f"ranked.{kind}", "a - c")
    draw_curves([1, 2, 3], {"a - c": [0.1, -0.05, 0.9]}, tmp_path / f"curves.{kind}", "CKA")
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(SIGNATURE[kind])
        assert path.stat().st_size > 2000


def test_other_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.png, \.svg, \.pdf"):
        draw_ranked(torch.rand(4), tmp_path / "ranked.xyz")


def test_ranking_puts_the_largest_first_and_nan_last() -> None:
    values = torch.rand(400)
    square = rank_square(values)
    assert square.shape == (20, 20)
    assert torch.equal(square.flatten(), values.sort(descending=True).values)
    square = rank_square(torch.tensor([0.2, float("nan"), -0.1, 0.4, 0.3]))
    torch.testing.assert_close(square.flatten()[:4], torch.tensor([0.4, 0.3, 0.2, -0.1]))
    assert square.flatten()[4:].isnan().all()


def test_table_keeps_all_digits(tmp_path: Path) -> None:
    value = 0.1234567890123456
    write_table(["layer", "x"], [["a, b", value]], tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text().splitlines() == ["layer,x", f'"a, b",{value}']
