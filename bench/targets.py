"""What was asked of the speed, so that a page can say what was reached.

Every target is a ratio that must be at least so much: to another variant of a case, or to the physical bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["TARGETS", "Target"]


@dataclass(frozen=True)
class Target:
    """One number that was asked for.

    Args:
        sentence: what was asked, in words.
        benchmark: where it is measured.
        dtype: of the setting.
        panel: of the case; a prefix, so that the batch may differ.
        label: of the case.
        variant: whose ratio counts.
        least: the ratio must be at least this.
        show: the ratio as a reader wants it.
        against: the variant that the ratio is to; empty for the case's baseline.
        gpu: measured on a GPU; otherwise on a CPU.
        of_bound: what counts is the variant's share of its physical bound; with `against`, over that variant's share.
    """

    sentence: str
    benchmark: str
    dtype: str
    panel: str
    label: str
    variant: str
    least: float
    show: Callable[[float], str] = "{:.2f}x".format
    against: str = ""
    gpu: bool = False
    of_bound: bool = False

    def ratio(self, record: dict[str, Any]) -> float | None:
        """The ratio that counts if `record` is the right one, else None."""
        place = (record["benchmark"], record["dtype"], record["label"])
        if place != (self.benchmark, self.dtype, self.label) or not record["panel"].startswith(self.panel):
            return None
        if (record["clock"] != "cpu") != self.gpu:
            return None
        if self.of_bound:
            found = {v["name"]: v["bound"]["share"] for v in record["variants"] if v.get("bound")}
            if not self.against:
                return found.get(self.variant)
        else:
            found = {v["name"]: v["ratio"]["median"] for v in record["variants"] if "ratio" in v}
        against = self.against or record["baseline"]
        return found[self.variant] / found[against] if {self.variant, against} <= found.keys() else None


def _inverse(ratio: float) -> str:
    return f"{1 / ratio:.2f}x"


def _share(ratio: float) -> str:
    return f"{100 / ratio:.2f} %"


def _teacher(model: str, dtype: str, words: str, least: float, percent: int = 50) -> Target:
    sentence = f"masked {model} teacher, {percent} % kept, {words}: at least {least}x the full model"
    return Target(sentence, "masked_teacher", dtype, model, f"{percent} % kept", "fastmkd", least)


def _step(least: float, way: str = "fastmkd", against: str = "") -> Target:
    words = against or "full distillation"
    sentence = f"MaskedKD step, DeiT-S from DeiT-B, 50 % kept, {way}: at least {least}x {words}"
    place = ("maskedkd_step", "fp32", "DeiT-S from DeiT-B, batch 8", "50 % kept")
    return Target(sentence, *place, way, least, against=against)


def _dpk(words: str, least: float, side: int, way: str = "fastmkd", against: str = "") -> Target:
    place = ("dpk_step", "fp32", "ResNet-18 from ResNet-34", f"{side} pixels")
    return Target(f"DPK step, ResNet-18 from ResNet-34, {side} pixels, {words}", *place, way, least, against=against)


def _mkd(benchmark: str, kind: str, least: dict[str, float]) -> list[Target]:
    return [
        Target(
            f"MKD, RetinaNet R50 from R101, {kind}, {label}{where}: at least {ratio}x the eager way",
            benchmark, dtype, kind, label, "fastmkd", ratio, gpu=dtype == "bf16",
        )
        for label, ratio in least.items()
        for dtype, where in (("fp32", ""), ("bf16", ", bf16 on a GPU"))
    ]  # fmt: skip


def _masked(benchmark: str, panel: str, what: str, least: dict[int, float], against: str = "") -> list[Target]:
    return [
        Target(
            f"{what}, {percent} % hidden: at least {ratio:.3g}x the {against or 'dense twin'}",
            benchmark,
            dtype="fp32",
            panel=panel,
            label=f"{percent} % hidden",
            variant="fastmkd",
            least=ratio,
            against=against,
        )
        for percent, ratio in least.items()
    ]


def _on_gpu(
    what: str, benchmark: str, panel: str, label: str, variant: str, least: float, against: str = "", **more: Any
) -> Target:
    of_bound = more.setdefault("of_bound", not against)
    asked = f"{least:.3g}x {against}" if against else f"{least:.0%} of the bound".replace("%", " %")
    sentence = f"{what}, bf16 on a GPU: at least {asked}" + (
        ", as shares of their bounds" if against and of_bound else ""
    )
    return Target(sentence, benchmark, "bf16", panel, label, variant, least, against=against, gpu=True, **more)


def _convolutions_on_gpu() -> list[Target]:
    layers = [
        _on_gpu(
            f"3x3 {direction}, {percent} % hidden",
            "masked_conv3x3",
            f"{_LAYERS}, {direction}, batch 256",
            f"{percent} % hidden",
            "fastmkd",
            least,
            _PLAIN,
        )
        for direction in ("forward", "forward + backward")
        for percent, least in {10: 1.0, 50: 1.7, 75: 3.0}.items()
    ]
    strides = [
        _on_gpu(
            f"3x3 forward at stride {stride}, 75 % hidden",
            "masked_conv3x3",
            f"3x3 layers of stride {stride}, forward, batch 256",
            "75 % hidden",
            "fastmkd",
            least,
            against,
            of_bound=True,
        )
        for stride, least, against in ((4, 1.0, _PLAIN), (8, 0.6, ""), (16, 0.6, ""), (32, 0.6, ""))
    ]
    step = _on_gpu(
        f"{_STEP}, 75 % hidden", "masked_resnet", f"{_STEP}, batch 256", "75 % hidden", "fastmkd", 2.5, _PLAIN
    )
    return [*layers, *strides, step]


def _faster_bf16(direction: str) -> Target:
    return Target(
        f"3x3 layers in bf16, {direction}, 75 % hidden: at least 1.5x the same in fp32",
        benchmark="masked_conv3x3",
        dtype="bf16",
        panel=f"ResNet-50's sixteen 3x3 layers, {direction}, batch",
        label="75 % hidden",
        variant="fastmkd",
        least=1.5,
        against="fastmkd in fp32",
    )


def _cka(sentence: str, label: str, least: float, against: str = "") -> Target:
    return Target(sentence, "cka", "fp32", "batch 64", label, "cka_matrix", least, against=against)


def _dmae(words: str, least: float, variant: str = "fastmkd", against: str = "") -> Target:
    """Of whatever batches were measured."""
    sentence = f"DMAE step, ViT-B from ViT-L, 75 % hidden, {words}"
    place = ("dmae_step", "fp32", "ViT-B from ViT-L, batch", "75 % hidden")
    show = _inverse if least < 1 else "{:.2f}x".format
    return Target(sentence, *place, variant, least, show, against)


def _dmae_masking(dtype: str, words: str = "", gpu: bool = False) -> Target:
    """In one run, so that the machine's mood is the same for both."""
    return Target(
        f"DMAE step, ViT-B from ViT-L, 95 % hidden{words}: at least 1.6x the images a second of 75 %",
        benchmark="dmae_step",
        dtype=dtype,
        panel="ViT-B from ViT-L, batch",
        label="75 % hidden",
        variant="fastmkd, 95 % hidden",
        least=1.6,
        against="fastmkd",
        gpu=gpu,
    )


_MAE = "fastmkd, MAE without a teacher"
_LAYERS, _STEP, _PLAIN = "ResNet-50's sixteen 3x3 layers", "ResNet-50 training step", "plain, unmasked"
_DEPTHWISE = {percent: 0.8 * 100 / (100 - percent) for percent in (10, 50, 75)}  # of the bound by the visible share

TARGETS = (
    _teacher("DeiT-S", "fp32", "fp32", 2.45),
    _teacher("DeiT-B", "fp32", "fp32", 1.45, percent=75),
    _teacher("DeiT-B", "fp32", "fp32", 2.2),
    _teacher("DeiT-B", "fp32", "fp32", 4.2, percent=25),
    _teacher("DeiT-S", "bf16", "bf16 autocast", 2.0),
    _teacher("DeiT-B", "bf16", "bf16 autocast", 2.0),
    Target(
        "masked DeiT-B teacher, 50 % kept, bf16 on a GPU: at least 2.05x the compiled full model",
        benchmark="masked_teacher",
        dtype="bf16",
        panel="DeiT-B, batch 256",
        label="50 % kept",
        variant="fastmkd, compiled",
        least=2.05,
        against="full model, compiled",
        gpu=True,
    ),
    _step(1.45),
    _step(1.12, against="public code"),
    _step(1.65, "fastmkd, teacher in bf16"),
    Target(
        "MaskedKD step, DeiT-S from DeiT-B, 50 % kept, bf16 on a GPU: at least 92 % of the speed of its parts apart",
        benchmark="maskedkd_step",
        dtype="bf16",
        panel="DeiT-S from DeiT-B, batch 256",
        label="50 % kept",
        variant="fastmkd, compiled teacher",
        least=0.92,
        against="apart, compiled teacher",
        gpu=True,
    ),
    _on_gpu(
        "gather and embedding of 50 % of DeiT-B's patches",
        "patch_embed",
        "DeiT-B, batch 256",
        "50 % kept",
        "auto",
        1 / 1.3,
    ),
    *(
        target
        for side in (64, 224)
        for target in (
            _dpk("at least 1.05x a good eager implementation", 1.05, side),
            _dpk("teacher in bf16: at least 1.15x it", 1.15, side, "fastmkd, teacher in bf16"),
            _dpk("dynamic share: under 2 % of the step", 0.98, side, against="fastmkd, fixed share"),
        )
    ),
    Target(
        "stitching, 32 images of 49 tokens, 512 wide: at least 2x plain PyTorch",
        benchmark="op.stitch_tokens",
        dtype="fp32",
        panel="stitch_tokens",
        label="last_stage",
        variant="auto",
        least=2.0,
    ),
    _dmae("at least 1.25x the public code's way", 1.25),
    _dmae("teacher in bf16: at least 1.45x it", 1.45, "fastmkd, teacher in bf16"),
    _dmae("at most 1.45 times plain MAE", 1 / 1.45, against=_MAE),
    _dmae("teacher in bf16: at most 1.25 times plain MAE", 1 / 1.25, "fastmkd, teacher in bf16", _MAE),
    _dmae_masking("fp32"),
    Target(
        "DMAE's teacher alone, ViT-L up to layer 18, 75 % hidden: at least 1.75x the public code's way",
        benchmark="dmae_teacher",
        dtype="fp32",
        panel="ViT-L, layer 18, batch",
        label="75 % hidden",
        variant="fastmkd",
        least=1.75,
    ),
    _on_gpu(
        "DMAE step, ViT-B from ViT-L, 75 % hidden",
        "dmae_step",
        "ViT-B from ViT-L, batch 256",
        "75 % hidden",
        "fastmkd, compiled",
        1.15,
        "public code, compiled",
    ),
    _on_gpu(
        "DMAE's teacher alone, ViT-L up to layer 18, 75 % hidden",
        "dmae_teacher",
        "ViT-L, layer 18, batch 256",
        "75 % hidden",
        "fastmkd, compiled",
        1.7,
        "public code, compiled",
    ),
    _dmae_masking("bf16", ", bf16 on a GPU", gpu=True),
    *_mkd("mkd_step", "masked backbone", {"10 % hidden": 1.12, "30 % hidden": 1.4}),
    *_mkd("mkd_decoder", "five levels", {"decoders and losses": 1.5}),
    *_mkd("mkd_step", "training step", {"10 % hidden": 1.08, "30 % hidden": 1.15}),
    Target(
        "saliency: under 1 % of the student's forward",
        benchmark="cls_saliency",
        dtype="fp32",
        panel="DeiT-Ti",
        label="share of the student",
        variant="auto",
        least=100.0,
        show=_share,
    ),
    _cka("CKA, 16 x 16 layers: at least 30x pairwise, three terms", "16 x 16 layers", 30.0, "pairwise, three terms"),
    _cka("CKA, 16 x 16 layers: at least 2.5x one Gram a layer in PyTorch", "16 x 16 layers", 2.5),
    _cka("CKA, 16 x 16 layers: at least 2.5x pytorch-cka", "16 x 16 layers", 2.5, "pytorch-cka"),
    _cka("CKA, one pair: under half of PyTorch's time", "one pair", 2.0),
    Target(
        "import of fastmkd: under 1.5 times torch + timm",
        benchmark="import_time",
        dtype="fp32",
        panel="import",
        label="fresh process",
        variant="from fastmkd import MaskedViT, MaskedKD",
        least=1 / 1.5,
        show=_inverse,
    ),
    *_masked("masked_conv3x3", f"{_LAYERS}, forward, batch", "3x3 forward", {10: 1.15, 50: 2.3, 75: 5.0}),
    *_masked(
        "masked_conv3x3",
        f"{_LAYERS}, forward + backward, batch",
        "3x3 forward and backward",
        {10: 1.1, 50: 2.1, 75: 4.5},
    ),
    *_masked("masked_resnet", _STEP, _STEP, {10: 1.15, 50: 2.1, 75: 4.0}),
    *_masked("masked_resnet", _STEP, _STEP, {10: 1.0, 50: 1.8, 75: 3.4}, against=_PLAIN),
    *(
        target
        for network in ("ConvNeXt-T 7x7", "MobileNetV2 3x3")
        for direction in ("forward", "forward + backward")
        for target in _masked(
            "masked_depthwise",
            f"{network} depthwise, {direction}, batch",
            f"{network} depthwise, {direction}",
            _DEPTHWISE,
        )
    ),
    *(
        Target(
            f"{words}, 3x3 forward, 75 % hidden: faster than it",
            *("masked_conv3x3", "fp32", f"{_LAYERS}, forward, batch", "75 % hidden", f"fastmkd{threads}", 1.0),
            against=f"{peer}{threads}",
        )
        for words, peer, threads in (
            ("block gather in plain PyTorch", "block gather", ""),
            ("spconv on one thread", "spconv", ", 1 thread"),
        )
    ),
    *(_faster_bf16(direction) for direction in ("forward", "forward + backward")),
    Target(
        "peak memory of a ResNet-50 training step, 75 % hidden: at most 35 % of the unmasked network's",
        benchmark="masked_resnet",
        dtype="fp32",
        panel="ResNet-50 peak memory",
        label="75 % hidden",
        variant="fastmkd",
        least=1 / 0.35,
        show=_share,
    ),
    Target(
        "plan building, 75 % hidden: under 3 % of the ResNet-50 training step",
        benchmark="masked_resnet",
        dtype="fp32",
        panel="ResNet-50 plan building",
        label="75 % hidden",
        variant="plan building",
        least=1 / 0.03,
        show=_share,
    ),
    *_convolutions_on_gpu(),
    *(
        _on_gpu(
            f"CKA of all pairs of ResNet-50's layers, batch {batch}",
            "cka",
            f"batch {batch}",
            "ResNet-50 with itself",
            "cka_matrix",
            least,
            against,
        )
        for batch, least, against in ((256, 0.5, ""), (32, 10.0, "one Gram a layer, PyTorch"))
    ),
)
