"""MaskedViT in other people's code: state dicts, copies, compile, autocast, dtypes, training mode."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fastmkd import MaskedViT
from fastmkd.nn.inplace import may_run_in_place
from fastmkd.reference import masked_vit_forward, masked_vit_intermediates

KEEP = torch.tensor([[0, 3, 7, 12, 15], [9, 8, 2, 1, 0]])


def tiny(**options) -> VisionTransformer:
    torch.manual_seed(0)
    defaults = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(**{**defaults, **options}).eval()


def images(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_model_is_untouched():
    model = tiny()
    before = dict(model.__dict__)
    vit = MaskedViT(model)
    vit(images(), KEEP, return_saliency=True)
    assert vit.model is model
    assert model.__dict__ == before
    assert {id(p) for p in vit.parameters()} == {id(p) for p in model.parameters()}
    assert (vit.num_prefix_tokens, vit.embed_dim, vit.num_classes, vit.patch_grid()) == (1, 24, 5, (4, 4))


def test_state_dict_is_the_model_s():
    model = tiny(reg_tokens=1)
    vit = MaskedViT(model)
    assert list(vit.state_dict()) == list(model.state_dict())
    other = MaskedViT(tiny(reg_tokens=1, init_values=None))
    with torch.no_grad():
        other.model.head.weight.add_(1)
    vit.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(model.head.weight, other.model.head.weight)
    tiny(reg_tokens=1).load_state_dict(vit.state_dict(), strict=True)
    vit.load_state_dict(tiny(reg_tokens=1).state_dict(), strict=True, assign=True)


def test_state_dict_inside_other_modules():
    model = tiny()
    outer = nn.ModuleDict({"a": nn.Sequential(MaskedViT(model)), "b": nn.Linear(2, 2)})
    bare = nn.ModuleDict({"a": nn.Sequential(tiny()), "b": nn.Linear(2, 2)})
    assert list(outer.state_dict()) == list(bare.state_dict())
    outer.load_state_dict(bare.state_dict(), strict=True)
    bare.load_state_dict(outer.state_dict(), strict=True)
    assert list(outer.state_dict(prefix="x.")) == ["x." + key for key in bare.state_dict()]


def test_state_dict_mismatch_names_the_model_s_keys():
    vit = MaskedViT(tiny())
    state = vit.state_dict()
    state["surprise"] = state.pop("head.bias")
    missing, unexpected = vit.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["head.bias"], ["surprise"])
    wrapped = nn.Sequential(vit)
    missing, unexpected = wrapped.load_state_dict({"0." + key: value for key, value in state.items()}, strict=False)
    assert (missing, unexpected) == (["0.head.bias"], ["0.surprise"])
    with pytest.raises(RuntimeError, match=r'"head\.bias"'):
        vit.load_state_dict(state)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_separate(how):
    vit = MaskedViT(tiny())
    if how == "deepcopy":
        twin = copy.deepcopy(vit)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(vit))
    else:
        buffer = io.BytesIO()
        torch.save(vit, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert torch.equal(twin(images(), KEEP), vit(images(), KEEP))
    assert list(twin.state_dict()) == list(vit.state_dict())
    with torch.no_grad():
        twin.model.head.bias.add_(1)
    assert torch.equal(vit.model.head.bias + 1, twin.model.head.bias)
    twin.load_state_dict(vit.state_dict())
    assert torch.equal(vit.model.head.bias, twin.model.head.bias)


def test_compiles_without_a_break():
    vit = MaskedViT(tiny(reg_tokens=1))
    compiled = torch.compile(vit, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), vit(images()))
    torch.testing.assert_close(compiled(images(), keep=KEEP), vit(images(), keep=KEEP))
    both = compiled(images(), KEEP, return_saliency=True)
    torch.testing.assert_close(both, vit(images(), KEEP, return_saliency=True))
    vit.train()
    gradients = []
    for run in (vit, compiled):
        vit.zero_grad()
        run(images(), KEEP).square().sum().backward()
        gradients.append([p.grad.clone() for p in vit.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])
    with pytest.raises(ValueError, match="keep holds"):
        compiled(images(), keep=KEEP + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = tiny(qk_norm=True)
    vit, x = MaskedViT(model), images()
    exact = masked_vit_forward(copy.deepcopy(model).double(), x.double(), KEEP)
    with torch.autocast("cpu", dtype):
        logits, saliency = vit(x, KEEP, return_saliency=True)
        plain = masked_vit_forward(model, x, KEEP)
    assert logits.dtype == plain.dtype
    assert saliency.dtype == torch.float32
    assert (logits - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-3
    logits.float().sum().backward()
    assert model.patch_embed.proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_module_dtype(dtype):
    exact = masked_vit_forward(tiny().double(), images(torch.float64), KEEP)
    vit = MaskedViT(tiny()).to(dtype)
    logits, saliency = vit(images(dtype), KEEP, return_saliency=True)
    assert logits.dtype == dtype
    assert saliency.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (logits - exact).abs().max() < 0.05


def test_inference_mode_and_channels_last():
    vit = MaskedViT(tiny())
    expected = vit(images(), KEEP)
    with torch.inference_mode():
        torch.testing.assert_close(vit(images(), KEEP), expected.detach())
        torch.testing.assert_close(vit(images().to(memory_format=torch.channels_last), KEEP), expected.detach())


@pytest.mark.parametrize("part", ["norm_pre", "blocks.1.norm1", "blocks.0", "norm"])
def test_tensors_that_hooks_keep_are_not_overwritten(part):
    model = tiny(depth=3)
    vit, kept, copies = MaskedViT(model), [], []

    def keep_input(_module, args):
        kept.append(args[0])
        copies.append(args[0].clone())

    model.get_submodule(part).register_forward_pre_hook(keep_input)
    with torch.no_grad():
        vit(images(), KEEP)
    assert torch.equal(kept[0], copies[0])


def test_dropout_alone_in_training_mode_is_obeyed():
    """Monte Carlo dropout switches on the dropouts of a model in eval mode."""
    model = tiny(proj_drop_rate=0.5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    with torch.no_grad():
        assert not torch.equal(MaskedViT(model)(images(), KEEP), MaskedViT(model)(images(), KEEP))


@torch.no_grad()
def test_running_in_place_changes_nothing_else():
    model = tiny(init_values=0.5)
    before, x = copy.deepcopy(model.state_dict()), images()
    vit = MaskedViT(model)
    first = vit(x, KEEP)
    assert may_run_in_place(model, vit._embed(x, KEEP)[0])
    assert torch.equal(vit(x, KEEP), first)
    assert torch.equal(x, images())
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    outputs = vit.forward_intermediates(x, [0, 1], keep=KEEP)
    torch.testing.assert_close(outputs, masked_vit_intermediates(model, x, KEEP))


def test_pixel_gradients_reach_kept_patches_only():
    x = images().requires_grad_()
    MaskedViT(tiny())(x, KEEP).sum().backward()
    touched = x.grad.abs().sum(1).view(2, 4, 8, 4, 8).sum((2, 4)).flatten(1) > 0
    assert torch.equal(touched, torch.zeros(2, 16, dtype=torch.bool).scatter(1, KEEP, True))


def test_drop_path_is_drawn_as_in_the_model():
    model = tiny(drop_path_rate=0.5, depth=4).train()
    torch.manual_seed(7)
    mine = MaskedViT(model)(images())
    torch.manual_seed(7)
    torch.testing.assert_close(mine, model(images()))


def test_dropout_reaches_the_last_block():
    model = tiny(proj_drop_rate=1.0).train()  # p = 1: every block adds exactly nothing
    torch.testing.assert_close(
        MaskedViT(model)(images(), KEEP),
        model.head(model.norm(model.cls_token + model.pos_embed[:, :1])[:, 0]).expand(2, -1),
    )
    model = tiny(attn_drop_rate=0.9).train()
    vit = MaskedViT(model)
    assert not torch.equal(vit(images(), KEEP), vit(images(), KEEP))


def test_positional_dropout_and_patch_dropout():
    model = tiny(pos_drop_rate=1.0).train()
    out = MaskedViT(model)(images(), KEEP)
    assert torch.equal(out[0], out[1])
    model = tiny(patch_drop_rate=0.5).train()
    vit = MaskedViT(model)
    assert vit.forward_intermediates(images(), [0], keep=KEEP)[0].shape == (2, 1 + 2, 24)
    with pytest.raises(ValueError, match="patch_drop_rate"):
        vit(images(), return_saliency=True)
    assert vit.eval()(images(), return_saliency=True)[1].shape == (2, 16)


def test_gradient_checkpointing():
    model = tiny()
    vit = MaskedViT(model)
    vit(images(), KEEP).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    vit(images(), KEEP).sum().backward()
    assert len(calls) == 2  # once forward, once again in backward
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


def test_hooks_on_whole_blocks_fire():
    model = tiny(depth=3)
    calls = []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, args, _o: calls.append(args[0].shape[1]))
    assert_logits = MaskedViT(model)(images(), KEEP)
    assert calls == [6, 6, 6]  # the hook on the last block makes it run whole
    torch.testing.assert_close(assert_logits, masked_vit_forward(model, images(), KEEP))


def test_train_and_eval_reach_the_model():
    vit = MaskedViT(tiny())
    assert not vit.training
    assert vit.train().model.training
    assert not vit.eval().model.training


class OwnHead(VisionTransformer):
    def forward_head(self, x, pre_logits=False):
        return self.head(x[:, 0] + x[:, -1])


def test_an_unknown_head_gets_all_rows():
    torch.manual_seed(0)
    model = OwnHead(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5).eval()
    torch.testing.assert_close(MaskedViT(model)(images(), KEEP), masked_vit_forward(model, images(), KEEP))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_host_sync_on_a_gpu(dtype):
    vit = MaskedViT(tiny(reg_tokens=2)).cuda().train()
    x, keep = images().cuda(), KEEP.cuda()

    def step():
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            logits, saliency = vit(x, keep, return_saliency=True)
        (logits.float().sum() + saliency.sum()).backward()
        return logits

    expected = masked_vit_forward(copy.deepcopy(vit.model).cpu().double(), images(torch.float64), KEEP)
    step()  # the first use of each op may measure and write caches
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (logits.cpu() - expected).abs().max() < (1e-3 if dtype == torch.float32 else 0.1)


@pytest.mark.gpu
def test_masked_gpu_forward_can_be_captured_in_a_graph():
    vit = MaskedViT(tiny()).cuda()
    x, keep = images().cuda(), KEEP.cuda()
    with torch.inference_mode():
        expected = vit(x, keep)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            vit(x, keep)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = vit(x, keep)
        graph.replay()
    torch.testing.assert_close(out, expected)
