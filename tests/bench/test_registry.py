"""Registration by hand, and generation from the op registry."""

from __future__ import annotations

import pytest
import torch

from fastmkd.bench import op_entries, registry
from fastmkd.bench.registry import Answer, Case, Setting, Variant, benchmark, benchmarks, find
from fastmkd.bench.verify import Oracle
from fastmkd.ops import OPS

CPU = torch.device("cpu")


def test_every_op_has_a_benchmark_without_a_line_of_code() -> None:
    assert {f"op.{name}" for name in OPS} == set(op_entries.generate())


@pytest.mark.parametrize("name", sorted(OPS))
def test_generated_cases_run_every_backend_and_agree(name: str) -> None:
    entry = op_entries.generate()[f"op.{name}"]
    setting = Setting(CPU, "fp32", quick=True)
    (parameters,) = entry.grid(setting)
    case = entry.build(setting, **parameters)
    shown = {v.name for v in case.variants}
    assert shown == {"eager", "auto"} | {b.name for b in OPS[name].backends.values() if b.device == "cpu"}
    usable = [v for v in case.variants if v.unavailable is None]
    oracle = Oracle(usable)
    assert all(oracle.judge(v).ok for v in usable)
    answer = case.variants[0].answer
    assert answer.flops > 0 or answer.bytes > 0
    assert case.params["op"] == name


def test_a_full_run_takes_several_large_samples() -> None:
    op = OPS["patch_embed"]
    quick, full = (op_entries.generate()["op.patch_embed"].grid(Setting(CPU, "fp32", q)) for q in (True, False))
    assert len(full) == op_entries.LARGEST
    assert full[: len(quick)] == quick
    assert not {s.name for s in op.samples("cpu", torch.float32) if s.huge} & {p["sample"] for p in full}


def test_written_entries_are_found_and_their_grids_are_not_empty() -> None:
    expected = ["align_cells", "cka", "cls_saliency", "dmae_step", "dmae_teacher", "dpk_step", "import_time"]
    expected += ["masked_autoencoder", "masked_conv3x3", "masked_depthwise", "masked_resnet"]
    expected += ["masked_teacher", "maskedkd_step", "mkd_decoder", "mkd_memory", "mkd_step"]
    expected += ["packed_attention", "patch_embed", "select_tokens"]
    assert sorted(name for name in benchmarks() if not name.startswith("op.")) == expected
    for entry in benchmarks().values():
        assert entry.grid(Setting(CPU, entry.dtypes[0], quick=True))


def test_find_takes_patterns_in_order_and_names_what_exists() -> None:
    assert [b.name for b in find(["select_tokens", "op.cls*"])] == ["select_tokens", "op.cls_saliency"]
    assert len(find([])) == len(benchmarks())
    with pytest.raises(ValueError, match=r"no benchmark is called 'nonsense'.*masked_teacher"):
        find(["nonsense"])


def test_half_precision_is_for_gpus() -> None:
    entry = benchmarks()["patch_embed"]
    assert entry.runs_on("cuda", "fp16")
    assert not entry.runs_on("cpu", "fp16")


def test_names_are_unique(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTERED", {})
    register = benchmark("twice", summary="", grid=lambda setting: [])
    register(lambda setting: None)
    with pytest.raises(ValueError, match="'twice'"):
        register(lambda setting: None)


def test_a_case_needs_its_baseline_and_distinct_names() -> None:
    variant = Variant("a", lambda: None, Answer())
    with pytest.raises(ValueError, match="baseline='b'"):
        Case("l", "p", [variant], "b")
    with pytest.raises(ValueError, match="two variants"):
        Case("l", "p", [variant, variant], "a")
