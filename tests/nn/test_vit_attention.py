"""The compiled attention inside MaskedViT: where it runs, and that it computes what the model does."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import fastmkd
from fastmkd import MaskedViT
from fastmkd.nn.inplace import compiled_attention
from fastmkd.ops import get_op
from fastmkd.ops.accuracy import judge
from fastmkd.reference import masked_vit_forward

KEEP = torch.tensor([[0, 3, 7, 12, 15], [9, 8, 2, 1, 0]])
compiled = pytest.mark.skipif(get_op("packed_attention").backends["cpp"].reason() is not None, reason="not built")


def tiny(**options) -> VisionTransformer:
    torch.manual_seed(0)
    defaults = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 2, "num_classes": 5}
    model = VisionTransformer(**{**defaults, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def images(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Tokens of each call of the compiled attention."""
    seen: list[int] = []
    backend = get_op("packed_attention").backends["cpp"]
    run = backend.run

    def spy(qkv, starts, scale):
        seen.append(len(qkv))
        return run(qkv, starts, scale)

    monkeypatch.setitem(backend.__dict__, "run", spy)
    return seen


@compiled
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qk_norm": True, "init_values": 0.5},
        {"scale_attn_norm": True},
        {"reg_tokens": 2, "qkv_bias": False},
        {"global_pool": "avg"},
        {"num_heads": 6},
    ],
    ids=str,
)
@torch.no_grad()
def test_it_is_the_model_s_attention(options, calls):
    model = tiny(**options)
    vit, exact = MaskedViT(model), copy.deepcopy(model).double()
    for keep, tokens in ((None, 16), (KEEP, 5)):
        out = vit(images(), keep)
        assert calls == [2 * (model.num_prefix_tokens + tokens)] * 2  # the last block is not a whole one
        calls.clear()
        verdict = judge(
            out,
            masked_vit_forward(exact, images(torch.float64), keep),
            masked_vit_forward(model, images(), keep),
        )
        assert verdict.ok, verdict


@compiled
@torch.no_grad()
def test_attention_without_the_fused_path_keeps_its_own_scale(calls):
    model = tiny()
    for block in model.blocks:
        block.attn.fused_attn, block.attn.scale = False, 0.5
    out = MaskedViT(model)(images())
    assert len(calls) == 2
    torch.testing.assert_close(out, model(images()))


@torch.no_grad()
def test_eager_means_pytorch_s_attention(calls):
    vit = MaskedViT(tiny())
    with fastmkd.backend("eager"):
        assert compiled_attention(vit.model, torch.zeros(2, 6, 48)) is None
        vit(images(), KEEP)
    assert calls == []


def test_it_stays_out_of_gradients_float64_and_hooked_models(calls):
    vit = MaskedViT(tiny())
    vit(images(), KEEP).sum().backward()
    assert vit.model.patch_embed.proj.weight.grad.abs().sum() > 0
    with torch.no_grad():
        vit.double()(images(torch.float64), KEEP)
        vit.float().model.blocks[0].attn.register_forward_hook(lambda *_: None)
        vit(images(), KEEP)
    assert calls == []
