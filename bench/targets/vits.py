"""What was asked of masked ViTs and MaskedKD."""

from __future__ import annotations

from .target import Target, on_gpu, share

__all__ = ["MASKEDKD", "SALIENCY"]


def _teacher(model: str, dtype: str, words: str, least: float, percent: int = 50) -> Target:
    sentence = f"masked {model} teacher, {percent} % kept, {words}: at least {least}x the full model"
    return Target(sentence, "masked_teacher", dtype, model, f"{percent} % kept", "fastmkd", least)


def _step(least: float, way: str = "fastmkd", against: str = "") -> Target:
    words = against or "full distillation"
    sentence = f"MaskedKD step, DeiT-S from DeiT-B, 50 % kept, {way}: at least {least}x {words}"
    place = ("maskedkd_step", "fp32", "DeiT-S from DeiT-B, batch 8", "50 % kept")
    return Target(sentence, *place, way, least, against=against)


MASKEDKD = (
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
    on_gpu(
        "gather and embedding of 50 % of DeiT-B's patches",
        "patch_embed",
        "DeiT-B, batch 256",
        "50 % kept",
        "auto",
        1 / 1.3,
    ),
)

SALIENCY = Target(
    "saliency: under 1 % of the student's forward",
    benchmark="cls_saliency",
    dtype="fp32",
    panel="DeiT-Ti",
    label="share of the student",
    variant="auto",
    least=100.0,
    show=share,
)
