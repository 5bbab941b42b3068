"""MKD's options: mask patches, tokens, schedule, inheriting, logits, other networks, and what is refused."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from dense_nets import SMALL, Segmenter, batch, detector, stages, teacher_of
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.fcn import FCN, FCNHead

import fastmkd
from fastmkd.methods.mkd_losses import Relation, channel_logit_loss, normalise, relation_loss
from fastmkd.ops.recovered_loss import recovered_loss
from fastmkd.reference.dense import dense_twin, upsampled


def make(student=None, teacher=None, **options):
    student = detector() if student is None else student
    teacher = teacher_of() if teacher is None else teacher
    return fastmkd.MKD(student, teacher, **{"mask_ratio": 0.3, **SMALL, **options})


def tiny_fcn(widths):
    body = IntermediateLayerGetter(stages(widths), {"layer3": "aux", "layer4": "out"})
    return FCN(body, FCNHead(widths[3], 3), FCNHead(widths[2], 3))


@pytest.mark.parametrize(("sam", "tokens"), [(16, [36] * 5), (32, [9] * 5), (64, [4] * 5), (False, [144, 36, 9, 4, 1])])
@pytest.mark.parametrize("mask_patch", [32, 64])
def test_tokens_of_each_level(sam, tokens, mask_patch):
    method = make(sam=sam, mask_patch=mask_patch)
    counts = []
    for decoder in method.heads["decoders"]:
        decoder.blocks.register_forward_pre_hook(lambda _m, args: counts.append(args[0].shape[1]))
    out = method(*batch())
    assert counts == tokens
    out.loss.backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


def test_visible_tokens_by_hand():
    method = make(mask_patch=32, sam=16)
    sight = type(
        "S",
        (),
        {"images": torch.zeros(1, 3, 72, 64), "visible": torch.tensor([[[True, False], [False, True], [True, True]]])},
    )
    tokens = method.visible_tokens(sight, method.levels[0])[0]
    expected = [[(y // 2, x // 2) not in ((0, 1), (1, 0)) for x in range(4)] for y in range(5)]
    assert tokens.tolist() == expected


@pytest.mark.parametrize("sam", [16, False])
def test_replaced_tokens_are_the_hidden_positions(sam):
    """Also where a hidden cell is smaller than a position, and the map is hidden by larger cells."""
    nets = [timm.create_model("resnet18", num_classes=5, layers=(1, 1, 1, 1), channels=(4, 4, 8, 8)) for _ in range(2)]
    layers = {"layer3": "layer3", "layer4": "layer4"}
    method = make(*nets, mask_patch=16, sam=sam, layers=layers, image_size=128, mask_ratio=0.3)
    images = torch.randn(2, 3, 128, 100)
    with method._backbone.masking(method.draw) as sight:
        maps = method.watch_student(images, torch.tensor([0, 1]), sight).levels.maps
    for level, decoder in zip(method.levels, method.heads["decoders"], strict=True):
        token = method._token(level)
        sizes = [-(-128 // token) * token, -(-100 // token) * token]
        hidden = ~upsampled(method.visible_tokens(sight, level), sizes)[:, :128, :100]
        zero = (maps[level.name] == 0).all(1).repeat_interleave(level.stride, 1).repeat_interleave(level.stride, 2)
        assert torch.equal(hidden, zero[:, :128, :100]), level.name
        assert hidden.any()
        assert decoder.mask_token is not None


def test_levels_behind_the_masked_part_have_no_mask_token():
    assert [d.mask_token is not None for d in make(mask_patch=16).heads["decoders"]] == [True] * 3 + [False] * 2


@pytest.mark.parametrize("mask", ["random", "grid", "block"])
def test_masks_hide_the_same_share(mask):
    visible, count = make(mask=mask, mask_ratio=0.25).draw(3, (4, 6), torch.device("cpu"))
    assert visible.flatten(1).sum(1).tolist() == [18] * 3
    assert count == 54
    assert not torch.equal(visible[0], visible[1]) or mask == "grid"


def test_last_epochs_go_without_teacher():
    method = make(epochs=5)
    asked = []
    method.teacher.backbone.register_forward_hook(lambda *_: asked.append(1))
    ratios = []
    for epoch in (0, 2, 3, 3.5, 4, 4.5, 5):
        method.set_epoch(epoch)
        ratios.append(round(method.ratio, 6))
    cosine = [round(0.1 * (1 + math.cos(math.pi * t / 4)), 6) for t in range(5)]
    assert ratios == [0.3, 0.3, *cosine]
    assert cosine[0] == 0.2
    assert cosine[-1] == 0
    method.set_epoch(2)
    assert "feat" in method(*batch()).terms
    assert asked == [1]
    method.set_epoch(4)
    out = method(*batch())
    assert sorted(out.terms) == ["bbox_regression", "classification"]
    assert asked == [1]
    assert torch.equal(out.loss, sum(out.terms.values()))


def test_nothing_hidden_is_the_ordinary_network():
    method = make(mask_ratio=0.0)
    oracle = copy.deepcopy(method.student)
    out, losses = method(*batch()), fastmkd.revert_cnn(oracle)(*batch())
    for name, value in losses.items():
        assert torch.equal(out.terms[name], value)


def test_a_share_too_small_for_the_grid_is_said():
    method = make(mask_ratio=0.05)
    with pytest.warns(UserWarning, match=r"a share of 0.05 of 3 x 3 cells hides none"):
        method(*batch())
    quiet = make(mask_ratio=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet(*batch())


@pytest.mark.parametrize("build", [make, fastmkd.DenseKD])
def test_inherit_copies_what_fits_and_names_the_rest(build):
    student, teacher = detector(), teacher_of(out=8)
    before = student.backbone.body["conv1"].weight.clone()
    method = build(student, teacher, inherit=True)
    ours, theirs = student.state_dict(), teacher.state_dict()
    assert "head.classification_head.cls_logits.weight" in method.inherited
    assert all(torch.equal(ours[name], theirs[name]) for name in method.inherited)
    assert method.not_inherited == [f"backbone.fpn.inner_blocks.{i}.0.weight" for i in (0, 2)]
    assert torch.equal(before, student.backbone.body["conv1"].weight)
    assert not any(name.startswith("backbone.body") for name in (*method.inherited, *method.not_inherited))


def class_map(kind, network, level):
    """``(B, K, h, w)`` of one level, as the head says it."""
    if kind == "faster_rcnn":
        return network.rpn.head([level])[0][0]
    if kind == "reppoints":
        return network.head([level])[0][0]
    said = network.head.classification_head([level])  # (B, h * w * A, K)
    return said.unflatten(1, (*level.shape[2:], -1)).flatten(3).permute(0, 3, 1, 2)


@pytest.mark.parametrize("kind", ["retinanet", "fcos", "reppoints", "faster_rcnn"])
def test_logits_by_hand(kind):
    method = make(detector(kind), teacher_of(kind), logits_weight=2.0, weight=0.0, global_weight=0.0, mask_ratio=0.0)
    assert len(method.heads) == 0
    images, targets = batch()
    torch.manual_seed(4)
    out = method(images, targets)
    batched = method.student.transform(images)[0].tensors
    losses = []
    networks = (method.student, method.teacher)
    levels = [network.backbone(batched) for network in networks]
    for key in levels[0]:
        logits = [class_map(kind, network, found[key]) for network, found in zip(networks, levels, strict=True)]
        losses.append(channel_logit_loss(*logits))
    torch.testing.assert_close(out.terms["logits"], torch.stack(losses).sum().detach())
    torch.testing.assert_close(
        out.loss, sum(v for k, v in out.terms.items() if k != "logits") + 2 * out.terms["logits"]
    )


def test_channel_logit_loss_by_hand():
    s, t = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    total = 0.0
    for b in range(2):
        for c in range(3):
            p, q = (t[b, c].flatten() / 2).softmax(0), (s[b, c].flatten() / 2).softmax(0)
            total += (p * (p / q).log()).sum()
    torch.testing.assert_close(channel_logit_loss(s, t, 2.0), 4 * total / 6)


def test_segmentation_by_hand():
    student, teacher = Segmenter(), Segmenter((4, 8, 8, 12), seed=1)
    method = make(student, teacher, logits_weight=3.0, global_weight=0.0, weight=7.0, mask_ratio=0.0)
    images, targets = torch.rand(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
    targets[:, :10] = 255
    out = method(images, targets)
    logits, theirs = student(images), teacher.eval()(images)
    kept = targets != 255
    ce = F.cross_entropy(logits.permute(0, 2, 3, 1)[kept], targets[kept])
    torch.testing.assert_close(out.terms["ce"], ce.detach())
    torch.testing.assert_close(out.terms["logits"], channel_logit_loss(logits, theirs).detach())
    assert [level.name for level in method.levels] == ["encoder:-1"]
    torch.testing.assert_close(out.student_output, logits)


def test_torchvision_segmenter():
    torch.manual_seed(0)
    method = make(tiny_fcn((4, 4, 8, 8)), tiny_fcn((4, 8, 8, 12)), mask_ratio=0.25)
    assert method.form.part == "backbone"
    assert [(level.name, level.stride) for level in method.levels] == [("backbone:out", 32)]
    out = method(torch.rand(2, 3, 64, 72), torch.randint(0, 3, (2, 64, 72)))
    assert sorted(out.terms) == ["aux", "ce", "feat", "global"]
    assert out.student_output.shape == (2, 3, 64, 72)
    terms = out.terms
    expected = terms["ce"] + 0.5 * terms["aux"] + 3 * terms["feat"] + 3e-6 * terms["global"]
    torch.testing.assert_close(out.loss, expected)


def test_classifier_sees_visible_positions_alone():
    narrow = {"num_classes": 5, "layers": (1, 1, 1, 1), "channels": (4, 4, 8, 8)}
    student, teacher = timm.create_model("resnet18", **narrow), timm.create_model("resnet18", **narrow)
    method = make(student, teacher, image_size=96)
    twin = dense_twin(student)
    drawn, draw = [], method.draw
    method.draw = lambda *args: drawn.append(draw(*args)) or drawn[-1]
    images = torch.randn(2, 3, 96, 96)
    out = method(images, torch.tensor([1, 2]))
    torch.testing.assert_close(out.student_output, twin(images, drawn[0][0]), rtol=1e-4, atol=1e-5)
    out.loss.backward()
    assert all(p.grad is not None for p in student.parameters())


def test_swin_by_tokens():
    """Hidden pixels change nothing, and the levels are zero where hidden."""
    small = {
        "img_size": 128,
        "embed_dim": 8,
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 1, 1, 1),
        "window_size": 4,
        "num_classes": 3,
    }
    torch.manual_seed(0)
    nets = [timm.create_model("swin_tiny_patch4_window7_224", **small) for _ in range(2)]
    method = make(*nets)
    assert [level.stride for level in method.levels] == [32]
    drawn, draw = [], method.draw
    method.draw = lambda *args: drawn.append(draw(*args)) or drawn[-1]
    stages_out = []
    nets[0].norm.register_forward_pre_hook(lambda _m, args: stages_out.append(args[0]))
    images = torch.randn(2, 3, 128, 128, requires_grad=True)
    method(images, torch.tensor([1, 2])).loss.backward()
    hidden = ~upsampled(drawn[0][0], (128, 128))[:, None].expand(-1, 3, -1, -1)
    assert not images.grad[hidden].any()
    assert images.grad[~hidden].any()
    assert not stages_out[0].detach()[~drawn[0][0]].any()
    assert all(not stage._forward_pre_hooks and not stage._forward_hooks for stage in nets[0].layers)


def test_autocast():
    """Low precision for products, float32 for losses and gradients; about the same loss."""
    losses = []
    for enabled in (False, True):
        method = make(generator=torch.Generator().manual_seed(1))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = method(*batch())
        out.loss.backward()
        assert out.loss.dtype == out.terms["feat"].dtype == torch.float32
        assert all(p.grad.dtype == torch.float32 for p in method.parameters() if p.requires_grad)
        losses.append(out.loss.detach())
    torch.testing.assert_close(*losses, rtol=0.02, atol=0.0)


BAD_NUMBERS = [
    ({"mask_ratio": 1.0}, r"mask_ratio is 1.0; expected a share"),
    ({"last_mask_ratio": -0.1}, r"last_mask_ratio is -0.1"),
    ({"weight": -1}, r"weight is -1; expected a finite number"),
    ({"global_weight": math.nan}, r"global_weight is nan"),
    ({"logits_weight": "3"}, r"logits_weight is '3'"),
    ({"logits_temperature": 0}, r"logits_temperature is 0"),
    ({"mask": "blocks"}, r"mask is 'blocks'; expected 'random', 'grid' or 'block'"),
    ({"stats": "some"}, r"stats is 'some'"),
    ({"mask_patch": 48}, r"tokens of 32 pixels, and cells of the mask are 48 pixels apart"),
    ({"mask_patch": 48, "sam": 48}, r"tokens of 48 pixels, and positions of 'backbone.fpn:2' are 32"),
    ({"mask_patch": 0}, r"mask_patch is 0"),
    ({"sam": 24}, r"sam is 24, tokens of 24 pixels, and cells of the mask are 32"),
    ({"sam": -1}, r"sam is -1"),
    ({"decoder_width": 30, "decoder_heads": 8}, r"decoder_width is 30, which 8 attention heads do not divide"),
    ({"decoder_depth": 1.5}, r"decoder_depth is 1.5"),
    ({"epochs": 1}, r"epochs is 1; expected None, or all epochs"),
    ({"layers": {}}, r"layers is empty"),
    ({"layers": {"backbone.fpn:5": "backbone.fpn:1"}}, r"returns the levels 0, 1, 2, p6, p7, and no '5' among them"),
    ({"layers": {"backbone.neck": "backbone.fpn"}}, r"student has no module 'backbone.neck'"),
    ({"layers": {"backbone.fpn:0": "backbone.fpn:1"}}, r"has 32 x 32 positions but the teacher's .* 16 x 16"),
    ({"layers": {"backbone.fpn": "backbone.fpn:1"}}, r"levels 0, 1, 2, p6, p7 but the teacher's .* 1; pair them"),
    ({"layers": {"head": "head"}}, r"lies outside of 'backbone'"),
    ({"layers": {"backbone.body.conv1:0": "backbone.body.conv1"}}, r"one map, so backbone.body.conv1:0 is none"),
    ({"backbone": "body"}, r"backbone is 'body'; the student has no module of that name"),
    ({"teacher_dtype": torch.int8}, r"teacher_dtype is torch.int8"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "sentence"), BAD_NUMBERS)
def test_refused_arguments(options, sentence):
    student, teacher = detector(), teacher_of()
    with pytest.raises(ValueError, match=sentence):
        make(student, teacher, **options)
    assert all(p.requires_grad for net in (student, teacher) for p in net.parameters())
    assert type(student.backbone.body["conv1"]) is nn.Conv2d


def test_refused_networks():
    with pytest.raises(TypeError, match="teacher is a NoneType"):
        fastmkd.MKD(detector(), None)
    with pytest.raises(ValueError, match="student is made for detection but teacher for segmentation"):
        make(detector(), Segmenter())
    with pytest.raises(ValueError, match="which levels to compare is not known"):
        make(nn.Sequential(nn.Conv2d(3, 4, 1)), nn.Sequential(nn.Conv2d(3, 4, 1)))
    with pytest.raises(ValueError, match=r"has the levels 0, 1, 2, p6, p7 but the teacher's .* 0, 1, 2, 3, pool"):
        make(detector(), teacher_of("faster_rcnn"))
    teacher = teacher_of()
    teacher.transform.image_std = [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="the student's transform has image_std"):
        make(teacher=teacher)
    student = detector()
    student.backbone.fpn = None
    with pytest.raises(ValueError, match="whose backbone has no 'fpn'"):
        make(student)
    student = detector()
    student.backbone.body["relu"] = nn.InstanceNorm2d(4)
    with pytest.raises(TypeError, match=r"InstanceNorm2d, which has no masked form"):
        make(student)
    narrow = {"num_classes": 5, "layers": (1, 1, 1, 1), "channels": (4, 4, 8, 8)}
    nets = [timm.create_model("resnet18", **narrow) for _ in range(2)]
    with pytest.raises(ValueError, match="logits_weight compares maps of class logits"):
        make(*nets, logits_weight=1.0)
    other = timm.create_model("resnet18", **{**narrow, "num_classes": 7})
    for build in (make, fastmkd.DenseKD):
        with pytest.raises(ValueError, match=r"nothing outside of .* fc.weight, fc.bias"):
            build(nets[0], other, inherit=True, image_size=64)
        assert type(nets[0].conv1) is nn.Conv2d, "a refused method gives the student back as it came"


BAD_BATCHES = [
    (lambda i, t: (torch.stack([i[0], i[0]]), t), TypeError, r"must be a list of \(C, H, W\) tensors"),
    (lambda i, t: (i, t[0]), TypeError, "must be a list of dicts"),
    (lambda i, t: (i, t[:1]), ValueError, "images holds 2 images but targets 1"),
    (lambda i, t: t[0].update(labels=None), TypeError, r"targets\[0\] has no tensor 'labels'"),
    (lambda i, t: t[1].update(boxes=torch.zeros(4)), ValueError, r"targets\[1\]\['boxes'\] has shape \(4,\)"),
    (lambda i, t: t[0].update(labels=torch.tensor([1.0, 2.0])), TypeError, r"is torch.float32 of shape \(2,\)"),
    (lambda i, t: t[0].update(labels=torch.tensor([1, 9])), ValueError, r"holds 9, but this detector has the classes"),
    (lambda i, t: t[0]["boxes"][1].copy_(torch.tensor([5.0, 5, 5, 9])), ValueError, r"\['boxes'\]\[1\] is \[5.0, 5.0"),
    (lambda i, t: t[0]["boxes"][0].fill_(math.nan), ValueError, r"no box; expected finite corners"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "sentence"), BAD_BATCHES)
@pytest.mark.parametrize("kind", ["retinanet", "faster_rcnn"])
def test_refused_batches(change, error, sentence, kind):
    images, targets = batch()
    changed = change(images, targets)
    images, targets = changed if isinstance(changed, tuple) else (images, targets)
    with pytest.raises(error, match=sentence):
        _METHODS[kind](images, targets)


def test_a_detector_in_eval_mode_has_no_losses():
    method = make().eval()
    with pytest.raises(ValueError, match="as a detector does in eval mode"):
        method(*batch())


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        (torch.full((2, 64, 64), 3), "targets holds the label 3; the logits have 0 to 2"),
        (torch.zeros(2, 32, 64, dtype=torch.int64), r"targets has shape \(2, 32, 64\); expected \(2, 64, 64\)"),
    ],
)
def test_refused_segmentation_targets(targets, sentence):
    method = make(Segmenter(), Segmenter(seed=1))
    with pytest.raises(ValueError, match=sentence):
        method(torch.rand(2, 3, 64, 64), targets)


class _Made(dict):
    def __missing__(self, kind):
        self[kind] = make(detector(kind), teacher_of(kind))
        return self[kind]


_METHODS = _Made()


@pytest.mark.parametrize("widths", [(6,), (6, 6, 6), (4, 8, 4), (1, 3)])
def test_relations_of_all_levels_are_those_of_each(widths):
    """Levels of one width run as one batch; the oracle writes every map out."""
    torch.manual_seed(1)
    relations = [Relation(width).double() for width in widths]
    for relation in relations:
        for weight in relation.parameters():
            nn.init.normal_(weight)
    maps = [torch.randn(2, 2, c, 3, 4 + i, dtype=torch.float64) for i, c in enumerate(widths)]
    student = [x[0].requires_grad_() for x in maps]
    rows = [x.flatten(2).mT for x in student]  # (B, h * w, C): what a decoder with p = 1 says
    recovered = [
        recovered_loss(row, x[1], 1, relation.queries()) for row, x, relation in zip(rows, maps, relations, strict=True)
    ]
    ours = relation_loss(relations, recovered, [x[0, 0, 0].numel() for x in maps])
    plain = sum(
        relation(normalise(own), normalise(x[1])) for relation, own, x in zip(relations, student, maps, strict=True)
    )
    torch.testing.assert_close(ours, plain)
    leaves = [*student, *(weight for relation in relations for weight in relation.parameters())]
    for got, expected in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(got, expected)
