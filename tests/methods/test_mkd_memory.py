"""What MKD keeps of a level for its backward pass: the student's, the rebuilt one and the teacher's, each once."""

from __future__ import annotations

import pytest
import torch
from dense_nets import SMALL, batch, detector, teacher_of

import fastmkd
from fastmkd.bench.cases.mkd_decoder import eager_losses, eager_tokens
from fastmkd.methods.mkd_decoder import AdaptiveDecoder
from fastmkd.methods.mkd_losses import Relation, recover


class Saved:
    """Storages that autograd keeps inside the context, each counted once, by address."""

    def __init__(self):
        self.sizes = {}
        self.alive = []  # an address must not be used again
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda x: x)

    def _keep(self, x):
        storage = x.untyped_storage()
        self.sizes[storage.data_ptr()] = storage.nbytes()
        self.alive.append(storage)
        return x

    def __enter__(self):
        self.hooks.__enter__()
        return self

    def __exit__(self, *reason):
        self.hooks.__exit__(*reason)

    def as_large_as(self, count):
        return sorted(size for size in self.sizes.values() if size >= count)


def level(patch, channels=48, grid=(4, 6), images=3):
    torch.manual_seed(0)
    decoder = AdaptiveDecoder(channels, channels, patch, width=8, depth=1, heads=2)
    shape = (images, channels, grid[0] * patch, grid[1] * patch)
    own, taught = torch.randn(shape, requires_grad=True), torch.randn(shape)
    return decoder, own, taught, torch.rand(images, *grid) > 0.2, grid


@pytest.mark.parametrize("related", [False, True])
@pytest.mark.parametrize("patch", [2, 4])
def test_a_level_is_kept_once_on_each_side(patch, related):
    """The student's own map, rows of the rebuilt one, the teacher's own: nothing normalised or shuffled."""
    decoder, own, taught, visible, grid = level(patch)
    relation = Relation(own.shape[1]) if related else None
    with Saved() as saved:
        recovered = recover(decoder, decoder(own, visible), grid, taught, relation)
    assert recovered.error.requires_grad
    assert saved.as_large_as(own.nbytes // 2) == [own.nbytes] * 3
    assert {x.untyped_storage().data_ptr() for x in (own, taught)} <= saved.sizes.keys()


def test_written_plainly_it_is_kept_many_times():
    """So that the test above can fail."""
    decoder, own, taught, visible, _ = level(4, grid=(4, 4))
    with Saved() as saved:
        eager_losses(decoder, decoder.srm(decoder.norm(decoder.blocks(eager_tokens(decoder, own, visible)))), taught,
                     Relation(own.shape[1]))  # fmt: skip
    assert len(saved.as_large_as(own.nbytes // 2)) >= 6


def test_all_levels_of_a_detector():
    """The whole method: of both pyramids their maps and no copy; of the rebuilt ones a set of rows each."""
    method = fastmkd.MKD(detector(out=32), teacher_of(out=48), mask_ratio=0.3, **SMALL)
    images, targets = batch()
    with method._backbone.masking(method.draw) as sight:
        seen = method.watch_student(images, targets, sight)
    taught = method.ask_teacher(seen.images)
    given = {x.untyped_storage().data_ptr() for x in [*taught.maps.values(), *method.parameters()]}
    with Saved() as saved:
        feat, related = method._level_losses(seen.levels.maps, taught.maps, sight)
    assert feat.requires_grad
    assert related.requires_grad
    finest = method.levels[0]
    cells, rows = seen.levels.maps[finest.name].nbytes, taught.maps[finest.teacher].nbytes
    relations = method.heads["relations"]
    batched = 2 * len(relations) * relations[0].student.transform[0].weight.nbytes  # of all context blocks
    assert sorted(size for address, size in saved.sizes.items() if address not in given and size >= cells) == sorted(
        [cells, rows, batched, batched]
    )
    assert all(x.untyped_storage().data_ptr() in saved.sizes for x in taught.maps.values())
