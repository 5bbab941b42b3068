"""A loss or gradient that is NaN or infinite: stop, or leave the update out, count it, keep its batch, and go on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fastmkd.train.engine import Trainer, train
from fastmkd.train.errors import UserError
from fastmkd.train.recipe import load_recipe

# Batch norm, whose running statistics a bad batch spoils before its loss is known; two batches an update, EMA.
NORMED = ["--student.name=test_resnet", "--student.kwargs={}", "--data.image_size=32", "--optim.accumulate=2"]
NORMED += ["--data.batch_size=8", "--ema.decay=0.9", "--run.log_every=2"]


@pytest.fixture
def bad_updates(monkeypatch):
    """Numbers of the updates, from 1, whose second batch holds a NaN."""
    numbers: set[int] = set()
    original = Trainer.finished

    def finished(self, batch, step, micro):
        images, targets = original(self, batch, step, micro)
        if step + 1 in numbers and micro == 1:
            images = images.index_fill(0, torch.tensor([3]), float("nan"))
        return images, targets

    monkeypatch.setattr(Trainer, "finished", finished)
    return numbers


def run(name: str, *options: str, skip: int = 0):
    extra = [f"--name={name}", f"--optim.skip_nonfinite={skip}", *options]
    return train(load_recipe("teacher.yaml", [*NORMED, "--schedule.epochs=2", *extra]))


def weights(name: str) -> dict[str, torch.Tensor]:
    return load_file(Path("runs") / name / "model.safetensors")


def kept(name: str) -> str:
    with safe_open(Path("runs") / name / "bad_batch_0.safetensors", "pt") as file:
        assert int(file.get_tensor("images").isnan().any((1, 2, 3)).sum()) == 1
        return str(file.metadata()["update"])


def test_without_leave_the_run_stops(recipes, bad_updates):
    bad_updates.add(3)
    with pytest.raises(
        UserError, match=r"not finite .*The batch of update 3 is in runs/stops/bad_batch_0\.safetensors"
    ):
        run("stops")
    assert kept("stops") == "3"


def test_bad_updates_change_nothing_and_are_counted(recipes, bad_updates, capsys):
    bad_updates.update({2, 7})
    result = run("skips", skip=2)
    assert result["skipped_updates"] == 2
    assert all(value.isfinite().all() for value in weights("skips").values())
    assert kept("skips") == "2"
    said = " ".join(capsys.readouterr().out.split())
    assert "update 2 of 8 is not finite. The batch of update 2 is in runs/skips/bad_batch_0.safetensors. It was" in said
    assert "update 7 of 8 is not finite. It was left out, number 2 of at most 2." in said


def test_one_more_than_allowed_stops_it(recipes, bad_updates):
    bad_updates.update({2, 3, 5})
    with pytest.raises(
        UserError, match=r"update 5 of 8 is not finite. 3 updates were not, more than optim.skip_nonfin"
    ):
        run("many", skip=2)
    assert list((Path("runs") / "many" / "checkpoints").glob("step_*"))  # of the first epoch, and whole


def test_a_bad_gradient_of_a_good_loss(recipes, monkeypatch):
    before = {}
    original = Trainer._update

    def update(self, batches, meter):
        step, weight = self.step, self.parameters[0]
        hook = weight.register_hook(lambda grad: grad * float("inf")) if step == 4 else None
        state = {key: value.clone() for key, value in self.setup.method.state_dict().items()}
        original(self, batches, meter)
        if hook is not None:
            hook.remove()
            before.update(state)
            after = self.setup.method.state_dict()
            assert all(torch.equal(after[key], value) for key, value in state.items())  # running statistics too

    monkeypatch.setattr(Trainer, "_update", update)
    assert run("gradient", skip=1)["skipped_updates"] == 1
    assert any("running_mean" in key for key in before)


def test_leave_alone_changes_no_bit_and_a_resumed_run_counts_on(recipes, bad_updates, monkeypatch):
    run("plain")
    assert run("leave", skip=5)["skipped_updates"] == 0
    for key, value in weights("plain").items():
        assert torch.equal(value, weights("leave")[key]), key
    bad_updates.update({2, 6})
    assert run("whole", skip=2)["skipped_updates"] == 2
    original = Trainer._update

    def update(self, batches, meter):
        if self.step == 4:
            raise KeyboardInterrupt
        original(self, batches, meter)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", update)
        with pytest.raises(KeyboardInterrupt):
            run("again", skip=2)
    assert run("again", skip=2)["skipped_updates"] == 2
    for key, value in weights("whole").items():
        assert torch.equal(value, weights("again")[key]), key


def test_batches_that_a_method_leaves_out_are_counted_and_said(recipes, bad_updates, capsys, monkeypatch):
    bad_updates.update({1, 3})
    options = ["--method.init_args.strategy=random", "--data.batch_size=8", "--optim.accumulate=2", "--name=out"]
    recipe = load_recipe("student.yaml", [*options, "--schedule.epochs=2", "--run.save_every=1"])
    with pytest.warns(UserWarning, match="has images with NaN or infinity; the batch is skipped"):
        result = train(recipe)
    assert (result["skipped_batches"], result["skipped_updates"]) == (2, 0)
    assert "2 batches were left out, whose images" in " ".join(capsys.readouterr().out.split())
    assert all(value.isfinite().all() for value in weights("out").values())

    trained = Trainer._train_epoch
    crashing = load_recipe("student.yaml", [*options[:-1], "--name=again", "--schedule.epochs=2", "--run.save_every=1"])

    def first_only(self, epoch, *rest):
        if epoch:
            raise KeyboardInterrupt
        trained(self, epoch, *rest)

    monkeypatch.setattr(Trainer, "_train_epoch", first_only)
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="NaN"):
        train(crashing)
    monkeypatch.setattr(Trainer, "_train_epoch", trained)
    assert train(crashing)["skipped_batches"] == 2  # those before the crash
