"""The audio spectrogram transformer (AST, Gong et al. 2021): a ViT with overlapping patches on a one-channel picture.

timm has no AST. This one is timm's VisionTransformer but for three things: the patch convolution's stride is smaller
than the patch, a second token stands beside the CLS token (timm's `reg_token`; a distillation token in AST), and the
head reads the mean of these two.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

__all__ = ["OverlappingPatchEmbed", "SpectrogramTransformer"]

Pair = tuple[int, int]

# Parts of Hugging Face's names and what they are called here; older versions of transformers use the first group.
_OLD_TO_NEW = (
    ("encoder.layer.", "layers."),
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)
_NEW_TO_TIMM = (
    ("audio_spectrogram_transformer.", ""),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.distillation_token", "reg_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("layers.", "blocks."),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("attention.o_proj", "attn.proj"),
    ("classifier.layernorm", "fc_norm"),
    ("classifier.dense", "head"),
    ("layernorm.", "norm."),
)


class OverlappingPatchEmbed(PatchEmbed):
    """timm's patch embedding with a stride of its own.

    Args:
        patch_size: side of a patch, or ``(height, width)``.
        stride: step from patch to patch, or ``(down, right)``.
        options: of timm's PatchEmbed.

    Example:
        >>> OverlappingPatchEmbed(patch_size=16, stride=10, img_size=(128, 1024)).grid_size
        (12, 101)
    """

    def __init__(self, patch_size: int | Pair, stride: int | Pair, **options: Any) -> None:
        self.stride = _pair(stride)
        super().__init__(patch_size=_pair(patch_size), **options)  # type: ignore[arg-type]  # timm takes pairs too
        self.proj.stride = self.stride

    def dynamic_feat_size(self, img_size: Pair) -> Pair:
        """Grid of patches for images of a size.

        Args:
            img_size: ``(H, W)`` pixels.
        """
        (height, width), (ph, pw), (down, right) = img_size, self.patch_size, self.stride
        return (height - ph) // down + 1, (width - pw) // right + 1

    def _init_img_size(self, img_size: int | Pair) -> tuple[Pair, Pair, int]:
        size = _pair(img_size)
        grid = self.dynamic_feat_size(size)
        return size, grid, grid[0] * grid[1]


class SpectrogramTransformer(VisionTransformer):
    """AST: classifies a log-mel spectrogram of ``(B, 1, mel bins, frames)``.

    Args:
        img_size: ``(mel bins, frames)``.
        patch_size: side of a patch, or ``(height, width)``.
        stride: step from patch to patch, or ``(down, right)``.
        in_chans: channels of the picture.
        num_classes: classes; 0 for no classifier.
        norm_eps: of every LayerNorm.
        options: further arguments of timm's VisionTransformer, such as `embed_dim`, `depth` and `num_heads`.

    Example:
        >>> ast = SpectrogramTransformer((32, 64), embed_dim=24, depth=1, num_heads=2, num_classes=5)
        >>> ast.patch_embed.grid_size, ast(torch.randn(2, 1, 32, 64)).shape
        ((2, 5), torch.Size([2, 5]))
    """

    def __init__(
        self,
        img_size: Pair = (128, 1024),
        patch_size: int | Pair = 16,
        stride: int | Pair = 10,
        in_chans: int = 1,
        num_classes: int = 527,
        norm_eps: float = 1e-6,
        **options: Any,
    ) -> None:
        norm_layer = partial(nn.LayerNorm, eps=norm_eps)
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            norm_layer=norm_layer,
            reg_tokens=1,
            embed_layer=partial(OverlappingPatchEmbed, stride=stride),
            **options,
        )
        self.fc_norm = norm_layer(self.embed_dim)

    @classmethod
    def from_transformers(cls, model: Any) -> SpectrogramTransformer:
        """Makes the same network, with the same weights, as Hugging Face's ``ASTForAudioClassification``.

        That one takes spectrograms as ``(B, frames, mel bins)``; this one as ``(B, 1, mel bins, frames)``, so pass
        ``input_values.mT.unsqueeze(1)``.

        Args:
            model: an ``ASTForAudioClassification``.

        Raises:
            TypeError: `model` has no AST classifier.
        """
        config: Any = getattr(model, "config", None)
        if getattr(config, "model_type", None) != "audio-spectrogram-transformer" or not hasattr(model, "classifier"):
            raise TypeError(f"model is a {type(model).__name__}; expected transformers' ASTForAudioClassification.")
        ast = cls(
            (config.num_mel_bins, config.max_length),
            patch_size=config.patch_size,
            stride=(config.frequency_stride, config.time_stride),
            num_classes=config.num_labels,
            norm_eps=config.layer_norm_eps,
            embed_dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            mlp_ratio=config.intermediate_size / config.hidden_size,
            qkv_bias=config.qkv_bias,
            act_layer=config.hidden_act,
        )
        ast.load_state_dict(_timm_state(model.state_dict()))
        return ast.train(model.training)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Returns logits ``(B, classes)``, or what the classifier would read, ``(B, D)``.

        Args:
            x: ``(B, L, D)`` tokens, of which the first two are read.
            pre_logits: leave the classifier out.
        """
        x = self.head_drop(self.fc_norm(x[:, :2].mean(1)))
        return x if pre_logits else self.head(x)


def _timm_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's weights under timm's names; queries, keys and values become one matrix."""
    renamed = {}
    for key, value in state.items():
        for old, new in _OLD_TO_NEW + _NEW_TO_TIMM:
            key = key.replace(old, new)
        renamed[key] = value
    for key in [key for key in renamed if ".attention.q_proj." in key]:
        parts = [renamed.pop(key.replace("q_proj", name)) for name in ("q_proj", "k_proj", "v_proj")]
        renamed[key.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    return renamed


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
