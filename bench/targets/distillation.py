"""What was asked of the steps of DPK, DMAE and MKD."""

from __future__ import annotations

from .target import Target, inverse, on_gpu

__all__ = ["DMAE", "DPK", "MKD"]


def _dpk(words: str, least: float, side: int, way: str = "fastmkd", against: str = "") -> Target:
    place = ("dpk_step", "fp32", "ResNet-18 from ResNet-34", f"{side} pixels")
    return Target(f"DPK step, ResNet-18 from ResNet-34, {side} pixels, {words}", *place, way, least, against=against)


def _mkd(
    benchmark: str, kind: str, least: dict[str, float], words: str = "the multiplied way", against: str = "multiplied"
) -> list[Target]:
    return [
        Target(
            f"MKD, RetinaNet R50 from R101, {kind}, {label}{where}: at least {ratio}x {words}",
            benchmark, dtype, kind, label, "fastmkd", ratio, against=against, gpu=dtype == "bf16",
        )
        for label, ratio in least.items()
        for dtype, where in (("fp32", ""), ("bf16", ", bf16 on a GPU"))
    ]  # fmt: skip


def _dmae(words: str, least: float, variant: str = "fastmkd", against: str = "") -> list[Target]:
    """One for each batch that a CPU measures."""
    show = inverse if least < 1 else "{:.2f}x".format
    return [
        Target(
            f"DMAE step, {panel}, 75 % hidden, {words}",
            "dmae_step", "fp32", panel, "75 % hidden", variant, least, show, against,
        )
        for panel in _DMAE_PANELS
    ]  # fmt: skip


def _dmae_masking(dtype: str, panel: str, words: str = "", gpu: bool = False) -> Target:
    """In one run, so that the machine's mood is the same for both."""
    return Target(
        f"DMAE step, {panel}, 95 % hidden{words}: at least 1.6x the images a second of 75 %",
        benchmark="dmae_step",
        dtype=dtype,
        panel=panel,
        label="75 % hidden",
        variant="fastmkd, 95 % hidden",
        least=1.6,
        against="fastmkd",
        gpu=gpu,
    )


_MAE = "fastmkd, MAE without a teacher"
_DMAE_PANELS = ("ViT-B from ViT-L, batch 4", "ViT-B from ViT-L, batch 16")

DPK = (
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
)

DMAE = (
    *_dmae("at least 1.25x the public code's way", 1.25),
    *_dmae("teacher in bf16: at least 1.45x it", 1.45, "fastmkd, teacher in bf16"),
    *_dmae("at most 1.45 times plain MAE", 1 / 1.45, against=_MAE),
    *_dmae("teacher in bf16: at most 1.25 times plain MAE", 1 / 1.25, "fastmkd, teacher in bf16", _MAE),
    *(_dmae_masking("fp32", panel) for panel in _DMAE_PANELS),
    Target(
        "DMAE's teacher alone, ViT-L up to layer 18, 75 % hidden: at least 1.75x the public code's way",
        benchmark="dmae_teacher",
        dtype="fp32",
        panel="ViT-L, layer 18, batch",
        label="75 % hidden",
        variant="fastmkd",
        least=1.75,
    ),
    on_gpu(
        "DMAE step, ViT-B from ViT-L, batch 256, 75 % hidden",
        "dmae_step",
        "ViT-B from ViT-L, batch 256",
        "75 % hidden",
        "fastmkd, compiled",
        1.15,
        "public code, compiled",
    ),
    on_gpu(
        "DMAE's teacher alone, ViT-L up to layer 18, 75 % hidden",
        "dmae_teacher",
        "ViT-L, layer 18, batch 256",
        "75 % hidden",
        "fastmkd, compiled",
        1.7,
        "public code, compiled",
    ),
    _dmae_masking("bf16", "ViT-B from ViT-L, batch 256", ", bf16 on a GPU", gpu=True),
)

MKD = (
    *_mkd("mkd_step", "masked backbone", {"10 % hidden": 1.12, "30 % hidden": 1.4}),
    *_mkd("mkd_decoder", "five levels", {"decoders and losses": 1.5}, "the eager way", "eager"),
    *_mkd("mkd_step", "training step", {"10 % hidden": 1.08, "30 % hidden": 1.15}),
)
