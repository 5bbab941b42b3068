"""Ranks of a run choose backends alike, whatever each of them knew before; the CPU goes for a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fresh
import pytest

from fastmkd.ops import registry
from fastmkd.train import engine
from fastmkd.train.recipe import load_recipe

RECIPE = """
name: short
data: {name: digits, batch_size: 8, limit: 16, eval_batch_size: 180}
student: {kwargs: {patch_size: 2, embed_dim: 12, depth: 1, num_heads: 3}}
method: {class_path: fastmkd.DMAE, init_args: {decoder_depth: 1, decoder_width: 12, decoder_heads: 3}}
schedule: {epochs: 1, warmup_epochs: 0}
run: {tensorboard: false, device: cpu, panels: 0}
"""

WORKER = """
import dataclasses, json, os
from types import SimpleNamespace
import torch
import torch.distributed as dist
from fastmkd.ops import OPS, cache, choice, verdicts
from fastmkd.ops.registry import Backend

rank, key = int(os.environ["RANK"]), "select_tokens/float32/4^2"
dist.init_process_group("gloo")
models = ["some-gpu", "some-gpu"]
cache.device_name = lambda device: models[rank]
choice.lead = verdicts.lead = lambda args: SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
choice._capturing = lambda device: False
tried = []


def run(*args):
    tried.append(None)
    return OPS["select_tokens"].reference(*args)


def timed(candidate, args):
    raise AssertionError("ranks would measure different times")


choice._seconds = timed
op = OPS["select_tokens"]
op = dataclasses.replace(
    op,
    samples=lambda device, dtype: OPS["select_tokens"].samples("cpu", dtype),
    backends={"eager": op.backends["eager"], "triton": Backend("triton", run, "cuda", (torch.float32,))},
)


def attempt(case, known):
    "What a rank chooses that starts with what it knows, on disk and in memory."
    os.environ["FASTMKD_CACHE"] = f"{case}.{rank}"
    cache._known.clear()
    for name, value in known[rank].items():
        cache.remember(models[rank], name, value)
    tried.clear()
    choice._chosen[(models[rank], "select_tokens", "float32", "4^2")] = "chosen before the ranks met"
    choice.prepare(torch.device("cuda"))
    name = choice.choose(op, (torch.rand(2, 12), 3, 1, 12, 1, 12)).name
    found = {"chosen": name, "tried": len(tried), "disk": cache._read(models[rank])}
    with open(f"{case}.{rank}.json", "w") as file:
        json.dump(found, file)


pair = "select_tokens/triton"
attempt("verdicts", [{pair: False}, {pair: True}])
attempt("choices", [{pair: True, key: "eager"}, {pair: True, key: "triton"}])
attempt("one_knows", [{}, {pair: False}])
models[1] = "other-gpu"
attempt("models", [{pair: True}, {pair: False}])
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("choices")
    (path / "worker.py").write_text(WORKER)
    done = fresh.run_ranks(path / "worker.py", folder=path)
    assert [one.returncode for one in done] == [0, 0], done[0].stderr[-4000:] + done[1].stderr[-4000:]
    return path


def found(folder: Path, case: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{case}.{rank}.json").read_text()) for rank in range(2)]


def test_all_begin_with_what_the_first_knows(folder: Path) -> None:
    for case in ("verdicts", "choices"):
        assert [(rank["chosen"], rank["tried"]) for rank in found(folder, case)] == [("eager", 0)] * 2


def test_what_the_first_does_not_know_each_finds_out_and_nothing_is_measured(folder: Path) -> None:
    ranks = found(folder, "one_knows")
    assert [rank["chosen"] for rank in ranks] == ["triton"] * 2
    assert ranks[0]["tried"] == ranks[1]["tried"] > 0


def test_one_with_another_gpu_model_keeps_what_it_knows(folder: Path) -> None:
    assert [(rank["chosen"], rank["tried"]) for rank in found(folder, "models")] == [("triton", 0), ("eager", 0)]


def test_what_another_rank_knew_is_not_written_to_disk(folder: Path) -> None:
    assert found(folder, "choices")[1]["disk"]["choices"] == {"select_tokens/float32/4^2": "triton"}


def test_training_prepares_before_any_op_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    choose, assemble = registry.choice.choose, engine.assemble

    def assembled(*args: Any) -> Any:
        setup = assemble(*args)
        events.clear()  # what a method asks its networks when it is made, it asks on the CPU
        return setup

    monkeypatch.setattr(engine, "assemble", assembled)
    monkeypatch.setattr(engine, "prepare", lambda device: events.append(f"prepare {device}"))
    monkeypatch.setattr(registry.choice, "choose", lambda op, args: events.append("op") or choose(op, args))
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RECIPE)
    engine.train(load_recipe("run.yaml", []))
    assert events[0] == "prepare cpu"
    assert "op" in events
    assert events.count("prepare cpu") == 1
