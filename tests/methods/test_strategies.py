"""Mask strategies: each picks what it says, on the grid of whoever is masked."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from tiny_vits import TARGETS, full_attention, kl, pictures, tiny

from fastmkd import MaskedKD, MaskedViT
from fastmkd.methods.strategies import STRATEGIES, ExternalSaliency, MaskStrategy, Random, Saliency, Scores
from fastmkd.ops.select_tokens import resize
from fastmkd.reference import masked_vit_forward, masked_vit_saliency


def seen_by_teacher(method: MaskedKD, images: torch.Tensor) -> torch.Tensor:
    """``(B, k)`` what the teacher was given, ascending."""
    seen = []
    vit = method._teacher_vit
    original = vit.forward
    vit.forward = lambda x, keep=None, **options: (seen.append(keep), original(x, keep, **options))[1]
    method(images, TARGETS)
    del vit.forward
    return seen[0].sort(dim=1).values


def best(scores: torch.Tensor, k: int) -> torch.Tensor:
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values


@pytest.mark.parametrize(
    ("strategy", "layer", "queries", "sign"),
    [
        ("saliency", 11, "cls", 1),
        ("bottom", 11, "cls", -1),
        ("patch", 11, "patch", 1),
        ("first", 0, "cls", 1),
        ("middle", 5, "cls", 1),
        (Saliency(layer=3), 3, "cls", 1),
        (Saliency(layer=-2, order="bottom"), 10, "cls", -1),
        (Saliency(layer=4, queries="patch"), 4, "patch", 1),
        ({"class_path": "fastmkd.methods.strategies.Saliency", "init_args": {"layer": "first"}}, 0, "cls", 1),
    ],
)
def test_student_attention(strategy, layer, queries, sign):
    student, images = tiny(0, depth=12).eval(), pictures()
    method = MaskedKD(student, tiny(1), 0.5, strategy=strategy)
    logits = full_attention(student, images, layer)[:, :, :, 1:]
    scores = logits[:, :, 0].softmax(-1).sum(1) if queries == "cls" else logits[:, :, 1:].softmax(-1).sum(1).mean(1)
    assert torch.equal(seen_by_teacher(method, images), best(sign * scores, 8))


@pytest.mark.parametrize("include_prefix", [False, True])
@pytest.mark.parametrize("queries", ["cls", "patch"])
@pytest.mark.parametrize("layer", ["first", 1, "middle", "last", -1, 3])
def test_the_authors_variant_in_every_layer(layer, queries, include_prefix):
    student, images = tiny(0, depth=4, reg_tokens=3).eval(), pictures()
    method = MaskedKD(student, tiny(1), strategy=Saliency(layer, queries), include_prefix=include_prefix)
    logits = full_attention(student, images, {"first": 0, "middle": 1, "last": 3, -1: 3}.get(layer, layer))
    rows = logits[:, :, :1] if queries == "cls" else logits[:, :, 4:]
    shares = rows.softmax(-1)[..., 4:] if include_prefix else rows[..., 4:].softmax(-1)
    expected = (shares.mean(1) if include_prefix else shares.sum(1)).mean(1)
    torch.testing.assert_close(method.patch_scores(images).values.double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(seen_by_teacher(method, images), best(expected, 8))


def test_bottom_is_what_top_leaves():
    student, images = tiny(0).eval(), pictures()
    top = seen_by_teacher(MaskedKD(student, tiny(1), 0.5), images)
    bottom = seen_by_teacher(MaskedKD(student, tiny(2), 0.5, strategy="bottom"), images)
    together = torch.cat((top, bottom), 1).sort(dim=1).values
    assert torch.equal(together, torch.arange(16).expand(3, -1))


def test_random_draws_anew_for_each_image_and_step():
    method = MaskedKD(tiny(0, class_token=False, global_pool="avg"), tiny(1, patch_size=4), 0.25, strategy="random")
    torch.manual_seed(0)
    first, second = seen_by_teacher(method, pictures()), seen_by_teacher(method, pictures())
    assert first.shape == (3, 16)
    assert len({tuple(row) for row in (*first.tolist(), *second.tolist())}) == 6
    torch.manual_seed(0)
    assert torch.equal(seen_by_teacher(method, pictures()), first)
    counts = torch.zeros(64)
    for _ in range(200):
        scores = Random().scores(pictures(), None, (8, 8)).values
        counts += torch.bincount(best(scores, 16).flatten(), minlength=64)
    assert (counts / 600 - 0.25).abs().max() < 0.09  # five standard deviations


def test_external_model_on_another_grid():
    student, teacher, other, images = tiny(0), tiny(1), tiny(2, patch_size=4).train(), pictures()
    method = MaskedKD(student, teacher, 0.5, strategy=ExternalSaliency(other))
    expected = resize(masked_vit_saliency(other.eval(), images).float().view(3, 8, 8), (4, 4)).flatten(1)
    other.train()
    assert torch.equal(seen_by_teacher(method, images), best(expected, 8))
    method(images, TARGETS).loss.backward()
    assert all(p.grad is None for p in other.parameters())
    assert list(method.state_dict()) == ["student." + key for key in student.state_dict()]


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_external_model_of_another_precision(dtypes):
    of_student, of_model = dtypes
    other, images = tiny(2).to(of_model), pictures().to(of_student)
    method = MaskedKD(tiny(0).to(of_student), tiny(1).to(of_student), strategy=ExternalSaliency(other))
    expected = MaskedViT(other)(images.to(of_model), return_saliency=True)[1]
    torch.testing.assert_close(method.patch_scores(images).values, expected)
    assert method(images, TARGETS).loss.isfinite()
    assert next(other.parameters()).dtype == of_model


def test_external_model_in_the_authors_variant():
    other, images = tiny(2), pictures()
    scores = ExternalSaliency(other, include_prefix=True).scores(images, None, (4, 4)).values
    torch.testing.assert_close(scores.double(), masked_vit_saliency(other, images, include_prefix=True))


def test_external_model_by_name(tmp_path):
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 0}
    torch.save(timm.create_model("vit_tiny_patch16_224", **kwargs).state_dict(), tmp_path / "vit.pth")
    choice = {
        "class_path": "fastmkd.methods.strategies.ExternalSaliency",
        "init_args": {"model": "vit_tiny_patch16_224", "weights": str(tmp_path / "vit.pth"), "kwargs": kwargs},
    }
    method = MaskedKD(tiny(0).float(), tiny(1).float(), strategy=choice)
    assert seen_by_teacher(method, pictures().float()).shape == (3, 8)
    with pytest.raises(ValueError, match="without weights"):
        ExternalSaliency("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="no CLS token"):
        ExternalSaliency(tiny(0, class_token=False, global_pool="avg"))


def test_a_strategy_of_one_s_own():
    class Corner(MaskStrategy):
        def scores(self, images, student, grid):
            assert student is not None  # the student ran, whatever the strategy needs of it
            return Scores(torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(len(images), -1), (2, 2))

    method = MaskedKD(tiny(0), tiny(1), 0.25, strategy=Corner())
    assert torch.equal(seen_by_teacher(method, pictures()), torch.tensor([0, 1, 4, 5]).expand(3, -1))


@pytest.mark.parametrize("strategy", ["saliency", "random", "middle"])
def test_masking_the_student(strategy):
    student, teacher, images = tiny(0), tiny(1), pictures()
    method = MaskedKD(student, teacher, 0.5, strategy=strategy, mask="student").train()
    torch.manual_seed(3)
    out = method(images, TARGETS)
    torch.manual_seed(3)
    scores = {
        "saliency": lambda: masked_vit_saliency(student, images),
        "random": lambda: torch.rand(3, 16),
        "middle": lambda: full_attention(student, images, 0)[:, :, 0, 1:].softmax(-1).sum(1),
    }[strategy]()
    logits = masked_vit_forward(student, images, best(scores, 8))
    expected = F.cross_entropy(logits, TARGETS) + kl(logits, masked_vit_forward(teacher, images).detach())
    torch.testing.assert_close(out.loss, expected)
    mine = torch.autograd.grad(out.loss, list(student.parameters()))
    torch.testing.assert_close(mine, torch.autograd.grad(expected, list(student.parameters())))


def test_masked_student_of_another_grid_than_the_teacher():
    method = MaskedKD(tiny(0, patch_size=4), tiny(1), 0.25, mask="student")
    assert method(pictures(), TARGETS).loss.isfinite()
    kept = method.pictures(pictures())[2].image
    assert kept[:, ::4, ::4].sum((1, 2)).tolist() == [16, 16, 16]


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_name_trains_shows_copies_and_pickles(name):
    method = pickle.loads(pickle.dumps(copy.deepcopy(MaskedKD(tiny(0), tiny(1), 0.5, strategy=name).train())))
    method(pictures(), TARGETS).loss.backward()
    assert [key for key, p in method.named_parameters() if p.grad is None] == []
    assert method.pictures(pictures())[2].image[:, ::8, ::8].sum((1, 2)).tolist() == [8, 8, 8]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"layer": "top"}, "layer is 'top'"),
        ({"queries": "all"}, "queries is 'all'"),
        ({"order": "up"}, "order is 'up'"),
    ],
)
def test_refuses_options(options, match):
    with pytest.raises(ValueError, match=match):
        Saliency(**options)


def test_refuses_students_that_cannot_give_it():
    without_cls = tiny(0, class_token=False, global_pool="avg")
    for strategy in ("saliency", "first", "bottom"):
        with pytest.raises(ValueError, match="student has no CLS token"):
            MaskedKD(without_cls, tiny(1), strategy=strategy)
    assert MaskedKD(without_cls, tiny(1), strategy="patch")(pictures(), TARGETS).loss.isfinite()
    with pytest.raises(ValueError, match="layer is 7; the student has the blocks 0 to 1"):
        Saliency(layer=7).needs(MaskedViT(tiny(0)))
