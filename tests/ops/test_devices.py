"""A device that is not there is refused in one sentence, wherever one is named."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from fastmkd.methods import DistillMethod
from fastmkd.ops.devices import check_device
from fastmkd.train.cli import main


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def one_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


SENTENCE = "--device is cuda, but torch.cuda.is_available() is False here; use --device=cpu."


@pytest.mark.parametrize(
    "command",
    [["check", "select_tokens", "--device=cuda"], ["cka", "runs/a", "runs/b", "--device=cuda"]],
    ids=lambda command: command[0],
)
def test_commands_without_a_gpu(no_gpu, capsys, command):
    try:
        status = main(command)
    except SystemExit as end:  # argparse ends the program by itself
        status = end.code
    assert status == 2
    said = capsys.readouterr().err
    assert said.endswith(f"{SENTENCE}\n")
    assert "Traceback" not in said


def test_a_teacher_without_a_gpu(no_gpu):
    student, teacher = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"^teacher_device is cuda:0, but .* is False here; use teacher_device=cpu\.$"):
        DistillMethod(student, teacher, teacher_device="cuda:0")
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_a_gpu_that_is_there(one_gpu):
    assert check_device("--device", "cuda") == torch.device("cuda")
    assert check_device("--device", torch.device("cuda:0")) == torch.device("cuda:0")


def test_one_gpu_too_far(one_gpu):
    said = "--device is cuda:1, but PyTorch sees 1 GPU here; expected at most cuda:0."
    with pytest.raises(ValueError, match=re.escape(said)):
        check_device("--device", "cuda:1")


def test_no_device_at_all():
    with pytest.raises(ValueError, match=r"^teacher_device is gpu; expected a device of PyTorch, such as cpu, cuda"):
        check_device("teacher_device", "gpu")
