"""A ViT's attention: one length for all images, as in the masked teacher, and a length of its own for each image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmkd.ops import get_op

from ..op_entries import op_params, op_variants
from ..registry import Answer, Case, Setting, Variant, benchmark

DIM = 64
HEADS = {"DeiT-Ti": 3, "DeiT-S": 6, "DeiT-B": 12}
TOKENS = (25, 50, 99, 148, 197, 400)  # CLS token and 12 %, 25 %, 50 %, 75 %, 100 % of 196 patches; a finer grid
RAGGED = "25 to 197 tokens"


def sdpa(qkv: Tensor, mask: Tensor | None = None) -> Tensor:
    """PyTorch's attention on views of ``qkv (B, L, 3, H, d)``, as timm calls it: ``(B, L, H, d)``."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).contiguous()


def _grid(setting: Setting) -> list[dict[str, Any]]:
    models = ["DeiT-S"] if setting.quick else list(HEADS)
    labels = ["99 tokens"] if setting.quick else [*(f"{count} tokens" for count in TOKENS), RAGGED]
    return [{"model": model, "label": label} for model in models for label in labels]


@benchmark(
    "packed_attention",
    summary="attention on the qkv projection's own output, against PyTorch's on transposed views",
    grid=_grid,
    dtypes=("fp32", "bf16", "fp16"),
)
def packed_attention(setting: Setting, model: str, label: str) -> Case:
    """Ragged lengths are compared with padding to the longest and a mask."""
    batch, heads = (256 if setting.on_gpu else 8), HEADS[model]
    longest = 197 if label == RAGGED else int(label.split()[0])
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(25, 198, (batch,), generator=generator) if label == RAGGED else torch.tensor([longest])
    lengths = lengths.expand(batch)
    padded = torch.randn(batch, longest, 3, heads, DIM, generator=generator).to(setting.device, setting.torch_dtype)
    real = (torch.arange(longest) < lengths[:, None]).to(setting.device)  # (B, L)
    starts = F.pad(lengths.cumsum(0), (1, 0)).to(setting.device, torch.int32)
    args = (padded[real], starts, DIM**-0.5)

    op, mask = get_op("packed_attention"), real[:, None, None] if label == RAGGED else None
    variants = op_variants(op, args, setting)
    exact: Answer = variants[0].answer
    variants.append(Variant("SDPA", lambda: sdpa(padded, mask), exact, read=lambda out: out[real]))
    # The loop over images reads its bounds from the data, which a compiler cannot do.
    variants = [v for v in variants if v.name != "torch.compile"]
    return Case(
        label=label,
        panel=f"{model}, batch {batch}",
        variants=variants,
        baseline="SDPA",
        items=batch,
        device_time=True,
        params={"batch": batch, "heads": heads, "dim": DIM, "longest": longest, **op_params(op, args)},
    )
