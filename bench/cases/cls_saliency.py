"""CLS saliency, against the whole attention matrix (the public code's way), and as a share of the student's forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmkd.ops import get_op

from ..models import autocast, images_for, vit, vit_flops
from ..op_entries import compiled, op_params, op_variants
from ..registry import Answer, Case, Setting, Variant, benchmark

HEADS, DIM, PREFIX = 3, 64, 1  # DeiT-Ti, the student


def whole_matrix(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Softmax of the full (P + N, P + N) attention, then the CLS row over patches, mean over heads: (B, N) float32."""
    attention = (q @ k.mT * scale).softmax(-1)  # (B, H, P + N, P + N)
    return attention[:, :, 0, PREFIX:].mean(1).float()


def _qkv(batch: int, setting: Setting) -> tuple[Tensor, Tensor]:
    qkv = torch.randn(batch, PREFIX + 196, 3, HEADS, DIM, device=setting.device).to(setting.torch_dtype)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # views of one buffer (B, H, P + N, d), as in timm's attention
    return q, k


def _grid(setting: Setting) -> list[dict[str, Any]]:
    return [{"kind": kind} for kind in ("Eq. 2", "code's variant", "share of the student")]


@benchmark("cls_saliency", summary="CLS row only; also as a share of DeiT-Ti's forward (asked: under 1 %)", grid=_grid)
def cls_saliency(setting: Setting, kind: str) -> Case:
    """DeiT-Ti's last attention: 3 heads of width 64, 197 tokens."""
    batch = 256 if setting.on_gpu else 8
    op, (q, k) = get_op("cls_saliency"), _qkv(batch, setting)
    include_prefix, scale = kind == "code's variant", DIM**-0.5
    args = (q[:, :, 0], k, PREFIX, scale, include_prefix)
    variants = op_variants(op, args, setting)
    case = Case(
        label=kind,
        panel=f"DeiT-Ti, batch {batch}",
        variants=variants,
        baseline="eager",
        items=batch,
        device_time=True,
        params={"batch": batch, "heads": HEADS, "tokens": PREFIX + 196, "dim": DIM},
    )
    if kind == "code's variant":
        # The matrix is what the network needs anyway without flash attention; its softmax rounds to the inputs' dtype.
        half = {"fp32": 0.0, "bf16": 2**-7, "fp16": 2**-10}[setting.dtype]
        exact = variants[0].answer
        rounded = Answer(lambda: whole_matrix(q.double(), k.double(), scale).float(), exact.flops, exact.bytes, half)
        variants.append(Variant("whole matrix", lambda: whole_matrix(q, k, scale), rounded, plain=True))
        if not setting.quick:
            variants.append(compiled("whole matrix, compiled", whole_matrix, (q, k, scale), rounded))
    if kind == "share of the student":
        student, images = vit("DeiT-Ti", setting), images_for(batch, setting)
        forward = Answer(flops=vit_flops(student, batch, 196))
        variants[:] = [v for v in variants if v.name in ("eager", "auto")]
        variants.append(Variant("student's forward", autocast(setting, student, images), forward))
        case.panel, case.baseline = f"DeiT-Ti's forward, batch {batch}", "student's forward"
        case.device_time = False
    else:
        case.params |= op_params(op, args)
    return case
