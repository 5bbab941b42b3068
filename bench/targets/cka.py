"""What was asked of CKA and of the import."""

from __future__ import annotations

from .target import Target, inverse, on_gpu

__all__ = ["CKA", "CKA_ON_GPU", "IMPORT"]


def _cka(sentence: str, label: str, least: float, against: str = "") -> Target:
    return Target(sentence, "cka", "fp32", "batch 64", label, "cka_matrix", least, against=against)


CKA = (
    _cka("CKA, 16 x 16 layers: at least 30x pairwise, three terms", "16 x 16 layers", 30.0, "pairwise, three terms"),
    _cka("CKA, 16 x 16 layers: at least 2.5x one Gram a layer in PyTorch", "16 x 16 layers", 2.5),
    _cka("CKA, 16 x 16 layers: at least 2.5x pytorch-cka", "16 x 16 layers", 2.5, "pytorch-cka"),
    _cka("CKA, one pair: under half of PyTorch's time", "one pair", 2.0),
)

IMPORT = Target(
    "import of fastmkd: under 1.5 times torch + timm",
    benchmark="import_time",
    dtype="fp32",
    panel="import",
    label="fresh process",
    variant="from fastmkd import MaskedViT, MaskedKD",
    least=1 / 1.5,
    show=inverse,
)

CKA_ON_GPU = tuple(
    on_gpu(
        f"CKA of all pairs of ResNet-50's layers, batch {batch}",
        "cka",
        f"batch {batch}",
        "ResNet-50 with itself",
        "cka_matrix",
        least,
        against,
    )
    for batch, least, against in ((256, 0.5, ""), (32, 10.0, "one Gram a layer, PyTorch"))
)
