"""DMAE against the long way: loss and every gradient, over families of ViTs, ratios, layers and options."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from mae_oracle import losses, visible_patches
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from tiny_vits import pictures, tiny
from torch._dynamo.testing import CompileCounterWithBackend

import fastmkd
from fastmkd.methods.teacher_call import TeacherCall
from fastmkd.ops.accuracy import judge

DECODER = {"decoder_depth": 2, "decoder_width": 16, "decoder_heads": 2}
CAIT = {"kind": Cait, "depth_token_only": 1}
EVA = {"kind": Eva, "use_rot_pos_emb": True, "swiglu_mlp": True}
DINOV3 = {**EVA, "rope_type": "dinov3", "use_abs_pos_emb": False, "num_reg_tokens": 2, "global_pool": "token"}
DISTILLED = {"kind": VisionTransformerDistilled}


def make(student=None, teacher=None, **options):
    """A method in float64; `teacher` False is none."""
    other = None if teacher is False else tiny(1, **{"depth": 3, "embed_dim": 32, **(teacher or {})})
    own = tiny(0, **{"depth": 3, **(student or {})})
    torch.manual_seed(2)
    return fastmkd.DMAE(own, other, **{**DECODER, **options}).double().train()


def check(method, images, seed=7, common=None):
    """Terms, loss and gradients of a step are those of the long way."""
    if common is not None:
        method.common_in_test = common
    p = method.patch_size
    grid = (images.shape[2] // p[0], images.shape[3] // p[1])
    keep = visible_patches(seed, len(images), grid, method.mask_ratio)
    expected = losses(method, images, keep)
    torch.manual_seed(seed)
    out = method(images)
    torch.testing.assert_close(out.loss, expected["loss"], rtol=1e-10, atol=1e-12)
    for name, term in out.terms.items():
        torch.testing.assert_close(term, expected[name].detach(), rtol=1e-10, atol=1e-12)
        assert not term.requires_grad
    parameters = {name: p for name, p in method.named_parameters() if p.requires_grad}
    mine = torch.autograd.grad(out.loss, list(parameters.values()), allow_unused=True)
    theirs = torch.autograd.grad(expected["loss"], list(parameters.values()))
    for name, a, b in zip(parameters, mine, theirs, strict=True):
        assert a is not None, name
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda said, name=name: f"{name}: {said}")
    return out


@pytest.mark.parametrize(
    ("student", "teacher", "common"),
    [
        ({}, {}, 1),
        ({}, {"patch_drop_rate": 0.5}, 1),
        (DISTILLED, {}, 1),
        (DISTILLED, DISTILLED, 2),
        ({"reg_tokens": 4}, {}, 1),
        ({"reg_tokens": 2}, {"reg_tokens": 4, "no_embed_class": True}, 3),
        (DISTILLED, {"reg_tokens": 4}, 1),
        ({"class_token": False, "global_pool": "avg", "reg_tokens": 1}, {}, 0),
        ({"global_pool": "avg"}, {"global_pool": "map", "class_token": False}, 0),
        ({"final_norm": False}, {"pre_norm": True}, 1),
        ({"global_pool": "map", "class_token": False}, {"init_values": 0.1}, 0),
        (EVA, {}, 1),
        ({}, DINOV3, 1),
        (CAIT, {}, 0),
        ({}, CAIT, 0),
        ({"dynamic_img_size": True}, {"dynamic_img_size": True}, 1),
    ],
)
def test_families(student, teacher, common):
    check(make(student, teacher), pictures(), common=common)


@pytest.mark.parametrize("ratio", [0.1, 0.75, 0.9, 0.94, 0.98, 0.99])
def test_ratios(ratio):
    size = {"img_size": 80}  # 100 patches
    out = check(make(size, size, mask_ratio=ratio), pictures(80))
    assert out.student_output.shape == (3, round(100 * ratio), 8 * 8 * 3)


@pytest.mark.parametrize(
    "options",
    [
        {"normalize_target": True},
        {"head": "linear", "normalize": True},
        {"head": "mlp3", "loss": "l2"},
        {"loss": "l2", "normalize": True, "alpha": 4.0},
        {"decoder_depth": 1},
        {"student_layer": 3, "teacher_layer": 1},
        {"student_layer": [1, 3], "teacher_layer": [3, 2]},
        {"student_layer": [2, 2, 3], "teacher_layer": [1, 3, 3]},
        {"student_positions": "sincos"},
    ],
)
def test_options(options):
    out = check(make(**options), pictures())
    each = [term for name, term in out.terms.items() if name.startswith("align.")]
    layers = options.get("student_layer")
    assert len(each) == (len(layers) if isinstance(layers, list) else 0)
    if each:
        torch.testing.assert_close(torch.stack(each).sum(), out.terms["align"])


@pytest.mark.parametrize("student", [{}, {"global_pool": "avg"}, {"in_chans": 1, "patch_size": (4, 8)}])
def test_without_a_teacher_it_is_mae(student):
    method = make(student, teacher=False)
    assert sorted(method.heads) == ["decoder"] if "global_pool" not in student else ["decoder", "norm"]
    out = check(method, pictures()[:, : student.get("in_chans", 3)])
    assert list(out.terms) == ["mae"]


def test_rectangular_images_and_other_sizes_than_made_for():
    sizes = {"img_size": (24, 40), "dynamic_img_size": True}
    method = make(sizes, sizes)
    check(method, pictures(40)[:, :, :24])
    method.heads["decoder"].positions = fastmkd.methods.mae_parts.sincos_positions((4, 3), 16, 1).double()
    method.heads["decoder"].grid = (4, 3)
    expected = check(method, pictures()[..., :24]).loss
    torch.manual_seed(7)
    other = make(sizes, sizes)  # made for another grid, and moves to this one by itself
    other.load_state_dict(method.state_dict())
    torch.manual_seed(7)
    torch.testing.assert_close(other(pictures()[..., :24]).loss, expected)


def test_in_float32_it_is_no_further_from_float64_than_the_long_way():
    exact = make()
    narrow = copy.deepcopy(exact).float()
    keep = visible_patches(7, 3, (4, 4), 0.75)
    plain, right = losses(narrow, pictures().float(), keep)["loss"], losses(exact, pictures(), keep)["loss"]
    torch.manual_seed(7)
    mine = narrow(pictures().float()).loss
    assert mine.dtype == torch.float32
    assert judge(mine.detach(), right.detach(), plain.detach()).ok
    parameters = [[p for p in m.parameters() if p.requires_grad] for m in (narrow, narrow, exact)]
    grads = [torch.autograd.grad(loss, ps) for loss, ps in zip((mine, plain, right), parameters, strict=True)]
    worst = [max(float((a.double() - b).abs().max()) for a, b in zip(g, grads[2], strict=True)) for g in grads[:2]]
    assert worst[0] <= 2 * worst[1]


def test_autocast_compares_in_float32():
    method = copy.deepcopy(make()).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = method(pictures().float())
    out.loss.backward()
    assert out.student_output.dtype == torch.bfloat16
    assert {out.loss.dtype, *(term.dtype for term in out.terms.values())} == {torch.float32}
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16):
        low = method(pictures().float()).loss
    torch.manual_seed(7)
    torch.testing.assert_close(low, method(pictures().float()).loss, rtol=0.05, atol=0)


def test_a_teacher_of_its_own_precision():
    method = copy.deepcopy(make()).float()
    method._teacher_call = TeacherCall(method._teacher_call.observe, torch.bfloat16)
    seen = []
    method.teacher.blocks[0].register_forward_hook(lambda _m, _a, out: seen.append(out.dtype))
    assert method(pictures().float()).loss.dtype == torch.float32
    assert seen == [torch.float32]  # the residual stream; products inside are lowered
    assert fastmkd.DMAE(method.release(), tiny(1, depth=3).float(), teacher_dtype=torch.bfloat16, **DECODER)(
        pictures().float()
    ).loss.isfinite()


@pytest.mark.parametrize("layers", [(1, 1), ([1, 2], [1, 2])])
def test_the_teacher_runs_no_block_after_the_last_aligned_one(layers):
    method = make(student_layer=layers[0], teacher_layer=layers[1])
    ran = []
    for i, block in enumerate(method.teacher.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    method.teacher.norm.register_forward_hook(lambda *_: ran.append("norm"))
    method(pictures()).loss.backward()
    assert ran == list(range(len(layers[0]) if isinstance(layers[0], list) else 1))
    assert all(p.grad is None for p in method.teacher.parameters())


def test_hidden_pixels_are_not_read_by_the_encoders():
    method = make(alpha=1.0)
    images = pictures()
    keep = visible_patches(7, 3, (4, 4), 0.75)
    poisoned = images.clone()
    for b in range(3):
        for patch in set(range(16)) - set(keep[b].tolist()):
            y, x = patch // 4 * 8, patch % 4 * 8
            poisoned[b, :, y : y + 8, x : x + 8] = torch.nan
    torch.manual_seed(7)
    expected = method(images)
    torch.manual_seed(7)
    found = method(poisoned)
    assert torch.equal(found.student_output, expected.student_output)
    assert torch.equal(found.terms["align"], expected.terms["align"])
    assert found.terms["mae"].isnan()


@pytest.mark.parametrize("student", [{}, {"global_pool": "avg"}, {"global_pool": "map", "class_token": False}, CAIT])
def test_everything_that_trains_gets_a_gradient_and_release_gives_all_back(student):
    own = tiny(0, depth=3, **student)
    own.patch_embed.requires_grad_(False)
    before = {name: p.requires_grad for name, p in own.named_parameters()}
    modes = [part.training for part in own.modules()]
    method = fastmkd.DMAE(own, tiny(1, depth=3), student_positions="own", **DECODER).double()
    assert [part.training for part in own.modules()] == modes
    method(pictures()).loss.backward()
    for name, p in method.named_parameters():
        assert (p.grad is not None) is p.requires_grad, name
    frozen = {name for name, p in own.named_parameters() if not p.requires_grad}
    assert "head.weight" in frozen
    assert all(name.startswith(("head.", "fc_norm", "attn_pool", "patch_embed", "cls_token", "blocks_token_only"))
               for name in frozen)  # fmt: skip
    assert "blocks.2.mlp.fc2.weight" not in frozen
    assert method.release() is own
    assert {name: p.requires_grad for name, p in own.named_parameters()} == before


def test_fixed_positions_are_written_and_do_not_move():
    method = make(student_positions="sincos")
    positions = method.student.pos_embed
    assert not positions.requires_grad
    assert positions[0, 0].abs().max() == 0
    expected = fastmkd.methods.mae_parts.sincos_positions((4, 4), 24)
    torch.testing.assert_close(positions[0, 1:].float(), expected)
    method.release()
    assert positions.requires_grad


def test_state_and_copies():
    method = make()
    state = method.state_dict()
    assert {key.split(".")[0] for key in state} == {"student", "heads"}
    assert {key.split(".")[1] for key in state if key.startswith("heads")} == {"decoder", "project"}
    assert "heads.decoder.mask_token" in state
    again = make()
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    again.load_state_dict(state)
    expected = []
    for m in (method, again, copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        torch.manual_seed(3)
        expected.append(m(pictures()).loss.item())
    assert len(set(expected)) == 1


def test_masks_come_from_the_generator_and_nothing_else_does():
    draws = []
    for _ in range(2):
        method = make(generator=torch.Generator().manual_seed(5))
        state = torch.get_rng_state()
        draws += [method.draw(pictures())[0] for _ in range(2)]
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])
    many = make().draw(pictures(count=500))[0]  # (500, 4) of 16 patches
    assert (many.diff(dim=1) > 0).all()
    assert torch.bincount(many.flatten(), minlength=16).min() > 60  # 125 expected
    assert make(teacher=False)(pictures(), torch.tensor([1, 2, 3])).loss.isfinite()  # targets are ignored


def test_a_compiled_teacher(monkeypatch):
    torch._dynamo.reset()
    counter, real = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, *, dynamic, mode: real(fn, backend=counter, dynamic=dynamic))
    plain, compiled = make(), make(teacher_compile=True)
    for _ in range(2):
        torch.manual_seed(7)
        expected = plain(pictures()).loss
        torch.manual_seed(7)
        torch.testing.assert_close(compiled(pictures()).loss, expected, rtol=1e-10, atol=0)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_the_whole_step_compiles_to_one_graph():
    torch._dynamo.reset()
    counter, method = CompileCounterWithBackend("eager"), copy.deepcopy(make()).float()
    torch.manual_seed(7)
    expected = method(pictures().float()).loss
    torch.manual_seed(7)
    found = torch.compile(method, backend=counter, fullgraph=True)(pictures().float()).loss
    assert counter.frame_count == 1
    torch.testing.assert_close(found, expected)
    torch._dynamo.reset()


def test_gradient_checkpointing_and_dropout():
    method = make({"drop_path_rate": 0.3, "proj_drop_rate": 0.2})
    twin = copy.deepcopy(method)
    twin.student.set_grad_checkpointing()
    for m in (method, twin):
        torch.manual_seed(9)
        m(pictures()).loss.backward()
    for (name, a), b in zip(method.named_parameters(), twin.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_pictures():
    method = make(normalize_target=True).eval()
    with torch.no_grad():  # a decoder that predicts nothing gives each patch its mean
        method.heads["decoder"].predict.weight.zero_()
        method.heads["decoder"].predict.bias.zero_()
    torch.manual_seed(7)
    panels = method.pictures(pictures())
    assert [(p.title, p.kind) for p in panels] == [
        ("input", "image"), ("masked input", "mask"), ("reconstruction", "image"), ("distance to teacher", "heat")
    ]  # fmt: skip
    seen = panels[1].image.bool()[:, None].expand(-1, 3, -1, -1)
    images, rebuilt, far = pictures(), panels[2].image, panels[3].image
    assert seen.double().mean() == 0.25
    assert torch.equal(rebuilt[seen], images[seen])
    cells = [x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).flatten(3) for x in (rebuilt, images, seen)]
    hidden = ~cells[2][..., 0]
    torch.testing.assert_close(cells[0][hidden].mean(-1), cells[1][hidden].mean(-1))
    assert cells[0][hidden].std(-1).max() < 1e-6
    assert far.amin() == 0
    assert far.flatten(1).amax(1).tolist() == [1.0] * 3
    assert (far[~seen[:, 0]] == 0).all()
    assert len(make(teacher=False).pictures(pictures())) == 3


def test_it_learns_from_pixels_and_from_the_teacher():
    torch.manual_seed(0)
    student, teacher = (tiny(i, depth=2).float() for i in range(2))
    method = fastmkd.DMAE(student, teacher, **DECODER).train()
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 3e-3)
    images = pictures(count=8).float().cumsum(3) / 6
    seen = []
    for _ in range(60):
        torch.manual_seed(1)  # one mask, to be learnt by heart
        out = method(images)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        seen.append(out.terms)
    for name in ("mae", "align"):
        assert seen[-1][name] < 0.7 * seen[0][name], name
