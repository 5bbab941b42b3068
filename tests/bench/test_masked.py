"""The masked convolution's benchmarks on tiny layers and networks: what they compare is the same function."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

from fastmkd import block_mask, pack
from fastmkd.bench import peers, roofline
from fastmkd.bench.cases import masked_resnet
from fastmkd.bench.masked_layers import DIRECTIONS, Layer, layers_case, layers_of
from fastmkd.bench.memory import peak_bytes
from fastmkd.bench.progress import describe_variant
from fastmkd.bench.registry import Answer, Case, Setting, Variant, benchmarks
from fastmkd.bench.runner import measure
from fastmkd.bench.targets import TARGETS
from fastmkd.bench.timing import Plan
from fastmkd.bench.verify import Oracle

CPU = torch.device("cpu")
SHORT = Plan(0.0, 2, 2, 0.0)
FULL = (Layer((4, 4), 3, 1, 1, 8), Layer((4, 6), 3, 2, 1, 8), Layer((6, 6), 3, 1, 1, 4))
DEPTHWISE = (Layer((6, 6), 7, 1, 6, 8), Layer((6, 6), 3, 2, 6, 8))


@pytest.fixture(autouse=True)
def fixed_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that need no measurement."""
    monkeypatch.setattr(roofline, "copy_rate", lambda device: 1e9)
    monkeypatch.setattr(roofline, "matmul_rate", lambda device, dtype: 1e9)


def by_name(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {v["name"]: v for v in record["variants"]}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layers", [FULL, DEPTHWISE], ids=["full", "depthwise"])
def test_all_ways_to_run_the_layers_agree_with_the_twin(layers: tuple[Layer, ...], direction: str, dtype: str) -> None:
    case = layers_case(Setting(CPU, dtype), layers, 50, direction, 2, "tiny", grid=(2, 2))
    assert (case.baseline, case.label, case.panel) == ("dense twin", "50 % hidden", f"tiny, {direction}, batch 2")
    usable = [v for v in case.variants if v.unavailable is None]
    assert {"plain, unmasked", "dense twin", "block gather", "fastmkd"} <= {v.name for v in usable}
    oracle = Oracle(usable)
    assert all(oracle.judge(v).ok for v in usable)
    compared = next(v for v in usable if v.name == "fastmkd")
    passes = 3 if direction == DIRECTIONS[1] else 1
    result = compared.read(compared.run())
    assert len(result) == passes * len(layers)
    assert result[0].shape == (2 * 2 * (layers[0].size // 2) ** 2, layers[0].channels[1])  # two of four cells visible


def test_a_wrong_layer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    halos = peers.halo_rows
    monkeypatch.setattr(peers, "halo_rows", lambda *args: halos(*args).flip(1))
    case = layers_case(Setting(CPU), FULL, 50, "forward", 2, "tiny", grid=(2, 2))
    able = [v for v in case.variants if v.unavailable is None]
    wrong = next(v for v in able if v.name == "block gather")
    assert not Oracle(able).judge(wrong).ok


def test_the_work_is_counted_by_the_taps_that_are_present() -> None:
    case = layers_case(Setting(CPU), [Layer((3, 5), 3, 1, 1, 4)], 75, "forward", 1, "tiny", grid=(2, 2))
    work = {v.name: v.answer for v in case.variants}
    assert work["plain, unmasked"].flops == 2 * 16 * 9 * 15
    assert work["fastmkd"].flops == 2 * 16 * 15  # a lone 2 x 2 cell: every pixel sees all four
    assert work["fastmkd"].bytes == 4 * (4 * 3 + 4 * 5 + 9 * 15)
    training = layers_case(Setting(CPU), [Layer((3, 5), 3, 1, 1, 4)], 75, DIRECTIONS[1], 1, "tiny", grid=(2, 2))
    assert training.variants[0].answer.flops == 3 * work["plain, unmasked"].flops


def test_layers_are_read_off_the_networks() -> None:
    resnet = layers_of("resnet50", 3, depthwise=False)
    assert [layer.stride for layer in resnet].count(2) == 3
    assert sum(layer.out_size**2 * 9 * layer.macs for layer in resnet) == 16 * 56 * 56 * 9 * 64 * 64
    convnext, mobilenet = layers_of("convnext_tiny", 7, depthwise=True), layers_of("mobilenetv2_100", 3, depthwise=True)
    assert (len(convnext), len(mobilenet)) == (18, 17)
    assert all(layer.groups == layer.channels[0] == layer.channels[1] for layer in convnext + mobilenet)


@pytest.mark.parametrize(("size", "kernel", "stride"), [(8, 3, 1), (8, 3, 2), (2, 3, 1), (4, 3, 2), (8, 7, 1)])
def test_block_gather_is_the_masked_convolution(size: int, kernel: int, stride: int) -> None:
    visible = block_mask(3, (2, 2), 0.5)
    maps = pack(torch.randn(3, 4, size, size, dtype=torch.float64), visible)
    weight = torch.randn(6, 4, kernel, kernel, dtype=torch.float64)
    dense = F.conv2d(maps.to_dense(), weight, stride=stride, padding=kernel // 2)
    halos = peers.halo_rows(visible, size // 2, kernel, stride)
    found = peers.block_gather(halos, kernel, stride, groups=1)(maps.values, weight)
    torch.testing.assert_close(found, pack(dense, maps.plan).values)


@pytest.mark.parametrize(("installed", "sentence"), [(None, "is not installed"), ("1.0", "spconv 1.0 is installed")])
def test_spconv_is_listed_with_the_reason_why_it_does_not_run(
    installed: str | None, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "util", SimpleNamespace(find_spec=lambda name: installed))
    monkeypatch.setattr(peers, "metadata", SimpleNamespace(version=lambda name: installed))
    case = layers_case(Setting(CPU), FULL, 50, "forward", 2, "tiny", grid=(2, 2))
    record = measure(case, Setting(CPU), SHORT, lambda share: None)
    assert sentence in describe_variant(by_name(record)["spconv, 1 thread"])[1]


@pytest.mark.parametrize("name", ["masked_conv3x3", "masked_depthwise", "masked_resnet"])
def test_cases_are_listed_where_a_number_says_something(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = benchmarks()[name]
    gpu = torch.device("cuda")
    assert entry.runs_on("cuda", "bf16")
    assert not entry.grid(Setting(gpu, "fp32"))
    assert {p["percent"] for p in entry.grid(Setting(CPU))} == {10, 50, 75}
    assert len(entry.grid(Setting(CPU, quick=True))) < len(entry.grid(Setting(CPU)))
    assert 75 in {p["percent"] for p in entry.grid(Setting(gpu, "bf16", quick=True))}
    for present in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda present=present: present)
        assert bool(entry.grid(Setting(CPU, "bf16"))) == present


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet10t", zero_init_last=False, num_classes=5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_step_agrees_with_the_twin_and_leaves_the_weights(dtype: str) -> None:
    case = masked_resnet.step_case(
        Setting(CPU, dtype), network(), "training step", 50, torch.randn(4, 3, 64, 64, generator=generator())
    )
    record = measure(case, Setting(CPU, dtype), SHORT, lambda share: None)
    found = by_name(record)
    assert list(found) == ["plain, unmasked", "multiplied", "dense twin", "fastmkd"]
    assert all(v["check"]["ok"] and v["ratio"]["median"] > 0 and v["rounds"] == 2 for v in found.values())
    masked = case.variants[-1]
    first, second = masked.read(masked.run()), masked.read(masked.run())
    assert len(first) == 1 + masked_resnet.CHECKED
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in first[1:])


def test_plan_building_makes_every_table_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(2, 3, 64, 64, generator=generator())
    case = masked_resnet.step_case(Setting(CPU), network(), "plan building", 50, images)
    made: list[Any] = []
    build = masked_resnet.MaskPlan

    def watched(visible: torch.Tensor) -> Any:
        made.append(build(visible))
        return made[-1]

    monkeypatch.setattr(masked_resnet, "MaskPlan", watched)
    step, plan = case.variants
    assert case.baseline == step.name == "fastmkd"
    assert plan.run() is None
    used = pack(images, made[0])
    made[0]._tables.clear()
    masked_resnet.convert_cnn(network().train())(used).sum().backward()
    tables = set(made[0]._tables)
    plan.run()
    assert set(made[1]._tables) == tables
    assert set(made[1]._inside) == set(made[0]._inside) != set()


def test_memory_of_the_masked_step_is_less() -> None:
    images = torch.randn(4, 3, 64, 64, generator=generator())
    case = masked_resnet.step_case(Setting(CPU), network(), "peak memory", 75, images)
    record = measure(case, Setting(CPU), SHORT, lambda share: None)
    found = by_name(record)
    assert case.baseline == "plain, unmasked"
    assert found["fastmkd"]["bytes"] < found["plain, unmasked"]["bytes"] <= found["dense twin"]["bytes"]
    assert found["fastmkd"]["ratio"]["median"] == found["plain, unmasked"]["bytes"] / found["fastmkd"]["bytes"]
    assert "seconds" not in found["fastmkd"]
    assert describe_variant(found["fastmkd"])[0].endswith(" MiB")


def test_peak_counts_what_lives_at_one_time() -> None:
    size = 4 * 1000
    kept = [torch.zeros(1000)]
    assert peak_bytes(lambda: [torch.ones(1000).sum() for _ in range(5)], CPU) < 2 * size
    assert peak_bytes(lambda: [torch.ones(1000) for _ in range(5)], CPU) == 5 * size
    assert peak_bytes(kept.clear, CPU) == 0


def test_targets_name_panels_and_variants_of_the_cases() -> None:
    mine = [t for t in TARGETS if t.benchmark.startswith("masked_") and t.benchmark != "masked_teacher"]
    assert len({t.sentence for t in mine}) == len(mine)
    panels = {
        "ResNet-50 training step, batch 16",
        "ResNet-50 plan building, batch 16",
        "ResNet-50 peak memory, batch 16",
    }
    for direction in DIRECTIONS:
        panels.add(f"ResNet-50's sixteen 3x3 layers, {direction}, batch 16")
        panels |= {f"{n} depthwise, {direction}, batch 16" for n in ("ConvNeXt-T 7x7", "MobileNetV2 3x3")}
        panels |= {f"3x3 layers of stride {stride}, {direction}, batch 16" for stride in (4, 8, 16, 32)}
    for target in mine:
        named = target.panel.replace("batch 256", "batch 16") if target.gpu else target.panel
        assert sum(panel.startswith(named) for panel in panels) == 1, target.sentence


def test_a_target_may_be_against_another_variant_than_the_baseline() -> None:
    target = next(t for t in TARGETS if t.against == "plain, unmasked" and t.label.startswith("75"))
    ratios = {"dense twin": 1.0, "plain, unmasked": 1.25, "fastmkd": 5.0}
    record = {
        "benchmark": "masked_resnet",
        "clock": "cpu",
        "dtype": "fp32",
        "label": "75 % hidden",
        "panel": "ResNet-50 training step, batch 16",
        "baseline": "dense twin",
        "variants": [
            {"name": name, "ratio": {"median": ratio}, "seconds": {"median": 12 / ratio}, "rounds": 5}
            for name, ratio in ratios.items()
        ],
    }
    assert target.ratio(record) == pytest.approx(4.0)
    assert target.ratio({**record, "clock": "step"}) is None  # a GPU's
    record["variants"] = record["variants"][::2]
    assert target.ratio(record) is None


def test_a_floor_may_differ_from_tensor_to_tensor() -> None:
    x = torch.ones(3)
    answer = Answer(lambda: (x.double(), x.double()), floor=(0.0, 0.1))
    plain = Variant("torch", lambda: (x, x), answer, plain=True)
    right, wrong = (Variant(n, lambda o=o: o, answer) for n, o in (("r", (x, 1.05 * x)), ("w", (1.05 * x, x))))
    oracle = Oracle([plain, right, wrong])
    assert oracle.judge(right).ok
    assert not oracle.judge(wrong).ok


def test_few_rounds_are_enough_where_a_case_says_so() -> None:
    case = Case("l", "p", [Variant("a", lambda: None, Answer())], "a", min_rounds=3)
    record = measure(case, Setting(CPU), Plan(0.0, 9, 20, 0.0), lambda share: None)
    assert by_name(record)["a"]["rounds"] == 3


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_a_target_may_be_a_share_of_the_bound() -> None:
    alone, against = (
        next(t for t in TARGETS if t.of_bound and t.benchmark == "masked_conv3x3" and bool(t.against) == other)
        for other in (False, True)
    )
    shares = {"plain, unmasked": 0.25, "fastmkd": 0.5, "no bound": None}
    record = {
        "benchmark": "masked_conv3x3",
        "clock": "device",
        "dtype": "bf16",
        "label": "75 % hidden",
        "baseline": "plain, unmasked",
        "variants": [
            {
                "name": name,
                "bound": None if share is None else {"share": share},
                "seconds": {"median": 2.0, "low": 1.0, "high": 4.0},
                "rounds": 3,
            }
            for name, share in shares.items()
        ],
    }
    assert alone.ratio({**record, "panel": alone.panel}) == 0.5
    assert against.ratio({**record, "panel": against.panel}) == 2.0
    assert alone.measured({**record, "panel": alone.panel}) == (0.5, (0.25, 1.0), 3)
    assert against.measured({**record, "panel": against.panel}) == (2.0, None, 3)
    for variant, times in zip(record["variants"], ([2.0, 4.0, 6.0], [2.0, 2.0, 2.0]), strict=False):
        variant["times"] = times
    assert against.measured({**record, "panel": against.panel}) == (4.0, (3.0, 5.0), 3)
    record["variants"][1]["check"] = {"ok": False}
    assert alone.ratio({**record, "panel": alone.panel}) is None
