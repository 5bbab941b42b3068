"""The benchmark of MKD's memory on tiny decoders, and the table of the user page."""

from __future__ import annotations

from pathlib import Path

import torch

from fastmkd.bench.cases.mkd_memory import memory_case
from fastmkd.bench.decoder_memory import levels, main, table
from fastmkd.bench.memory import peak_bytes
from fastmkd.bench.registry import Setting
from fastmkd.bench.verify import Oracle

CPU = torch.device("cpu")


def test_both_attentions_agree_and_sam_saves_most() -> None:
    case = memory_case(Setting(CPU, "fp32", quick=True), 256, 1, 8, width=16, depth=1, heads=8, mlp_ratio=2.0)
    oracle, peaks = Oracle(case.variants), {}
    for variant in case.variants:
        assert oracle.judge(variant).ok, variant.name
        peaks[variant.name] = peak_bytes(variant.run, CPU)
    matrix = 8 * (256 // 8) ** 4 * 4  # P3's, one block of eight heads
    assert peaks["without SAM, matrix kept"] > 2 * matrix > 20 * peaks["tokens of 32 pixels, matrix kept"]
    assert peaks["without SAM"] < matrix


def test_tokens_and_matrices_by_hand() -> None:
    without, with_sam = levels(800, 1344, None), levels(800, 1344, 32)
    assert [level.size for level in without] == [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]
    assert [level.tokens for level in without] == [16800, 4200, 1050, 273, 77]
    assert {level.tokens for level in with_sam} == {25 * 42}
    assert without[0].attention == 4 * 8 * 16800**2 * 4


def test_the_page_holds_the_table(capsys) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert printed == table() + "\n"
    assert printed in (Path(__file__).parents[2] / "docs" / "mkd.md").read_text()
