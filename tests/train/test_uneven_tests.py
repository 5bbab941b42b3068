"""Test pictures that do not divide evenly over processes, or cannot be read, when a method is tested by its loss.

Where a method's weights are split, each forward pass needs all processes; so all must run equally many, and sum the
same numbers. Here the processes run one after another, and what they would have to agree on is compared.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace

import fresh
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from fastmkd.methods import DistillOutput
from fastmkd.methods.moco import MoCoV3
from fastmkd.train.evaluate import evaluate_loss
from fastmkd.train.loading import Loader
from fastmkd.train.over_training import Snapshots
from fastmkd.train.pictures import FilePictures, TensorPictures
from fastmkd.train.schema import DataRecipe
from fastmkd.train.seeds import counter_seed

CPU = torch.device("cpu")


def write_pictures(folder: Path, count: int, bad: tuple[int, ...] = ()) -> list[Path]:
    """Picture n is all of grey n + 1; the bad ones are no pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        Image.fromarray(np.full((8, 8, 3), number + 1, dtype=np.uint8)).save(path)
        if number in bad:
            path.write_bytes(b"no picture")
    return paths


class Seen(nn.Module):
    """Says what it saw; its loss is the mean grey, and NaN of a picture that must not count."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[list[float], int]] = []

    def forward(self, images: Tensor, targets: Tensor) -> DistillOutput:
        greys = images[:, 0, 0, 0]
        self.calls.append((greys.tolist(), torch.initial_seed()))
        loss = greys.mean() if greys.all() else torch.tensor(torch.nan)
        return DistillOutput(loss, {"twice": 2 * loss, "seven": torch.tensor(7.0)}, None)


def as_floats(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return images.float(), targets


def run_tests(pictures, count: int, world: int, size: int = 2, workers: int = 0):
    """Tests on each process in turn; returns the method of each, what each sums, and the scores that come out."""
    recipe = DataRecipe(batch_size=size, workers=workers)
    methods, scores = [], {}
    sums: list[Tensor] = []

    def reduce(values: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        sums.append(values)
        return torch.stack(sums).sum(0)  # refuses those of different shapes

    for rank in range(world):
        accelerator = SimpleNamespace(
            process_index=rank, num_processes=world, device=CPU, autocast=contextlib.nullcontext, reduce=reduce
        )
        methods.append(Seen())
        loader = Loader(pictures, recipe, None, 8, CPU, seed=3)
        scores = evaluate_loss(methods[-1], loader, as_floats, count, size, accelerator, seed=3)
    return methods, sums, scores


@pytest.mark.parametrize(
    ("count", "world", "bad"),
    [
        (9, 2, ()),
        (9, 2, (8,)),  # the whole last batch of rank 0, which is one longer than rank 1's
        (9, 2, (5, 7)),  # a whole batch of rank 1, which then still has a blank one to come
        (9, 2, (1, 3, 5, 7)),  # all of rank 1
        (9, 2, tuple(range(9))),
        (2, 3, ()),  # nothing for rank 2
        (3, 4, (0,)),
        (5, 1, (0, 1)),
    ],
)
def test_all_processes_run_as_many_passes_and_sum_the_same_numbers(tmp_path, count, world, bad):
    pictures = FilePictures(write_pictures(tmp_path, count, bad), torch.zeros(count, dtype=torch.int64))
    methods, sums, scores = run_tests(pictures, count, world)
    readable = [number + 1 for number in range(count) if number not in bad]
    assert len({len(method.calls) for method in methods}) == 1
    assert {values.shape for values in sums} == {(4,)}  # loss, two terms, count
    assert scores["images"] == len(readable)
    if readable:
        mean = sum(readable) / len(readable)
        assert scores == pytest.approx({"loss": mean, "twice": 2 * mean, "seven": 7, "images": len(readable)})
    seen = [grey for method in methods for greys, _ in method.calls for grey in greys]
    assert sorted(grey for grey in seen if grey) == readable  # each once
    for rank, method in enumerate(methods):  # a bad picture does not move what is drawn for the batches behind it
        assert [seed for _, seed in method.calls] == [
            counter_seed(3, "test", number, rank) for number in range(len(method.calls))
        ]


def test_pictures_in_memory_and_in_workers_are_tested_alike(tmp_path):
    greys = torch.arange(1, 4, dtype=torch.uint8)[:, None, None, None].expand(3, 1, 8, 8).contiguous()
    methods, sums, scores = run_tests(TensorPictures(greys, torch.zeros(3, dtype=torch.int64)), 3, world=5)
    assert [len(method.calls) for method in methods] == [1] * 5
    assert {values.shape for values in sums} == {(4,)}
    assert scores == pytest.approx({"loss": 2, "twice": 4, "seven": 7, "images": 3})
    files = FilePictures(write_pictures(tmp_path, 9, bad=(4, 6)), torch.zeros(9, dtype=torch.int64))
    calls = [[method.calls for method in run_tests(files, 9, 2, workers=workers)[0]] for workers in (0, 2)]
    assert calls[0] == calls[1]


def test_a_plan_and_what_is_read_of_it_are_equally_long(tmp_path):
    pictures = FilePictures(write_pictures(tmp_path, 6, bad=(2, 3, 4)), torch.zeros(6, dtype=torch.int64))
    loader = Loader(pictures, DataRecipe(workers=0), None, 8, CPU, seed=0)
    plan = list(torch.arange(6).split(2))
    read = list(loader.planned(plan))
    assert [None if batch is None else batch.numbers.tolist() for batch in read] == [[0, 1], None, [5]]
    assert [batch.numbers.tolist() for batch in loader.batches(plan)] == [[0, 1], [5]]
    assert sorted(loader.bad) == [str(tmp_path / f"{number}.png") for number in (2, 3, 4)]


def test_panels_that_cannot_be_read_still_run_the_method(tmp_path):
    """One process of several, whose disk fails, must not leave the others alone in a forward pass."""
    pictures = FilePictures(write_pictures(tmp_path, 2, bad=(0, 1)), torch.tensor([0, 1]))
    shown: list[torch.Size] = []
    method = SimpleNamespace(has_pictures=True, eval=lambda: None, pictures=lambda images: shown.append(images.shape))
    recipe = SimpleNamespace(schedule=SimpleNamespace(epochs=1), run=SimpleNamespace(panels=1), seed=0)
    source = SimpleNamespace(task="classification", test=pictures, mean=(0.5,) * 3, std=(0.5,) * 3)
    setup = SimpleNamespace(recipe=recipe, method=method, source=source)
    accelerator = SimpleNamespace(autocast=contextlib.nullcontext, is_main_process=True)
    loader = Loader(pictures, DataRecipe(workers=0), None, 8, CPU, seed=0)
    run = SimpleNamespace(panels=tmp_path / "panels")
    Snapshots(setup, run, loader, as_floats, accelerator).take(1)
    assert shown == [(1, 3, 8, 8)]
    assert not run.panels.exists()


def test_moco_is_tested_on_its_own_keys(monkeypatch):
    """Batches of a test differ in length between processes; gathering keys would then never end."""
    import torch.distributed as dist

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(dist, "get_rank", lambda *_: 1)
    gathered = []

    def gather(parts, mine):
        gathered.append(len(mine))
        for part in parts:
            part.copy_(mine)

    monkeypatch.setattr(dist, "all_gather", gather)
    vit = timm.create_model("vit_tiny_patch16_224", patch_size=4, img_size=8, embed_dim=12, depth=1, num_heads=3)
    method = MoCoV3(vit, hidden=8, out_features=4)
    images = torch.rand(3, 3, 8, 8)
    method.train()(images)
    assert gathered == [3, 3]
    with torch.no_grad():
        assert method.eval()(images).loss.isfinite()
    assert gathered == [3, 3]


WORKER = """
import os, sys
os.environ.update({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": sys.argv[1]})
import torch
from fastmkd.train.engine import train
from fastmkd.train.recipe import load_recipe

result = train(load_recipe("dmae.yaml"))
assert result["images"] == 6, result
assert len(result["bad_pictures"]) == 3, result
assert result["loss"] == result["loss"], result
torch.distributed.destroy_process_group()
"""

DMAE = """
name: dmae
data: {name: imagefolder, root: set, image_size: 8, batch_size: 2, eval_batch_size: 2, workers: 0}
student: {kwargs: {patch_size: 2, embed_dim: 12, depth: 1, num_heads: 3}}
method: {class_path: fastmkd.DMAE, init_args: {decoder_depth: 1, decoder_width: 8, decoder_heads: 2}}
schedule: {epochs: 1, warmup_epochs: 0}
run: {tensorboard: false, device: cpu, panels: 2}
"""


def test_two_processes_with_split_weights_and_unreadable_batches(tmp_path):
    """Each would wait for the other until the time is over."""
    write_pictures(tmp_path / "set/train/cat", 4)
    write_pictures(tmp_path / "set/val/cat", 9, bad=(8, 5, 7))
    (tmp_path / "dmae.yaml").write_text(DMAE)
    (tmp_path / "worker.py").write_text(WORKER)
    ranks = fresh.run_ranks(
        tmp_path / "worker.py", "TRANSFORMER_BASED_WRAP", folder=tmp_path, timeout=100, CUDA_VISIBLE_DEVICES=""
    )
    assert [done.returncode for done in ranks] == [0, 0], [done.stderr[-4000:] for done in ranks]
