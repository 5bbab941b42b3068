"""The methods beside MKD, each against its paper's formula, on detectors, segmenters and classifiers."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from dense_nets import SMALL, Segmenter, batch, detector, teacher_of

import fastmkd
from fastmkd.methods.dense_bases import CWD, DPKFGD, FGD, MGD
from fastmkd.methods.fgd import attention_weights, box_masks, imitation_loss
from fastmkd.methods.mkd_losses import channel_logit_loss

SMALL_DPK = {"encoder_depth": 1, "decoder_depth": 1, "width": 16}


def levels_of(method, images):
    batched = method.student.transform(images)[0].tensors
    with torch.no_grad():
        return [list(network.backbone(batched).values()) for network in (method.student, method.teacher)]


def make(base, **options):
    torch.manual_seed(0)
    return fastmkd.DenseKD(detector(), teacher_of(), base=base, **options)


def test_fitnet_by_hand():
    method, (images, targets) = make("fitnet", weight=0.5), batch()
    out = method(images, targets)
    student, teacher = levels_of(method, images)
    adapt = method.heads["adapt"]
    expected = sum(F.mse_loss(layer(s), t) for layer, s, t in zip(adapt, student, teacher, strict=True))
    torch.testing.assert_close(out.terms["base"], expected.detach())
    task = out.terms["classification"] + out.terms["bbox_regression"]
    torch.testing.assert_close(out.loss, task + 0.5 * out.terms["base"])


def test_cwd_by_hand():
    method, (images, targets) = make(CWD(temperature=2.0)), batch()
    out = method(images, targets)
    total = 0.0
    for layer, s, t in zip(method.heads["adapt"], *levels_of(method, images), strict=True):
        p, q = ((x.flatten(2) / 2).softmax(2) for x in (t, layer(s)))
        total += 4 * (p * (p.log() - q.log())).sum() / (p.shape[0] * p.shape[1])
    torch.testing.assert_close(out.terms["base"], total.detach(), rtol=1e-4, atol=1e-6)
    assert method.weight == 50


def test_mgd_by_hand():
    method, (images, targets) = make(MGD(mask_ratio=0.0)), batch()
    out = method(images, targets)
    total = 0.0
    for layer, generate, s, t in zip(
        method.heads["adapt"], method.heads["generate"], *levels_of(method, images), strict=True
    ):
        total += (generate(layer(s)) - t).square().sum() / 2
    torch.testing.assert_close(out.terms["base"], total.detach(), rtol=1e-4, atol=1e-4)


def test_mgd_hides_its_share_of_positions():
    method = make(MGD(mask_ratio=0.75))
    kept = []
    method.heads["generate"][0].register_forward_pre_hook(lambda _m, args: kept.append((args[0] != 0).any(1)))
    torch.manual_seed(0)
    for _ in range(4):
        method(*batch())
    share = torch.stack(kept).float().mean()
    assert 0.2 < share < 0.3  # 4 x 2 x 144 draws: three deviations are 0.04


def attention_and_relation_by_hand(method, student, teacher):
    """FGD's terms besides its imitation, of adapted maps, with weights 3e-2 and 4e-4."""
    total = 0.0
    for relation, s, t in zip(method.heads["relation"], student, teacher, strict=True):
        (ss, sc), (ts, tc) = attention_weights(s), attention_weights(t)
        total = total + 3e-2 * ((ss - ts).abs().sum() + (sc - tc).abs().sum()) / 2
        total = total + 4e-4 * (relation.student(s) - relation.teacher(t)).square().sum() / 2
    return total


def stir_relations(method):
    """Context blocks begin as the identity, whatever their weights."""
    for blocks in method.heads["relation"]:
        for block in (blocks.student, blocks.teacher):
            torch.nn.init.normal_(block.transform[-1].weight, std=0.2)


def test_fgd_by_hand():
    method, (images, targets) = make(FGD(1e-2, 2e-2, 3e-2, 4e-4)), batch()
    stir_relations(method)
    out = method(images, targets)
    boxes = [target["boxes"] for target in targets]  # images keep their size here
    student, teacher = levels_of(method, images)
    student = [adapt(s) for adapt, s in zip(method.heads["adapt"], student, strict=True)]
    total = attention_and_relation_by_hand(method, student, teacher)
    for s, t in zip(student, teacher, strict=True):
        total = total + imitation_loss(s, t, *box_masks(boxes, (96, 96), t.shape[2:]), 1e-2, 2e-2)
    torch.testing.assert_close(out.terms["base"], total.detach(), rtol=1e-4, atol=1e-4)


def test_dpk_replaces_the_imitation_term_of_fgd_and_nothing_else():
    base = DPKFGD(0.5, 1e-2, 2e-2, attention_weight=3e-2, relation_weight=4e-4, **SMALL_DPK)
    method, (images, targets) = make(base), batch()
    stir_relations(method)
    hybrids = []
    for stage in method.heads["imitation"].levels:
        stage.register_forward_hook(lambda _m, _a, out: hybrids.append(out.detach()))
    out = method(images, targets)
    boxes = [target["boxes"] for target in targets]
    student, teacher = levels_of(method, images)
    student = [adapt(s) for adapt, s in zip(method.heads["adapt"], student, strict=True)]
    rest = attention_and_relation_by_hand(method, student, teacher)
    total = rest
    for hybrid, t in zip(hybrids, teacher, strict=True):
        total = total + imitation_loss(hybrid, t, *box_masks(boxes, (96, 96), t.shape[2:]), 1e-2, 2e-2)
    torch.testing.assert_close(out.terms["base"], total.detach(), rtol=1e-4, atol=1e-4)
    assert rest > 0.05 * total  # a comparison that would notice either term's absence


def test_dpk_has_fgd_s_weights_of_what_it_leaves():
    for name in ("attention_weight", "relation_weight", "temperature"):
        assert getattr(DPKFGD(), name) == getattr(FGD(), name)
    with pytest.raises(ValueError, match="relation_weight is -1"):
        DPKFGD(relation_weight=-1)


@pytest.mark.parametrize("kind", ["retinanet", "faster_rcnn"])
@pytest.mark.parametrize("sides", [((640, 800), 1333), ((96,), 96), ((210,), 300)])
def test_dpk_s_patches_are_for_what_the_detector_resizes_to(kind, sides):
    """At most 49 tokens a level of the batch that the transform makes, and not one patch less coarse than that."""
    nets = detector(kind), teacher_of(kind)
    for network in nets:
        network.transform.min_size, network.transform.max_size = sides
    shortest, longest = sides[0][-1], sides[1]
    images = nets[0].transform.eval()([torch.zeros(3, shortest, longest)])[0].tensors  # as it comes out
    with torch.no_grad():
        sizes = [tuple(x.shape[2:]) for x in nets[0].backbone(images).values()]
    method = fastmkd.DenseKD(*nets, base=DPKFGD(ratio=0.5, **SMALL_DPK))
    assert [level.size for level in method.levels] == sizes
    for stage, (h, w) in zip(method.heads["imitation"].levels, sizes, strict=True):
        tokens = [-(-h // k) * -(-w // k) for k in (stage.patch_size, max(1, stage.patch_size - 1))]
        assert tokens[0] <= 49
        assert stage.patch_size == 1 or tokens[1] > 49
    given = fastmkd.DenseKD(detector(kind), teacher_of(kind), base="fitnet", image_size=(128, 256))
    assert given.levels[0].size == ((32, 64) if kind == "faster_rcnn" else (16, 32))


@pytest.mark.parametrize("base", ["mgd", "fgd", DPKFGD(ratio=0.5, **SMALL_DPK), "fitnet", "cwd"])
@pytest.mark.parametrize("kind", ["retinanet", "reppoints", "faster_rcnn"])
def test_gradients_reach_everything(base, kind):
    torch.manual_seed(0)
    method = fastmkd.DenseKD(detector(kind), teacher_of(kind), base=base, logits_weight=1.0)
    method.set_epoch(1)
    out = method(*batch())
    out.loss.backward()
    assert {"base", "logits"} < set(out.terms)
    assert out.loss.isfinite()
    missing = [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    student = method.release()
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("base", ["mgd", "fgd", DPKFGD(ratio=0.5, **SMALL_DPK), "fitnet", "cwd"])
def test_heads_are_of_the_student_s_dtype(base):
    torch.manual_seed(0)
    method = fastmkd.DenseKD(detector().double(), teacher_of().double(), base=base)
    assert {p.dtype for p in method.parameters()} == {torch.float64}
    out = method(*batch(dtype=torch.float64))
    out.loss.backward()
    assert out.terms["base"].isfinite()


@pytest.mark.parametrize("base", ["mgd", "fitnet", "cwd"])
def test_segmenters_and_classifiers(base):
    method = fastmkd.DenseKD(Segmenter(), Segmenter((4, 8, 8, 12), seed=1), base=base)
    out = method(torch.rand(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64)))
    out.loss.backward()
    assert sorted(out.terms) == ["base", "ce"]
    narrow = {"num_classes": 5, "layers": (1, 1, 1, 1), "channels": (4, 4, 8, 8)}
    nets = [timm.create_model("resnet18", **narrow) for _ in range(2)]
    out = fastmkd.DenseKD(*nets, base=base, image_size=64)(torch.rand(2, 3, 64, 64), torch.tensor([1, 2]))
    out.loss.backward()


class Padding(Segmenter):
    """Takes any size, as `fastmkd.nn.segmenters` makes them: pads for its encoder, cuts its answer."""

    def forward(self, images):
        height, width = images.shape[2:]
        return super().forward(F.pad(images, (0, -width % 32, 0, -height % 32)))[..., :height, :width]


@pytest.mark.parametrize("kind", ["mkd", "dense"])
def test_logits_of_a_segmenter_that_pads_are_compared_on_the_image(kind):
    torch.manual_seed(0)
    nets, options = (Padding(), Padding((4, 8, 8, 12), seed=1)), {"logits_weight": 1.0, "logits_temperature": 2.0}
    method = (
        fastmkd.MKD(*nets, mask_ratio=0.0, **SMALL, **options) if kind == "mkd" else fastmkd.DenseKD(*nets, **options)
    )
    images = torch.rand(2, 3, 60, 50)
    out = method(images, torch.randint(0, 3, (2, 60, 50)))
    with torch.no_grad():
        teacher = method.teacher(F.pad(images, (0, 14, 0, 4)))[..., :60, :50]
    expected = channel_logit_loss(out.student_output, teacher, 2.0)
    torch.testing.assert_close(out.terms["logits"], expected.detach())
    nets[1].segmentation_head[0] = torch.nn.Conv2d(8, 4, 1)
    with pytest.raises(ValueError, match=r"logits have shape \(2, 3, 60, 50\) but the teacher's \(2, 4, 60, 50\)"):
        method(images, torch.randint(0, 3, (2, 60, 50)))


def test_refused():
    with pytest.raises(ValueError, match="base is 'fdg'; available are 'mgd', 'fgd', 'dpk', 'fitnet', 'cwd'"):
        make("fdg")
    with pytest.raises(ValueError, match="needs the boxes of a detector, but these are for segmentation"):
        fastmkd.DenseKD(Segmenter(), Segmenter(seed=1), base="fgd")
    with pytest.raises(ValueError, match="weight is -1"):
        make("mgd", weight=-1)
    with pytest.raises(ValueError, match="logits_temperature is 0"):
        make("mgd", logits_temperature=0)
    with pytest.raises(ValueError, match="mask_ratio is 1"):
        MGD(mask_ratio=1.0)
