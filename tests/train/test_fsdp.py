"""FSDP2 on two processes does what DDP does, to rounding, and their checkpoints are of one kind."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import fresh
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastmkd.methods.supervised import Supervised
from fastmkd.train.build import trained_student
from fastmkd.train.commands import evaluate
from fastmkd.train.errors import UserError
from fastmkd.train.rundir import RunDir
from fastmkd.train.sharding import name_units, settle_sharding, shard_teacher

TEACHER = """
name: teacher
data: {name: digits, batch_size: 16, limit: 64, eval_batch_size: 100}
student: {kwargs: {patch_size: 2, embed_dim: 12, depth: 1, num_heads: 3}}
schedule: {epochs: 1, warmup_epochs: 0}
run: {tensorboard: false, device: cpu}
"""

STUDENT = """
name: student
data: {name: digits, batch_size: 8, limit: 64, eval_batch_size: 100}
student: {kwargs: {patch_size: 2, embed_dim: 12, depth: 2, num_heads: 3}}
teacher: {recipe: teacher.yaml}
method: {class_path: fastmkd.MaskedKD, init_args: {keep_ratio: 0.5}}
optim: {accumulate: 2, clip_grad: 0.5, layer_decay: 0.8}
schedule: {epochs: 3, warmup_epochs: 0.5}
augment: {mixup: 0.8}
ema: {decay: 0.9}
run: {tensorboard: false, device: cpu, log_every: 1, save_every: 3, keep: 9}
"""

# Batch norm's statistics are not split. Of the 359 test pictures rank 0 takes 180, two batches, and rank 1 takes one.
CNN = """
name: cnn
data: {name: digits, batch_size: 16, limit: 64, eval_batch_size: 179}
student: {name: resnet18, kwargs: {layers: [1, 1, 1, 1], channels: [4, 4, 8, 8]}}
optim: {clip_grad: 0.5}
schedule: {epochs: 3, warmup_epochs: 0.5}
ema: {decay: 0.9}
run: {tensorboard: false, device: cpu, log_every: 1}
"""

# Pre-training is tested in forward passes of the split method, two of them on rank 0 and one on rank 1.
# Plain SGD: the bias of a block's keys has no gradient but rounding, which AdamW would make into whole steps.
DMAE = """
name: dmae
data: {name: digits, batch_size: 16, limit: 64, eval_batch_size: 179}
student: {kwargs: {patch_size: 2, embed_dim: 12, depth: 2, num_heads: 3}}
teacher: {recipe: teacher.yaml}
method: {class_path: fastmkd.DMAE, init_args: {decoder_depth: 2, decoder_width: 8, decoder_heads: 2}}
optim: {name: sgd, lr: 0.1, lr_images: null}
schedule: {epochs: 3, warmup_epochs: 0.5}
run: {tensorboard: false, device: cpu, log_every: 1, panels: 0}
"""

WORKER = """
import json, os
from pathlib import Path
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from fastmkd.train.engine import Trainer, train
from fastmkd.train.commands import evaluate
from fastmkd.train.errors import UserError
from fastmkd.train.recipe import load_recipe

torch.set_num_threads(1)
run_all = Trainer.run_all


def count(tensors):
    return sum(t.to_local().numel() if isinstance(t, DTensor) else t.numel() for t in tensors)


def record(self, interrupts):
    result = run_all(self, interrupts)
    facts = {
        "whole": sum(p.numel() for p in self.parameters),
        "weights": count(self.parameters),
        "moments": count(s["exp_avg"] for s in self.optimizer.optimizer.state.values() if "exp_avg" in s),
        "ema": count(self.ema.module.parameters()) if self.ema is not None else None,
        "units": sum(isinstance(module, FSDPModule) for module in self.method.modules()),
        "teacher": count(self.setup.teacher.blocks.parameters()) if self.setup.teacher is not None else None,
    }
    Path(f"{self.recipe.name}.{os.environ['RANK']}.json").write_text(json.dumps(facts))
    return result


Trainer.run_all = record


def run(name, *options, recipe="student.yaml", **fsdp):
    for key in [key for key in os.environ if "FSDP" in key]:
        del os.environ[key]
    if fsdp:
        os.environ.update({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **fsdp})
    return train(load_recipe(recipe, [f"--name={name}", *options]))


ONE = {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}
BLOCKS = {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
random = ["--student.kwargs.drop_path_rate=0.2", "--student.kwargs.proj_drop_rate=0.1"]
run("ddp")
run("blocks", **BLOCKS)
run("teacher_ddp", "--run.shard_teacher=true")
run("teacher_blocks", "--run.shard_teacher=true", "--schedule.epochs=1", **BLOCKS)
run("ddp_random", *random)
run("one_random", *random, **ONE)
run("ddp_bf16", "--run.precision=bf16")
run("one_bf16", "--run.precision=bf16", **ONE)
run("cnn_ddp", recipe="cnn.yaml")
run("cnn_one", recipe="cnn.yaml", **ONE)
run("dmae_ddp", recipe="dmae.yaml")
run("dmae_blocks", recipe="dmae.yaml", **BLOCKS)
probe = ["--method=Supervised", "--method.linear_probe=true", "--method.batch_norm=true"]
run("probe_ddp", *probe, recipe="cnn.yaml")
run("probe_one", *probe, recipe="cnn.yaml", **ONE)
middle = "--run.resume=runs/{}/checkpoints/step_00000003"
run("blocks_again", middle.format("blocks"), **BLOCKS)
run("ddp_to_blocks", middle.format("ddp"), **BLOCKS)
run("blocks_to_ddp", middle.format("blocks"))
try:
    run("deeper", middle.format("blocks"), "--student.kwargs.depth=3", **BLOCKS)
except UserError as error:
    Path(f"deeper.{os.environ['RANK']}.txt").write_text(str(error))
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have trained everything above."""
    path = tmp_path_factory.mktemp("fsdp")
    recipes = {"teacher.yaml": TEACHER, "student.yaml": STUDENT, "cnn.yaml": CNN, "dmae.yaml": DMAE}
    for name, text in {**recipes, "worker.py": WORKER}.items():
        (path / name).write_text(text)
    ranks = fresh.run_ranks(path / "worker.py", folder=path, CUDA_VISIBLE_DEVICES="")
    assert [done.returncode for done in ranks] == [0, 0], [done.stderr[-4000:] for done in ranks]
    return path


def assert_same_run(folder: Path, expected: str, actual: str) -> None:
    """Final weights, checkpoints, losses and scores agree to rounding."""
    runs = folder / "runs"
    names = [path.relative_to(runs / actual) for path in (runs / actual).rglob("*.safetensors")]
    assert any("checkpoints" in path.parts for path in names)
    for name in names:
        ours, theirs = load_file(runs / actual / name), load_file(runs / expected / name)
        # Panels are maps that such weights give, from 0 to 1, in half precision.
        close = {"rtol": 1e-3, "atol": 1e-4} if name.parts[0] == "panels" else {}
        torch.testing.assert_close(ours, theirs, **close, msg=lambda text, name=name: f"{name}: {text}")
        state = name.parent / "state.json"
        if (runs / actual / state).exists():
            states = [json.loads((runs / run / state).read_text())["state"] for run in (expected, actual)]
            came_from = [state.pop("from") for state in states]  # runs that another's checkpoint began say so
            assert [origin is None for origin in came_from] == [True, "_to_" not in actual]
            assert states[0] == states[1]
    tables = []
    for run in (expected, actual):
        with (runs / run / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        tables.append({(r["step"], r["name"]): float(r["value"]) for r in rows if r["name"] != "images_per_second"})
    assert tables[1].keys() <= tables[0].keys()
    assert sum(name == "train.loss" for _, name in tables[1]) >= 3
    for key, value in tables[1].items():
        assert value == pytest.approx(tables[0][key], rel=1e-5), key


def facts(folder: Path, run: str) -> list[dict[str, int]]:
    return [json.loads((folder / f"{run}.{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        ("ddp", "blocks"),
        ("ddp", "teacher_ddp"),
        ("ddp_random", "one_random"),
        ("ddp_bf16", "one_bf16"),
        ("dmae_ddp", "dmae_blocks"),
        ("probe_ddp", "probe_one"),
    ],
)
def test_it_trains_as_ddp_does(folder, expected, actual):
    assert_same_run(folder, expected, actual)


def test_batch_norm_and_uneven_tests(folder, capsys):
    """Weights and statistics are those of DDP, and what is tested on every process is what is saved."""
    for name in ("method", "ema", "optimizer"):
        path = f"checkpoints/step_00000006/{name}.safetensors"
        torch.testing.assert_close(load_file(folder / "runs/cnn_one" / path), load_file(folder / "runs/cnn_ddp" / path))
    result = json.loads((folder / "runs/cnn_one/result.json").read_text())
    assert evaluate([str(folder / "runs/cnn_one")]) == 0
    assert f"loss {result['loss']:.4f}  on 359 pictures" in capsys.readouterr().out


def test_pre_training_is_tested_on_all_pictures(folder):
    result = json.loads((folder / "runs/dmae_blocks/result.json").read_text())
    assert result["images"] == 359
    assert "decoder.mask_token" in load_file(folder / "runs/dmae_blocks/heads.safetensors")


@pytest.mark.parametrize(("run", "units"), [("blocks", 3), ("one_random", 1), ("cnn_one", 1)])
def test_each_process_holds_its_part(folder, run, units):
    found = facts(folder, run)
    for kind in ("weights", "moments", "ema"):
        assert sum(fact[kind] for fact in found) == found[0]["whole"], kind
        assert max(fact[kind] for fact in found) < 0.7 * found[0]["whole"], kind
    assert [fact["units"] for fact in found] == [units, units]
    assert all(fact["weights"] == fact["whole"] and not fact["units"] for fact in facts(folder, "ddp"))


@pytest.mark.parametrize("run", ["teacher_ddp", "teacher_blocks"])
def test_each_process_holds_its_part_of_a_split_teacher(folder, run):
    whole = facts(folder, "ddp")[0]["teacher"]
    parts = [fact["teacher"] for fact in facts(folder, run)]
    assert sum(parts) == whole
    assert max(parts) < 0.7 * whole


def test_a_teacher_without_blocks_is_not_split():
    for teacher, said in ((None, "there is none"), (nn.Linear(2, 2), "Linear has no blocks")):
        with pytest.raises(UserError, match=rf"run\.shard_teacher .* {said}"):
            shard_teacher(teacher, torch.device("cpu"))


def test_resume_is_exact(folder):
    ours, theirs = (load_file(folder / "runs" / run / "model.safetensors") for run in ("blocks_again", "blocks"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    steps = sorted(path.name for path in (folder / "runs/blocks_again/checkpoints").iterdir())
    assert steps == ["step_00000004", "step_00000006"]  # it did go on from update 3, in the middle of an epoch


@pytest.mark.parametrize("run", ["ddp_to_blocks", "blocks_to_ddp"])
def test_a_checkpoint_of_one_kind_goes_on_as_the_other(folder, run):
    assert_same_run(folder, "ddp", run)


def test_a_checkpoint_without_some_of_the_weights_is_refused(folder):
    for rank in range(2):
        said = (folder / f"deeper.{rank}.txt").read_text()
        assert "it lacks student.blocks.2" in said


def test_the_student_loads_into_timm(folder, monkeypatch):
    monkeypatch.chdir(folder)
    student, _ = trained_student(RunDir(folder / "runs/blocks"))
    weights = load_file(folder / "runs/blocks/model.safetensors")
    assert list(weights) == sorted(student.state_dict())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"FSDP_VERSION": "1"}, "set fsdp_version 2"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "SIZE_BASED_WRAP"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "FSDP_ACTIVATION_CHECKPOINTING"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS"),
    ],
)
def test_what_does_not_work_is_refused(monkeypatch, settings, sentence):
    from accelerate.utils import DistributedType

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for key, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **settings}.items():
        monkeypatch.setenv(key, value)
    state = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU)
    with pytest.raises(UserError, match=sentence):
        settle_sharding(SimpleNamespace(state=state))


def test_a_method_that_moves_weights_by_itself_is_refused():
    method = Supervised(nn.Linear(2, 2))
    name_units(method)
    method.average = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(UserError, match=r"Supervised moves weights by itself \(average\.weight, average\.bias\)"):
        name_units(method)


def test_cpu_processes_on_a_machine_with_a_gpu_are_told_to_hide_it(monkeypatch):
    from accelerate.utils import DistributedType

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"):
        settle_sharding(SimpleNamespace(state=SimpleNamespace(distributed_type=DistributedType.MULTI_CPU)))


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM"])
def test_other_engines_are_refused(kind):
    from accelerate.utils import DistributedType

    with pytest.raises(UserError, match="fsdp_version 2"):
        settle_sharding(SimpleNamespace(state=SimpleNamespace(distributed_type=DistributedType[kind])))
