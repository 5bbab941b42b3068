"""DPK: the forward against plain loops, where gradients go, which networks, parameter counts."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from dpk_networks import SMALL, TARGETS, cnn, make, pictures
from tiny_vits import kl, tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastmkd
from fastmkd.methods.dpk_ratio import LinearDecay
from fastmkd.methods.dpk_stage import draw_from_teacher


def tokens_by_hand(feature: torch.Tensor, lift: nn.Conv2d, blocks: nn.Module, position: torch.Tensor) -> torch.Tensor:
    """``(C, h, w) -> (N, d)`` of one image, patch by patch."""
    k = lift.kernel_size[0]
    rows = []
    for y in range(0, feature.shape[1], k):
        for x in range(0, feature.shape[2], k):
            patch = feature[:, y : y + k, x : x + k]
            rows.append((lift.weight * patch).sum((1, 2, 3)) + lift.bias)
    tokens = torch.stack(rows) + position
    return blocks.norm(blocks.blocks(tokens[None]))[0]


def hybrid_by_hand(stage: nn.Module, student: torch.Tensor, teacher: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """``(C_S, h, w), (C_T, h, w), (N,) -> (C_T, h, w)`` of one image."""
    k, (channels, h, w) = stage.patch_size, teacher.shape
    of_student = tokens_by_hand(student, stage.lift_student, stage.encode_student, stage.position)
    of_teacher = tokens_by_hand(teacher, stage.lift_teacher, stage.encode_teacher, stage.position)
    hybrid = [of_teacher[n] if taken[n] else of_student[n] for n in range(len(taken))]
    hybrid = torch.stack([token + place for token, place in zip(hybrid, stage.position, strict=True)])
    decoded = stage.decode.blocks.norm(stage.decode.blocks.blocks(stage.decode.embed(hybrid)[None]))[0]
    patches = decoded @ stage.output.weight.T + stage.output.bias
    out = torch.zeros(channels, h, w, dtype=teacher.dtype)
    for n, patch in enumerate(patches):
        y, x = n // (w // k) * k, n % (w // k) * k
        out[:, y : y + k, x : x + k] = patch.view(channels, k, k)
    return out


@pytest.mark.parametrize("patch_size", [1, 2, 3])
def test_loss_by_hand(patch_size, monkeypatch):
    method = make(ratio=0.3, patch_size=patch_size, temperature=2.0)
    stage, images = method.heads["last"], pictures()
    drawn = []
    import fastmkd.methods.dpk as module

    original = module.draw_from_teacher
    monkeypatch.setattr(module, "draw_from_teacher", lambda *a: drawn.append(original(*a)) or drawn[-1])
    out = method(images, TARGETS)
    maps = [net.last(net.stem(images)) for net in (method.student, method.teacher)]
    tokens = (6 // patch_size) ** 2
    assert drawn[0].sum(1).tolist() == [round(0.3 * tokens)] * 4
    errors = [
        (hybrid_by_hand(stage, maps[0][b], maps[1][b], drawn[0][b]) - maps[1][b]).square().mean() for b in range(4)
    ]
    logits = method.student(images)
    ce, feat = F.cross_entropy(logits, TARGETS), sum(errors) / 4
    kd = 4 * kl(logits / 2, method.teacher(images) / 2)
    torch.testing.assert_close(out.terms["feat"], feat)
    torch.testing.assert_close(out.terms["kd"], kd)
    torch.testing.assert_close(out.loss, ce + 0.8 * kd + 0.2 * feat)
    torch.testing.assert_close(out.student_output, logits)
    assert out.terms["ratio"] == torch.tensor(0.3)
    assert not any(term.requires_grad for term in out.terms.values())


@pytest.mark.parametrize("depths", [(0, 0), (1, 2), (3, 1)])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0, None])
def test_tokens_left_out_of_the_last_block_change_nothing(depths, share):
    """On a CPU the last block of an encoder runs for the tokens taken from it; the other way runs it for all."""
    stage = make(encoder_depth=depths[0], decoder_depth=depths[1], patch_size=2).heads["last"]
    taken = torch.rand(4, 9) < 0.5 if share is None else draw_from_teacher("random", 4, (3, 3), torch.tensor(share))
    student, teacher = (torch.randn(4, c, 6, 6, dtype=torch.float64, requires_grad=True) for c in (8, 12))
    inputs, found = [student, teacher, *stage.parameters()], []
    for stitch in (stage._stitch_chosen, stage._stitch):
        hybrid = stitch(student, teacher, taken, stage.position)
        out = stage.output(stage.decode(hybrid, (3, 3)))
        found.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    torch.testing.assert_close(*found)


def test_each_image_draws_its_own_mask():
    method = make(ratio=0.5)
    maps = [torch.randn(64, c, 6, 6, dtype=torch.float64) for c in (8, 12)]
    from fastmkd.methods.features import Features

    ((_, _, _, taken),) = method._stitching(Features(None, {"last": maps[0]}), Features(None, {"last": maps[1]}))
    assert taken.sum(1).tolist() == [18] * 64
    assert len({tuple(row.tolist()) for row in taken}) > 60


def test_gradients_reach_student_and_heads_but_not_the_teacher():
    method = make(alpha=0.0, ratio=0.5).train()
    method(pictures(), TARGETS).loss.backward()
    assert [name for name, p in method.named_parameters() if p.grad is None] == []
    assert all(p.grad is None for p in method.teacher.parameters())
    feature_only = make(alpha=0.0, ratio=0.5).train()
    stage, images = feature_only.heads["last"], pictures()
    student = torch.randn(4, 8, 6, 6, dtype=torch.float64, requires_grad=True)
    taken = torch.zeros(4, 36, dtype=torch.bool)
    taken[:, ::2] = True
    stage(student, torch.randn(4, 12, 6, 6, dtype=torch.float64), taken).sum().backward()
    assert student.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in stage.parameters())
    assert images.grad is None


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_all_or_nothing_leaves_no_parameter_without_gradient(ratio):
    method = make(ratio=ratio).train()
    method(pictures(), TARGETS).loss.backward()
    assert [name for name, p in method.named_parameters() if p.grad is None] == []
    used = "lift_student" if ratio == 0 else "lift_teacher"
    for name in ("lift_student", "lift_teacher"):
        assert bool(getattr(method.heads["last"], name).weight.grad.abs().sum() > 0) is (name == used)


def test_several_stages():
    layers = {"stem": "stem", "last": "last"}
    method = make(layers, patch_size={"last": 3})
    assert [stage.patch_size for stage in method.heads.values()] == [2, 3]  # 12 x 12: the least for 49 tokens
    out = method(pictures(), TARGETS)
    assert set(out.terms) == {"ce", "kd", "feat", "ratio", "ratio.stem", "ratio.last"}
    torch.testing.assert_close(out.terms["ratio"], (out.terms["ratio.stem"] + out.terms["ratio.last"]) / 2)
    one = [make({name: name}, ratio=1.0, prior="zero") for name in layers]
    assert [len(m.heads) for m in one] == [1, 1]
    shared = [{id(p) for p in stage.parameters()} for stage in method.heads.values()]
    assert not shared[0] & shared[1]


def test_dynamic_ratio_is_one_minus_cka():
    method = make().train()
    images = pictures(count=8)
    out = method(images, torch.arange(8) % 5)
    maps = [net.last(net.stem(images)) for net in (method.student, method.teacher)]
    expected = 1 - fastmkd.cka_matrix([maps[0]], [maps[1]])[0, 0]
    assert 0 < expected < 1
    torch.testing.assert_close(out.terms["ratio"].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("student", "teacher", "layers"),
    [
        ("cnn", "vit", {"last": "blocks.1"}),
        ("vit", "cnn", {"blocks.1": "last"}),
        ("vit", "vit", {"blocks.0": "blocks.0", "blocks.1": "blocks.1"}),
    ],
)
def test_pairs_of_cnn_and_vit(student, teacher, layers):
    def build(kind, seed):
        return cnn(seed) if kind == "cnn" else tiny(seed, img_size=24, reg_tokens=seed, embed_dim=24 + 8 * seed)

    method = make(layers, build(student, 0), build(teacher, 1)).train()
    out = method(pictures(), TARGETS)
    out.loss.backward()
    assert out.loss.isfinite()
    assert [name for name, p in method.named_parameters() if p.grad is None] == []


def test_vit_map_leaves_prefix_tokens_out():
    student, teacher = tiny(0, img_size=24, reg_tokens=2), tiny(1, img_size=24)
    seen = {}
    method = make({"blocks.1": "blocks.1"}, student, teacher)
    method.heads["blocks_1"].register_forward_pre_hook(lambda _m, args: seen.update(s=args[0], t=args[1]))
    block = {}
    student.blocks[1].register_forward_hook(lambda _m, _a, out: block.update(s=out))
    method(pictures(), TARGETS)
    assert seen["s"].shape == (4, 24, 3, 3)
    assert torch.equal(seen["s"][1, :, 2, 1], block["s"][1, 3 + 7])


def test_masked_vits_are_what_they_wrap():
    found = []
    for wrap in (lambda vit: vit, fastmkd.MaskedViT):
        student, teacher = wrap(tiny(0, img_size=24)), wrap(tiny(1, img_size=24))
        torch.manual_seed(0)
        method = fastmkd.DPK(student, teacher, {"blocks.1": "blocks.0"}, ratio=1.0, **SMALL).double()
        assert method.release() is student
        found.append(method(pictures(), TARGETS).loss)
    torch.testing.assert_close(*found)


def test_swin_and_convnext():
    options = {"num_classes": 5}
    student = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), **options)
    teacher = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, depths=(1, 1, 1, 1), embed_dim=12, num_heads=(1, 1, 2, 2),
        window_size=2, **options,
    )  # fmt: skip
    method = fastmkd.DPK(student, teacher, {"stages.3": "layers.3"}, **{**SMALL, "image_size": 64})
    assert method.heads["stages_3"].lift_teacher.in_channels == 96
    assert method(torch.randn(4, 3, 64, 64), TARGETS).loss.isfinite()


def test_maps_of_other_sizes_are_resized_and_positions_interpolated():
    method = make(teacher=tiny(1, img_size=24, dynamic_img_size=True), layers={"last": "blocks.1"})
    assert method.heads["last"].made_for == (3, 3)
    for size in (24, 40):
        assert method(pictures(size), TARGETS).loss.isfinite()


def test_padding_keeps_the_loss_on_the_map():
    method = make(patch_size=4)
    assert method.heads["last"].made_for == (2, 2)
    student, teacher = torch.randn(2, 8, 6, 6, dtype=torch.float64), torch.randn(2, 12, 6, 6, dtype=torch.float64)
    taken = torch.tensor([[True, False, False, True]] * 2)
    whole = [F.pad(x, (0, 2, 0, 2)) for x in (student, teacher)]
    stage = method.heads["last"]
    torch.testing.assert_close(stage(student, teacher, taken), stage(*whole, taken)[:, :, :6, :6])


@pytest.mark.parametrize(
    ("depths", "millions"), [((1, 1), 10.5), ((2, 2), 20.0), ((4, 2), 32.6), ((4, 4), 38.9), ((6, 4), 51.5)]
)
def test_parameter_counts_of_table_17(depths, millions):
    with torch.device("meta"):
        student, teacher = timm.create_model("resnet18"), timm.create_model("resnet34")
        method = fastmkd.DPK(student, teacher, encoder_depth=depths[0], decoder_depth=depths[1])
    assert method.heads["layer4"].made_for == (7, 7)
    assert round(sum(p.numel() for p in method.heads.parameters()) / 1e6, 1) == millions


class Calls(TorchDispatchMode):
    """Every operation that runs, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_student_leaves_clean():
    student, teacher = cnn(0), cnn(1)
    keys, frozen = list(student.state_dict()), [p.requires_grad for p in teacher.parameters()]
    method = fastmkd.DPK(student, teacher, {"last": "last"}, **SMALL)
    assert [k for k in method.state_dict() if k.startswith("student.")] == ["student." + k for k in keys]
    assert not any("teacher" in k for k in method.state_dict() if not k.startswith("heads."))
    method.double()(pictures(), TARGETS).loss.backward()
    assert method.release() is student
    assert list(student.state_dict()) == keys
    fresh = cnn(0)
    fresh.load_state_dict(student.state_dict())
    with Calls() as left, torch.no_grad():
        found = student.eval()(pictures())
    with Calls() as never, torch.no_grad():
        expected = fresh.eval()(pictures())
    assert torch.equal(found, expected)
    assert left.names == never.names  # not an operation more than a network that never met a method
    assert not any(module._forward_hooks for net in (student, teacher) for module in net.modules())
    assert [p.requires_grad for p in teacher.parameters()] == frozen


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda method: pickle.loads(pickle.dumps(method))])
def test_copies(clone):
    method = make(ratio=1.0)
    twin = clone(method)
    expected = method(pictures(), TARGETS).loss
    assert torch.equal(twin(pictures(), TARGETS).loss, expected)
    assert twin.heads["last"].output.weight is not method.heads["last"].output.weight


def test_schedules_follow_the_epoch():
    method = make(ratio="exponential")
    method.set_epoch(3)
    torch.testing.assert_close(method(pictures(), TARGETS).terms["ratio"], torch.tensor(0.95**3))
    method = make(ratio={"class_path": "fastmkd.methods.dpk_ratio.LinearDecay", "init_args": {"decrement": 0.1}})
    method.set_epoch(4)
    torch.testing.assert_close(method(pictures(), TARGETS).terms["ratio"], torch.tensor(0.6))
    assert make(ratio=LinearDecay()).rules["last"].decrement == 0.95


def test_teacher_dtype_and_autocast():
    student, teacher = cnn(0).float(), cnn(1).float()
    seen = []
    teacher.stem[0].register_forward_hook(lambda _m, _a, out: seen.append(out.dtype))
    for dtype, ambient, expected in [
        (None, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32),
    ]:
        method = fastmkd.DPK(student, teacher, {"last": "last"}, teacher_dtype=dtype, **SMALL)
        with torch.autocast("cpu", ambient, enabled=ambient is not None):
            out = method(pictures().float(), TARGETS)
        assert seen.pop() == expected
        assert out.loss.dtype == torch.float32
        method.release()
    whole = fastmkd.DPK(student, teacher, {"last": "last"}, **SMALL).bfloat16()
    assert whole(pictures().bfloat16(), TARGETS).loss.dtype == torch.float32


def test_learns_the_teacher_s_map():
    method = make(alpha=0.0, beta=10.0, width=32).float().train()
    images, optimizer = pictures(count=8).float(), torch.optim.AdamW(method.parameters(), lr=3e-3)
    terms = []
    for _ in range(60):
        out = method(images, torch.arange(8) % 5)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        terms.append({name: value.item() for name, value in out.terms.items()})
    assert terms[-1]["feat"] < 0.3 * terms[0]["feat"]
    assert all(0 <= step["ratio"] <= 1 for step in terms)


def test_compiles():
    method = make().train()
    twin = copy.deepcopy(method)
    torch.manual_seed(0)
    out = torch.compile(method, backend="aot_eager")(pictures(), TARGETS)
    torch.manual_seed(0)
    torch.testing.assert_close(out.loss, twin(pictures(), TARGETS).loss)
    out.loss.backward()
    assert method.heads["last"].output.weight.grad.abs().max() > 0


def test_pictures():
    method = make(ratio=0.25, patch_size=3).eval()
    panels = method.pictures(pictures())
    assert [(p.title, p.kind) for p in panels] == [("input", "image"), ("student's part of last", "mask")]
    assert panels[1].image.shape == (4, 24, 24)
    assert panels[1].image.mean((1, 2)).tolist() == [0.75] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"ratio": "cosine"}, {"mask": "block"}, {"mask": "grid", "ratio": "linear"}])
def test_a_step_does_not_wait_for_the_gpu(options):
    method = make(teacher=cnn(1), **options).float().cuda().train()
    images, targets = pictures().float().cuda(), TARGETS.cuda()

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            out = method(images, targets)
        out.loss.backward()
        return out.loss

    step()  # the first use of each op may measure and write caches
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()
