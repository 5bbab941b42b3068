"""Distilling the classifier only: the backbone is frozen and in eval mode (MaskedKD, Appendix C)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from tiny_vits import TARGETS, kl, pictures, tiny

from fastmkd import MaskedKD, MaskedViT
from fastmkd.methods import Supervised
from fastmkd.reference import masked_vit_forward, masked_vit_saliency


@pytest.mark.parametrize("wrap", [lambda model: model, MaskedViT])
def test_only_the_classifier_learns(wrap):
    student, teacher, images = tiny(0, proj_drop_rate=0.5, drop_path_rate=0.5), tiny(1), pictures()
    method = MaskedKD(wrap(student), teacher, 0.5, linear_probe=True).train()
    assert [name for name, p in student.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    assert not student.blocks.training
    assert student.head.training
    assert not method.eval().student.training
    out = method.train()(images, TARGETS)
    keep = masked_vit_saliency(student, images).topk(8, dim=1).indices
    logits = masked_vit_forward(student, images)
    expected = F.cross_entropy(logits, TARGETS) + kl(logits, masked_vit_forward(teacher, images, keep).detach())
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    assert {name for name, p in student.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}
    method.release()
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("wrap", [lambda model: model, MaskedViT])
def test_without_a_teacher(wrap):
    student, images = tiny(0, proj_drop_rate=0.5), pictures()
    method = Supervised(wrap(student), linear_probe=True)
    assert student.head.training
    assert not student.blocks.training
    loss = method.train()(images, TARGETS).loss
    torch.testing.assert_close(loss, F.cross_entropy(masked_vit_forward(student, images), TARGETS))
    loss.backward()
    assert {name for name, p in student.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}
    method.release()
    assert all(p.requires_grad for p in student.parameters())
    with pytest.raises(ValueError, match="linear_probe needs a student with get_classifier"):
        Supervised(torch.nn.Linear(2, 2), linear_probe=True)


def test_no_graph_is_kept_for_the_backbone():
    method = MaskedKD(tiny(0), tiny(1), linear_probe=True).train()
    graph, nodes = [method(pictures(), TARGETS).loss.grad_fn], set()
    while graph:
        node = graph.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            graph += [parent for parent, _ in node.next_functions]
    assert not any("Attention" in node.name() or "LayerNorm" in node.name() for node in nodes)


def test_both_heads_of_a_distilled_student():
    student = tiny(0, VisionTransformerDistilled)
    method = MaskedKD(student, tiny(1), base="g2sd", linear_probe=True).train()
    method(pictures(), TARGETS).loss.backward()
    learnt = {name for name, p in student.named_parameters() if p.grad is not None}
    assert learnt == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


@pytest.mark.parametrize("kind", [VisionTransformer, VisionTransformerDistilled])
def test_batch_norm_before_the_classifier(kind):
    """As written by hand; what is saved or released computes the same without it."""
    student, images = tiny(0, kind), pictures()
    keys, head = list(student.state_dict()), student.head
    method = Supervised(student, linear_probe=True, batch_norm=True).train()
    torch.testing.assert_close(method.eval()(images, TARGETS).student_output, masked_vit_forward(student, images))
    features = student.forward_head(student.forward_features(images), pre_logits=True)
    if kind is VisionTransformer:
        normed = (features - features.mean(0)) / (features.var(0, correction=0) + 1e-6).sqrt()
        logits = method.train()(images, TARGETS).student_output
        torch.testing.assert_close(logits, normed @ head.weight.T + head.bias)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        method.train()(images, TARGETS).loss.backward()
        optimizer.step()
    expected = method.eval()(images, TARGETS).student_output
    bare = method.bare_weights(student.state_dict())
    assert sorted(bare) == sorted(keys)
    assert method.release() is method.release() is student
    assert list(student.state_dict()) == keys
    assert student.head is head
    assert all(torch.equal(value, bare[name]) for name, value in student.state_dict().items())
    torch.testing.assert_close(student.eval()(images), expected)


def test_batch_norm_is_refused_where_it_means_nothing():
    with pytest.raises(ValueError, match="batch_norm is true and linear_probe is not"):
        Supervised(tiny(0), batch_norm=True)
    student = tiny(0)
    student.head = torch.nn.Linear(student.num_features, 3, bias=False)
    with pytest.raises(ValueError, match="batch_norm needs a linear classifier with a bias"):
        Supervised(student, linear_probe=True, batch_norm=True)
    assert all(p.requires_grad for p in student.parameters())
