"""What was asked of masked convolutions."""

from __future__ import annotations

from .target import Target, on_gpu, share

__all__ = ["CONVOLUTIONS"]

_LAYERS, _STEP, _PLAIN = "ResNet-50's sixteen 3x3 layers", "ResNet-50 training step", "plain, unmasked"
_DEPTHWISE = {percent: 0.8 * 100 / (100 - percent) for percent in (10, 50, 75)}  # of the bound by the visible share


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


def _convolutions_on_gpu() -> list[Target]:
    layers = [
        on_gpu(
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
        on_gpu(
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
    step = on_gpu(
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


CONVOLUTIONS = (
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
        show=share,
    ),
    Target(
        "plan building, 75 % hidden: under 3 % of the ResNet-50 training step",
        benchmark="masked_resnet",
        dtype="fp32",
        panel="ResNet-50 plan building",
        label="75 % hidden",
        variant="plan building",
        least=1 / 0.03,
        show=share,
    ),
    *_convolutions_on_gpu(),
)
