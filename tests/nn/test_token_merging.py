"""Token merging against loops over single tokens in float64, and against what cannot be otherwise."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastmkd import MaskedViT
from fastmkd.nn import MergedViT
from fastmkd.nn.merge_cost import merged_macs, merges_like_mask
from fastmkd.nn.token_merging import merge_tokens


def merge_by_hand(x: Tensor, sizes: list[float], keys: Tensor, r: int, prefix: int) -> tuple[Tensor, list[float]]:
    """One image: tokens ``(P + n, D)``, their sizes and keys."""
    stay, leave, keys = range(prefix, len(x), 2), range(prefix + 1, len(x), 2), keys.detach()
    pairs = []
    for i in leave:
        cosines = [float(keys[i] @ keys[j] / keys[i].norm() / keys[j].norm()) for j in stay]
        pairs.append((max(cosines), i, stay[cosines.index(max(cosines))]))
    pairs = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:r]
    gone = [i for _, i, _ in pairs]
    groups = [[i] for i in range(prefix)]
    groups += [[i] for i in leave if i not in gone]
    groups += [[j, *(i for _, i, into in pairs if into == j)] for j in stay]
    totals = [sum(sizes[i] for i in group) for group in groups]
    merged = [sum(x[i] * sizes[i] for i in group) / total for group, total in zip(groups, totals, strict=True)]
    return torch.stack(merged), totals


def merged_by_hand(model, images: Tensor, merges: tuple[int, ...]) -> Tensor:
    """The whole network, image by image; merges in the last block too."""
    prefix, logits = model.num_prefix_tokens, []
    for image in images:
        x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]
        sizes = [1.0] * len(x)
        for block, r in zip(model.blocks, merges, strict=True):
            attn = block.attn
            q, k, v = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1)).permute(1, 2, 0, 3)
            q, k = attn.q_norm(q), attn.k_norm(k)  # (H, L, d)
            scores = q @ k.mT * attn.scale + torch.tensor(sizes, dtype=x.dtype).log()
            x = x + block.ls1(attn.proj((scores.softmax(-1) @ v).transpose(0, 1).flatten(1)))
            x, sizes = merge_by_hand(x, sizes, k.mean(0), r, prefix)
            x = x + block.ls2(block.mlp(block.norm2(x)))
        x = model.norm(x)
        if model.global_pool == "avg":
            count = torch.tensor(sizes[prefix:], dtype=x.dtype)[:, None]
            x = torch.cat((x[:prefix], (x[prefix:] * count).sum(0, keepdim=True) / count.sum()))
        logits.append(model.forward_head(x[None])[0])
    return torch.stack(logits)


def tiny(kind=VisionTransformer, **options):
    torch.manual_seed(0)
    sizes = {"img_size": 20, "patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 3, "num_classes": 5}
    model = kind(**{**sizes, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double().eval()


def pictures(batch: int = 3, size: int = 20) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(("n", "r"), [(9, 1), (9, 4), (8, 3), (8, 99), (2, 1)])
@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_one_merge_by_hand(n, r, kind):
    g = torch.Generator().manual_seed(n + r)
    x, sizes = torch.randn(4, 2 + n, 6, generator=g).double(), torch.randint(1, 5, (4, 2 + n, 1), generator=g).double()
    keys = torch.randn(4, 2 + n, 3, generator=g).double()
    if kind == "ties":  # along the axes, so that cosines are 0, 1 and -1 without rounding
        keys = torch.eye(3).double()[torch.randint(0, 3, (4, 2 + n), generator=g)] * 2
    merged, counts = merge_tokens(x, sizes, keys, r, prefix=2)
    for i in range(4):
        tokens, totals = merge_by_hand(x[i], sizes[i, :, 0].tolist(), keys[i], r, prefix=2)
        torch.testing.assert_close(merged[i], tokens)
        assert counts[i, :, 0].tolist() == totals


def test_sizes_add_up_and_prefix_tokens_stay():
    x, sizes = torch.randn(2, 12, 4), torch.ones(2, 12, 1)
    y = x
    for r in (3, 2, 1):
        y, sizes = merge_tokens(y, sizes, y, r, prefix=2)
        assert torch.equal(y[:, :2], x[:, :2])
        assert sizes.sum(1).flatten().tolist() == [12, 12]
        torch.testing.assert_close((y * sizes)[:, 2:].sum(1), x[:, 2:].sum(1))
    assert y.shape == (2, 6, 4)


MODELS = {
    "cls": {},
    "distilled": {"kind": VisionTransformerDistilled},
    "registers, no position on cls": {"reg_tokens": 2, "no_embed_class": True},
    "average": {"global_pool": "avg"},
    "average without cls": {"global_pool": "avg", "class_token": False, "fc_norm": False},
    "CLIP, layer scale, query norm": {"pre_norm": True, "qk_norm": True, "init_values": 0.3},
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_network_and_gradients_by_hand(options):
    model, images = tiny(**options), pictures()
    vit = MergedViT(model, (6, 5, 3))
    expected = merged_by_hand(model, images, (6, 5, 3))
    mine = vit(images)
    torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(mine, model(images), atol=1e-3)
    gradients = [torch.autograd.grad(logits.square().sum(), list(model.parameters())) for logits in (mine, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(vit(images), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_without_merges_it_is_the_plain_network(options):
    model, images = tiny(**options), pictures()
    assert torch.equal(MergedViT(model, 0)(images), MaskedViT(model)(images))
    if model.global_pool == "token":  # the head reads no patch of the last block, so nothing merges there
        torch.testing.assert_close(MergedViT(model, (0, 0, 9))(images), model(images), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_merging_equal_patches_changes_nothing(pool):
    """Two patches that are one and the same count twice in every sum, so one that counts twice does as well."""
    model = tiny(img_size=16, global_pool=pool, pos_embed="none")
    half = pictures(size=16)[:, :, :, :8].unflatten(3, (2, 4))  # columns of patches
    images = half.repeat_interleave(2, dim=3).flatten(3)
    vit = MergedViT(model, (8, 0, 0))
    torch.testing.assert_close(vit(images), model(images), rtol=1e-10, atol=1e-10)


def test_as_cheap_as_a_mask():
    model = tiny(depth=6)
    none = (0,) * 6
    for ratio in (0.9, 0.7, 0.5):
        merges = merges_like_mask(model, 25, ratio)
        budget = merged_macs(model, none, round(25 * ratio))
        assert merged_macs(model, merges, 25) <= budget
        most = max(i for i, r in enumerate(merges) if r == max(merges))
        fewer = tuple(r - (i == most) for i, r in enumerate(merges))
        assert merged_macs(model, fewer, 25) > budget
        assert merges[-1] == 0
        assert max(merges[:-1]) - min(merges[:-1]) <= 1
    assert merges_like_mask(model, 25, 1.0) == none
    with pytest.raises(ValueError, match=r"keep_ratio is 0.05, but .* network of 6 blocks costs \d+% of its full cost"):
        merges_like_mask(model, 25, 0.05)
    with pytest.raises(ValueError, match="keep_ratio is nan"):
        merges_like_mask(model, 25, float("nan"))


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("merges", [(0, 0, 0), (3, 0, 2), (99, 99, 99)])
def test_the_count_is_what_runs(options, merges):
    model = tiny(**options).float()
    # With gradients, so that no kernel of fastmkd's own runs; plain attention: not every PyTorch counts fused one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        MergedViT(model, merges)(pictures(1).float())
    heads = sum(p.numel() for name, p in model.named_parameters() if name.startswith("head") and "weight" in name)
    assert merged_macs(model, merges, 25) == int(counter.get_total_flops()) // 2 - heads


def test_a_schedule_for_each_size():
    model = tiny(depth=5, dynamic_img_size=True)
    vit = MergedViT(model, keep_ratio=0.6)
    for size in (20, 32):
        n = (size // 4) ** 2
        assert vit.merges(n) == merges_like_mask(model, n, 0.6)
        expected = merged_by_hand(model, pictures(2, size), vit.merges(n))
        torch.testing.assert_close(vit(pictures(2, size)), expected, rtol=1e-10, atol=1e-10)


def test_copies_weights_and_autocast():
    model, images = tiny().float(), pictures().float()
    vit = pickle.loads(pickle.dumps(copy.deepcopy(MergedViT(model, 4))))
    assert torch.equal(vit(images), MergedViT(model, 4)(images))
    assert list(vit.state_dict()) == list(model.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        low = vit(images)
    torch.testing.assert_close(low.float(), vit(images), rtol=0.1, atol=0.1)
    assert vit.bfloat16()(images.bfloat16()).dtype == torch.bfloat16


def test_it_compiles_in_one_graph():
    vit = MergedViT(tiny(depth=2), 4)
    with torch.no_grad():
        assert torch.equal(torch.compile(vit, backend="eager", fullgraph=True)(pictures()), vit(pictures()))


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_same_and_repeatable():
    vit, images = MergedViT(tiny(), 5), pictures()
    expected = vit(images)
    vit, images = vit.cuda(), images.cuda()
    torch.testing.assert_close(vit(images).cpu(), expected, rtol=1e-8, atol=1e-8)
    for dtype in (torch.float32, torch.bfloat16):
        vit, images = vit.to(dtype), images.to(dtype)
        assert torch.equal(vit(images), vit(images))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda m: MergedViT(m), ValueError, "r is None and keep_ratio None"),
        (lambda m: MergedViT(m, 1, keep_ratio=0.5), ValueError, "expected one of them"),
        (lambda m: MergedViT(m, -1), ValueError, "r is -1"),
        (lambda m: MergedViT(m, (1, 2)), ValueError, "each of 3 blocks"),
        (lambda m: MergedViT(m, keep_ratio=0.0), ValueError, "keep_ratio is 0.0"),
        (lambda m: MergedViT(m, 1)(pictures(), torch.tensor([[0]] * 3)), ValueError, "name single patches"),
        (lambda m: MergedViT(m, 1)(pictures(), return_saliency=True), ValueError, r"MaskedViT\(vit.model\)"),
        (lambda m: MergedViT(m, 1).forward_intermediates(pictures()), ValueError, "no row for each patch"),
        (lambda m: MergedViT(m, 1)(pictures(size=24)), ValueError, "24 x 24 pixels"),
        (lambda m: MergedViT(MaskedViT(m), 1), TypeError, "already a MaskedViT"),
        (lambda m: MergedViT(tiny(global_pool="map", class_token=False), 1), TypeError, "reads all patches"),
    ],
)
def test_mistakes_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call(tiny())


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "cait_xxs24_224"])
def test_other_families_are_refused(name):
    model = timm.create_model(name, depth=1)
    with pytest.raises(TypeError, match=r"cannot merge tokens: .* VisionTransformer does not"):
        MergedViT(model, 1)


def test_a_hook_that_would_be_passed_by_is_refused():
    model = tiny()
    vit = MergedViT(model, 4)
    model.blocks[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="can no longer merge tokens: block 1"):
        vit(pictures())
