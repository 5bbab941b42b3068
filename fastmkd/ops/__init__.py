"""The ops: one file each, declared through `fastmkd.ops.registry`; importing this package registers them."""

from .align_cells import align_cells
from .align_cells_grad import align_cells_grad
from .centred_gram import centred_gram
from .cls_saliency import cls_saliency
from .masked_conv2d import masked_conv2d
from .masked_conv2d_weight import masked_conv2d_weight
from .masked_patch_loss import masked_patch_loss
from .masked_patch_loss_grad import masked_patch_loss_grad
from .packed_attention import packed_attention
from .patch_embed import patch_embed
from .recovered_loss import recovered_loss, relation_error
from .recovered_loss_grad import recovered_loss_grad
from .registry import OPS, get_op
from .select_tokens import select_tokens
from .stitch_tokens import stitch_tokens
from .tap_table import tap_table
from .unshuffle_tokens import unshuffle_tokens

__all__ = [
    "OPS",
    "align_cells",
    "align_cells_grad",
    "centred_gram",
    "cls_saliency",
    "get_op",
    "masked_conv2d",
    "masked_conv2d_weight",
    "masked_patch_loss",
    "masked_patch_loss_grad",
    "packed_attention",
    "patch_embed",
    "recovered_loss",
    "recovered_loss_grad",
    "relation_error",
    "select_tokens",
    "stitch_tokens",
    "tap_table",
    "unshuffle_tokens",
]
