"""Reads the public files of MAE and DMAE into timm's ViTs: the encoder, strictly; the rest is named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from .errors import UserError, shorten
from .models import read_state_dict

__all__ = ["MaeReport", "lacks_classifier", "load_encoder", "load_mae_checkpoint"]

# What stands beside the encoder: MAE's decoder, and the heads that DMAE's code puts on the student.
_BESIDE = ("decoder_", "aligned_feature_projection_heads.")
# What a timm ViT may have behind the encoder, of which such files have nothing.
_BEHIND = ("head.", "head_dist.", "fc_norm.", "attn_pool.")


class MaeReport(NamedTuple):
    """What was not taken from a file, and what it could not give.

    Attributes:
        left_out: keys of the file that are no part of the encoder.
        untouched: keys of the model that the file lacks: its classifier and what belongs to it.
    """

    left_out: list[str]
    untouched: list[str]


def load_mae_checkpoint(model: nn.Module, path: str | Path) -> MaeReport:
    """Loads the encoder of a public MAE or DMAE file into a timm ViT.

    A model that averages patches has its norm behind the average (``fc_norm``); the encoder's ``norm`` is then left
    out, as in MAE's own fine-tuning.

    Args:
        model: timm VisionTransformer of the same width, depth, patch and image size.
        path: ``.pth`` (weights under ``model`` or bare, read without running any code in it) or ``.safetensors``.

    Returns:
        Which keys were left out, and which of the model's stayed as they were.

    Raises:
        UserError: a key that is neither the encoder's nor known to stand beside it, a key of the encoder that is
            missing or of another shape, or a file that cannot be read.

    Example:
        >>> import tempfile, timm, torch
        >>> make = lambda **kwargs: timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, **kwargs)
        >>> file = Path(tempfile.mkdtemp()) / "mae.pth"
        >>> torch.save({"model": {**make(num_classes=0).state_dict(), "mask_token": torch.zeros(1, 1, 8)}}, file)
        >>> load_mae_checkpoint(make(num_classes=5), file)
        MaeReport(left_out=['mask_token'], untouched=['head.weight', 'head.bias'])
    """
    return load_encoder(model, read_state_dict(path), path)


def load_encoder(
    model: nn.Module, state: Mapping[str, Tensor], path: str | Path, role: str = "model", classifier: bool = False
) -> MaeReport:
    """Does what `load_mae_checkpoint` does with weights that have been read.

    Args:
        model: timm VisionTransformer.
        state: by key.
        path: where they come from, for messages.
        role: what the model is, for messages.
        classifier: refuse a model with a classifier, for which the weights have nothing.

    Raises:
        UserError: as `load_mae_checkpoint`.
    """
    own = model.state_dict()
    has_norm = any(key.startswith("norm.") for key in own)
    beside = (*_BESIDE, *(() if has_norm else ("norm.",)))
    left_out = [key for key in state if key == "mask_token" or key.startswith(beside)]
    encoder = {key: value for key, value in state.items() if key not in left_out}
    untouched = [key for key in own if key not in encoder and key.startswith(_BEHIND)]
    problems = {
        "foreign": [key for key in encoder if key not in own],
        "missing": [key for key in own if key not in encoder and (classifier or key not in untouched)],
        "of another shape": [
            f"{key} {tuple(value.shape)} for {tuple(own[key].shape)}"
            for key, value in encoder.items()
            if key in own and value.shape != own[key].shape
        ],
    }
    said = [f"{len(keys)} {title}: {shorten(keys)}" for title, keys in problems.items() if keys]
    if said:
        raise UserError(
            f"the encoder in {path} does not fit the {role}. Keys {'; '.join(said)}. Make it with the width, depth, "
            "patch and image size of the file, and with num_classes: 0 where only features are read."
        )
    model.load_state_dict({**own, **encoder})
    return MaeReport(left_out, untouched)


def lacks_classifier(state: Mapping[str, Tensor]) -> bool:
    """Tells whether weights are those of a ViT that has not learnt to classify, in the public layout of MAE.

    Args:
        state: by key.

    Example:
        >>> lacks_classifier({"patch_embed.proj.weight": 1, "decoder_pred.weight": 1})
        True
        >>> lacks_classifier({"patch_embed.proj.weight": 1, "head.weight": 1})
        False
    """
    return "patch_embed.proj.weight" in state and not any(key.startswith(_BEHIND) for key in state)
