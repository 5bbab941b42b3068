r"""Multiply-adds of a ViT per image, from the shapes of its layers.

With n tokens (prefix and patches) of width d, a block costs

.. math:: n \, (W_{qkv} + W_{proj} + W_{fc1} + W_{fc2}) + 2 n^2 d

where W is the number of weights of a layer: :math:`12 n d^2 + 2 n^2 d` for the usual block (MaskedKD, Appendix H).
Norms, biases, activations and additions are left out, as the paper does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from ..nn.merge_cost import merged_macs, merges_like_mask
from ..nn.ragged_vit import why_not_ragged
from .build import teacher_recipe
from .data import load_data
from .errors import UserError
from .models import build_model, model_kwargs
from .schema import ModelRecipe, Recipe

__all__ = ["VitMacs", "main", "vit_macs"]


class VitMacs(NamedTuple):
    """Multiply-adds for one image.

    Attributes:
        embed: patch projection.
        blocks: transformer blocks; what Table 9 of MaskedKD counts.
        head: classifier.
    """

    embed: int
    blocks: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.embed + self.blocks + self.head


def vit_macs(model: nn.Module, keep: int | None = None, exact_savings: bool = True) -> VitMacs:
    """Counts the multiply-adds of a timm VisionTransformer on one image.

    Args:
        model: the network (or a MaskedViT of one).
        keep: patches that it gets to see; None is all.
        exact_savings: count what `fastmkd.MaskedViT` does: only kept patches are embedded, and if the head reads
            prefix tokens alone, the last block makes queries, projection and MLP for those rows only. False counts the
            public code's way: embed all patches, gather, run whole blocks.

    Raises:
        ValueError: `keep` is below 1 or above the number of patches.
        TypeError: `model` is not a VisionTransformer of timm with plain blocks.

    Example:
        >>> import timm
        >>> deit = timm.create_model("deit_small_patch16_224", depth=12)
        >>> f"{vit_macs(deit, exact_savings=False).blocks / 1e9:.1f}"
        '4.5'
    """
    vit: Any = getattr(model, "model", model)
    if not hasattr(vit, "blocks") or not hasattr(vit, "patch_embed") or not hasattr(vit, "num_prefix_tokens"):
        raise TypeError(f"model is a {type(vit).__name__}; expected a VisionTransformer of timm.")
    patches, prefix = int(vit.patch_embed.num_patches), int(vit.num_prefix_tokens)
    if keep is not None and not 1 <= keep <= patches:
        raise ValueError(f"keep is {keep}; the model has {patches} patches, expected 1 to {patches}.")
    kept = patches if keep is None else keep
    tokens = prefix + kept
    whole = not exact_savings or vit.global_pool != "token"  # average pooling reads every row of the last block
    blocks = [_block_macs(block, tokens, tokens) for block in vit.blocks]
    if not whole:
        blocks[-1] = _block_macs(vit.blocks[-1], tokens, prefix)
    embedded = kept if exact_savings else patches
    heads = [head for name in ("head", "head_dist") if isinstance(head := getattr(vit, name, None), nn.Linear)]
    return VitMacs(
        embed=embedded * vit.patch_embed.proj.weight.numel(),
        blocks=sum(blocks),
        head=sum(head.weight.numel() for head in heads),
    )


def _block_macs(block: Any, tokens: int, rows: int) -> int:
    """Keys and values for all tokens; queries, projection and MLP for `rows` of them."""
    try:
        qkv, proj, mlp = block.attn.qkv.weight, block.attn.proj.weight, block.mlp
        weights = [layer.weight.numel() for layer in mlp.modules() if isinstance(layer, nn.Linear)]
    except AttributeError:
        raise TypeError(f"the block {type(block).__name__} is not one of a plain VisionTransformer.") from None
    width = qkv.shape[0] // 3  # of queries, keys and values: all heads together
    attention = 2 * rows * tokens * width
    return tokens * 2 * qkv.numel() // 3 + rows * (qkv.numel() // 3 + proj.numel() + sum(weights)) + attention


def recipe_models(recipe: Recipe) -> dict[str, nn.Module]:
    """Makes student and teacher of a recipe without any weights.

    Args:
        recipe: names them.
    """
    source = load_data(recipe.data)
    parts, sources = {"student": recipe.student}, {"student": source, "teacher": source}
    of_teacher = teacher_recipe(recipe)
    if of_teacher is not None:
        parts["teacher"], sources["teacher"] = of_teacher.student, load_data(of_teacher.data)
    elif recipe.teacher is not None and recipe.teacher.name is not None:
        parts["teacher"] = ModelRecipe(recipe.teacher.name, recipe.teacher.kwargs)
    models = {}
    for role, part in parts.items():
        bare = ModelRecipe(part.name, part.kwargs)
        models[role] = build_model(bare, model_kwargs(bare, sources[role]), role)
    return models


def _merging(model: Any, share: float, head: int) -> str:
    """How many patches leave in a block of a `fastmkd.nn.MergedViT` that is as cheap, and its multiply-adds."""
    patches = int(model.patch_embed.num_patches)
    try:
        merges = merges_like_mask(model, patches, share) if why_not_ragged(model) is None else None
    except ValueError:  # not even merging all it can is that cheap
        merges = None
    if merges is None:
        return "-"
    return f"{merges[0]}: {(merged_macs(model, merges, patches) + head) / 1e6:.1f}"


def main(argv: Sequence[str]) -> int:
    """``fastmkd cost RECIPE.yaml [options]`` or ``fastmkd cost TIMM_NAME ...``: multiply-adds by patches kept.

    The share is that of the ordinary network, whole blocks on all patches. Beside it stands what merging tokens costs
    when it is made as cheap (MaskedKD, Fig. 3), after r, the patches that leave in the first block.

    Args:
        argv: after the command's name.
    """
    from rich.console import Console
    from rich.table import Table

    from .recipe import load_recipe

    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write("usage: fastmkd cost RECIPE.yaml [--key=value ...]\n       fastmkd cost TIMM_MODEL ...\n")
        return 0 if argv else 2
    if argv[0].endswith((".yaml", ".yml")):
        models = recipe_models(load_recipe(argv[0], argv[1:]))
    else:
        models = {name: build_model(ModelRecipe(name), {}, "model") for name in argv}
    table = Table(title="Multiply-adds per image, in millions")
    for column in ("network", "patches kept", "embed all, then gather", "fastmkd", "share of full", "merging r"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for role, model in models.items():
        try:
            full = vit_macs(model, exact_savings=False)
        except TypeError as error:
            raise UserError(f"cost counts ViTs only: {error}") from None
        patches = int(model.patch_embed.num_patches)  # type: ignore[union-attr, arg-type]
        for share in (1.0, 0.75, 0.5, 0.25):
            keep = max(1, round(share * patches))
            ours, theirs = vit_macs(model, keep), vit_macs(model, keep, exact_savings=False)
            table.add_row(
                role,
                f"{keep} of {patches}",
                f"{theirs.total / 1e6:.1f}",
                f"{ours.total / 1e6:.1f}",
                f"{ours.total / full.total:.1%}",
                _merging(model, share, ours.head),
            )
        table.add_section()
    Console().print(table)
    return 0
