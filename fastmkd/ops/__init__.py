"""The ops: one file each, declared through `fastmkd.ops.registry`; importing this package registers them."""

from .cls_saliency import cls_saliency
from .patch_embed import patch_embed
from .registry import OPS, get_op
from .select_tokens import select_tokens

__all__ = ["OPS", "cls_saliency", "get_op", "patch_embed", "select_tokens"]
