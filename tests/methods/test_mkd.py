"""MKD: loss and gradients against plain loops and a dense twin, what the student is before and after, training."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from dense_nets import SMALL, Segmenter, batch, detector, teacher_of
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import fastmkd
from fastmkd.methods.mkd_decoder import AdaptiveDecoder, resample
from fastmkd.nn.masked_conv import MaskedConv2d
from fastmkd.reference.dense import dense_twin, upsampled

SINGLE = {"retinanet": {"global_weight": 0.25}, "fcos": {"global_weight": 0.0}, "faster_rcnn": {"global_weight": 0.5}}


def make(kind="retinanet", norm=nn.BatchNorm2d, dtype=torch.float32, **options):
    student, teacher = detector(kind, norm=norm).to(dtype), teacher_of(kind, norm=norm).to(dtype)
    torch.manual_seed(11)
    method = fastmkd.MKD(student, teacher, **{"mask_ratio": 0.3, **SMALL, **options}).to(dtype)
    for parameter in method.heads.parameters():  # what starts at zero would hide mistakes
        if not parameter.abs().max():
            nn.init.normal_(parameter, std=0.2)
    return method.train()


def record(method):
    """The masks that a method draws from now on."""
    drawn, draw = [], method.draw

    def remember(*args):
        drawn.append(draw(*args))
        return drawn[-1]

    method.draw = remember
    return drawn


class MaskedTwin(nn.Module):
    """A body between masks, as a dense network."""

    def __init__(self, body):
        super().__init__()
        self.twin, self.visible = dense_twin(body), None

    def forward(self, images):
        maps = self.twin(images, self.visible)
        for name, x in maps.items():
            maps[name] = x * upsampled(self.visible, x.shape[2:])[:, None]
        return maps


def tokens_by_hand(decoder, level, visible):
    """``(C, h, w), (gh, gw) -> (gh * gw, D)``, token by token."""
    p, (gh, gw) = decoder.patch, visible.shape
    aligned = decoder.phi(level[None])[0]  # (D, h, w)
    table = F.interpolate(decoder.position.permute(2, 0, 1)[None], (gh, gw), mode="bilinear", align_corners=False)[0]
    rows = []
    for y in range(gh):
        for x in range(gw):
            if decoder.mask_token is not None and not visible[y, x]:
                token = decoder.mask_token
            elif p > 1:
                cell = aligned[:, y * p : (y + 1) * p, x * p : (x + 1) * p]
                cell = F.pad(cell, (0, p - cell.shape[2], 0, p - cell.shape[1]))
                token = (decoder.sam.weight * cell).sum((1, 2, 3)) + decoder.sam.bias
            else:  # the nearest position of a level that is as fine as the tokens, or coarser
                token = aligned[:, y * aligned.shape[1] // gh, x * aligned.shape[2] // gw]
            rows.append(token + table[:, y, x])
    return torch.stack(rows)


def restored_by_hand(decoder, level, visible, size):
    """``(C_S, h, w) -> (C_T, h, w)`` of one image."""
    p, (gh, gw) = decoder.patch, visible.shape
    rows = decoder.srm(decoder.norm(decoder.blocks(tokens_by_hand(decoder, level, visible)[None])))[0]
    whole = rows.new_zeros(rows.shape[1] // (p * p), gh * p, gw * p)
    for n, row in enumerate(rows):
        for i, position in enumerate(row.view(p * p, -1)):
            whole[:, n // gw * p + i // p, n % gw * p + i % p] = position
    if p == 1 and (gh, gw) != tuple(size):
        return F.adaptive_avg_pool2d(whole[None], size)[0]
    return whole[:, : size[0], : size[1]]


def normalised_by_hand(x):
    return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()


def context_by_hand(block, x):
    share = (x * block.attend.weight[0]).sum(0)  # (h, w)
    share = share.exp() / share.exp().sum()
    return x + block.transform((x * share).sum((1, 2))[None, :, None, None])[0]


def loss_by_hand(method, oracle, images, targets, visible, weights):
    """The whole loss by a dense copy of the student and loops over images, levels and tokens."""
    levels = {}
    oracle.backbone.body.visible = visible
    hook = oracle.backbone.register_forward_hook(lambda _m, args, out: levels.update(out, images=args[0]))
    losses = oracle(images, targets)
    hook.remove()
    batch_images = levels.pop("images")
    with torch.no_grad():
        taught = method.teacher.backbone(batch_images)
    feat = related = 0.0
    heads = copy.deepcopy(method.heads)
    for i, (key, level) in enumerate(levels.items()):
        target, decoder = taught[key], heads["decoders"][i]
        for b in range(len(level)):
            restored = restored_by_hand(decoder, level[b], visible[b], target.shape[2:])
            s, t = normalised_by_hand(restored), normalised_by_hand(target[b])
            feat = feat + 0.5 * (s - t).square().mean() / len(level)
            if weights[1]:
                blocks = heads["relations"][i]
                far = context_by_hand(blocks.student, s) - context_by_hand(blocks.teacher, t)
                related = related + far.square().sum() / len(level)
    return losses, feat, related, sum(losses.values()) + weights[0] * feat + weights[1] * related, heads


@pytest.mark.parametrize(
    ("kind", "norm"), [("retinanet", nn.BatchNorm2d), ("fcos", FrozenBatchNorm2d), ("faster_rcnn", nn.BatchNorm2d)]
)
def test_loss_and_gradients_by_hand(kind, norm):
    method = make(kind, norm, torch.float64, generator=torch.Generator().manual_seed(2), **SINGLE[kind])
    images, targets = batch(dtype=torch.float64)
    oracle = copy.deepcopy(method.student)
    oracle.backbone.body = MaskedTwin(oracle.backbone.body)
    drawn = record(method)
    torch.manual_seed(5)  # a two-stage detector samples proposals
    out = method(images, targets)
    visible, count = drawn[0]
    assert visible.shape == (2, 3, 3)
    assert count == visible.sum() == 2 * 6
    torch.manual_seed(5)
    weights = (3.0, SINGLE[kind]["global_weight"])
    losses, feat, related, loss, heads = loss_by_hand(method, oracle, images, targets, visible, weights)
    for name, value in losses.items():
        torch.testing.assert_close(out.terms[name], value.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.terms["feat"], feat.detach(), rtol=1e-9, atol=1e-9)
    if weights[1]:
        torch.testing.assert_close(out.terms["global"], related.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.loss, loss, rtol=1e-9, atol=1e-9)
    out.loss.backward()
    loss.backward()
    theirs = {name.replace("body.twin.", "body."): p.grad for name, p in oracle.named_parameters()}
    for name, p in method.student.named_parameters():
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, theirs[name], rtol=1e-7, atol=1e-9, msg=name)
    for (name, p), other in zip(method.heads.named_parameters(), heads.parameters(), strict=True):
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, other.grad, rtol=1e-7, atol=1e-9, msg=name)
    for (name, buffer), other in zip(method.student.named_buffers(), oracle.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, msg=name)


def test_levels_coarser_than_the_mask_have_no_mask_token():
    method = make()
    decoders = method.heads["decoders"]
    assert [level.stride for level in method.levels] == [8, 16, 32, 64, 128]
    assert [decoder.patch for decoder in decoders] == [4, 2, 1, 1, 1]
    assert [decoder.mask_token is not None for decoder in decoders] == [True, True, True, False, False]


def test_the_student_is_itself_before_and_after():
    student, images = detector(), batch()[0]
    keys, parameters = list(student.state_dict()), list(map(id, student.parameters()))
    before = student.eval()(images)
    method = fastmkd.MKD(student, teacher_of(), **SMALL)
    assert isinstance(student.backbone.body["conv1"], MaskedConv2d)
    during = student.eval()(images)
    assert method.release() is student
    after = student.eval()(images)
    for one, two, three in zip(before, during, after, strict=True):
        for key in one:
            assert torch.equal(one[key], two[key])
            assert torch.equal(one[key], three[key])
    assert list(student.state_dict()) == keys
    assert list(map(id, student.parameters())) == parameters
    assert type(student.backbone.body["conv1"]) is nn.Conv2d
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())


def test_no_teacher_in_the_state_and_only_backbone_and_pyramid_run():
    method = make()
    ran = []
    for name, module in method.teacher.named_modules():
        module.register_forward_hook(lambda _m, _a, _o, name=name: ran.append(name))
    method(*batch())
    assert "backbone.fpn" in ran
    assert not any(name.startswith(("head", "transform")) or not name for name in ran)
    assert not any("teacher" in key for key in method.state_dict() if not key.startswith("heads.relations"))
    assert not any(p.requires_grad for p in method.teacher.parameters())


def test_training_lowers_the_loss():
    method, (images, targets) = make(generator=torch.Generator().manual_seed(1)), batch()
    optimizer = torch.optim.AdamW(method.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        out = method(images, targets)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_same_seed_same_bits():
    def step():
        method = make(generator=torch.Generator().manual_seed(1))
        out = method(*batch())
        out.loss.backward()
        return out.loss, [p.grad for p in method.parameters()]

    (loss, gradients), (again, others) = step(), step()
    assert torch.equal(loss, again)
    assert all(torch.equal(one, other) for one, other in zip(gradients, others, strict=True))


def test_frozen_stages_stay_frozen_and_are_named():
    student = detector()
    for name in ("conv1", "bn1", "layer1"):
        student.backbone.body[name].requires_grad_(False)
    method = fastmkd.MKD(student, teacher_of(), mask_ratio=0.3, **SMALL)
    assert method.frozen_parts == [f"backbone.body.{name}" for name in ("conv1", "bn1", "layer1")]
    assert "came frozen: backbone.body.conv1, backbone.body.bn1, backbone.body.layer1" in repr(method)
    method(*batch()).loss.backward()
    assert student.backbone.body["conv1"].weight.grad is None
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)
    assert not method.release().backbone.body["conv1"].weight.requires_grad


@pytest.mark.parametrize("masked_conv", [True, False])
def test_images_that_cells_do_not_tile(masked_conv):
    """A segmenter gets 72 x 100 pixels: 3 x 4 cells of 32, the last ones beyond the edge."""
    method = fastmkd.MKD(
        Segmenter(), Segmenter((4, 8, 8, 12), seed=1), mask_ratio=0.25, masked_conv=masked_conv, **SMALL
    )
    seen = []
    method.student.decoder.register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape))
    out = method(torch.rand(2, 3, 72, 100), torch.randint(0, 3, (2, 72, 100)))
    assert seen == [(2, 8, 3, 4)]
    assert out.student_output.shape == (2, 3, 72, 100)
    out.loss.backward()
    reached = {n for n, p in method.student.named_parameters() if p.grad is not None}
    assert reached == {n for n, p in method.student.named_parameters() if "unused" not in n}
    assert not method.student.encoder.unused.weight.requires_grad
    assert method.release().encoder.unused.weight.requires_grad


def test_hidden_pixels_change_nothing():
    """Behind the mask the images may be anything: the same loss, and no gradient."""
    method = make(norm=FrozenBatchNorm2d)
    images, targets = batch()
    drawn = record(method)
    images = [x.requires_grad_() for x in images]
    method(images, targets).loss.backward()
    visible = upsampled(drawn[0][0], (96, 96))
    for image, seen in zip(images, visible, strict=True):
        scale = 96 / max(image.shape[1:])  # images keep their sides here
        assert scale == 1
        seen = seen[: image.shape[1], : image.shape[2]]
        assert not image.grad[:, ~seen].any()
        assert image.grad[:, seen].any()


def test_decoder_parameter_count():
    """Four blocks of 256 with MLP ratio 8: 4 * 256^2 * (1 + 4) a block, and what is around them."""
    decoder = AdaptiveDecoder(256, 256, 4)
    blocks = sum(p.numel() for p in decoder.blocks.parameters() if p.dim() == 2)
    assert blocks == 4 * (4 * 256**2 + 2 * 8 * 256**2)
    assert decoder.srm.out_features == 16 * 256
    assert decoder.position.shape == (28, 28, 256)


@pytest.mark.parametrize("height", [6, 5])
def test_phi_and_sam_as_one_product(height):
    """Both convolutions in one, for whole cells; the last row of cells of an odd level is half empty."""
    torch.manual_seed(0)
    decoder = AdaptiveDecoder(6, 4, 2, masked=False, width=16, heads=2).double()
    level = torch.randn(2, 6, height, 6, dtype=torch.float64, requires_grad=True)
    found = decoder.tokens(level, torch.ones(2, 3, 3, dtype=torch.bool))
    aligned = decoder.sam(F.pad(decoder.phi(level), (0, 0, 0, 6 - height)))
    expected = aligned.flatten(2).mT + resample(decoder.position, (3, 3), "linear").flatten(0, 1)
    torch.testing.assert_close(found, expected)
    inputs, pull = [level, *decoder.phi.parameters(), *decoder.sam.parameters()], torch.randn_like(found)
    torch.testing.assert_close(*(torch.autograd.grad((x * pull).sum(), inputs) for x in (found, expected)))
