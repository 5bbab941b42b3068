"""Killed at every system call of a checkpoint write, full disks, closed folders, two runs at once: nothing is lost."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import io
import json
import os
import random
import resource
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import forks
import pytest
import torch
from safetensors.torch import load_file

from fastmkd.train import cli
from fastmkd.train.checkpoint import atomic_write, load_checkpoint, newest_checkpoint, save_checkpoint, save_tensors
from fastmkd.train.engine import train
from fastmkd.train.errors import UserError
from fastmkd.train.recipe import load_recipe
from fastmkd.train.rundir import RunDir


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def save(folder: Path, step: int, number: int, keep: int = 2) -> None:
    """A checkpoint that is full of `number`."""
    tensors = {
        "method": {"weight": torch.full((40, 30), float(number)), "bias": torch.full((7,), float(number))},
        "optimizer": {"moment": torch.full((40, 30), float(number))},
    }
    save_checkpoint(folder, step, tensors, {"number": number}, keep)


def newest(folder: Path) -> int:
    """What the newest checkpoint is full of; it must be whole, and so must all that are there."""
    found, problems = newest_checkpoint(folder)
    assert found is not None
    assert not problems
    number = found.state["number"]
    assert sorted(found.tensors) == ["method", "optimizer"]
    for tensors in found.tensors.values():
        for value in tensors.values():
            assert (value == number).all()
    return number


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusal(call: Callable[[], object]) -> str:
    """The sentence with which a call is refused; "" if it is not."""
    try:
        call()
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("same_step", [False, True])
def test_killed_at_system_calls_of_a_save(tmp_path, same_step, every):
    """Each child finds what the killed one before it has left; `same_step` replaces a checkpoint by another."""
    number = 1
    save(tmp_path, 1, number)

    def next_save() -> None:
        save(tmp_path, 1 if same_step else number + 1, number + 1, keep=1)

    points = 0
    for points in forks.killed_at_system_calls(next_save, every):  # noqa: B007
        found = newest(tmp_path)
        assert found in (number, number + 1)
        number = found
    print(f"killed at {points} points")  # the counts of docs/reliability.md
    assert points >= 120 / every
    assert newest(tmp_path) == number + 1
    assert len(visible(tmp_path)) == 1, "the last one was not disturbed and removes what the others have left"


def test_killed_at_random_times(tmp_path):
    def saves() -> None:
        for number in range(newest(tmp_path) + 1, 10**6):
            save(tmp_path, number, number)

    save(tmp_path, 1, 1)
    draw, before = random.Random(0), 1
    for _ in range(30):
        pid = forks.fork(saves)
        wait_for(tmp_path / f"step_{before + 1:08d}")
        time.sleep(draw.uniform(0, 0.02))
        forks.kill(pid)
        assert newest(tmp_path) > before
        before = newest(tmp_path)


def test_killed_at_every_system_call_of_a_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_tensors(path, {"a": torch.zeros(9)})
    old = path.read_bytes()
    points = 0
    for points in forks.killed_at_system_calls(lambda: save_tensors(path, {"a": torch.ones(99)})):  # noqa: B007
        new = path.read_bytes()
        if new != old:
            break
    assert points >= 20
    with RunDir(tmp_path).lock():  # the next run removes what was being written
        assert visible(tmp_path) == ["lock", "model.safetensors"]


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing past this many bytes fails, wherever in a file that is."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_fills_at_any_byte(tmp_path):
    save(tmp_path, 1, 1)
    size = max(path.stat().st_size for path in (tmp_path / "step_00000001").iterdir())
    for room in range(0, size, size // 60):
        with (
            largest_file(room),
            pytest.raises(UserError, match=r"^cannot write .*step_00000002: File too large\. What"),
        ):
            save(tmp_path, 2, 2)
        assert newest(tmp_path) == 1
        assert visible(tmp_path) == ["step_00000001"]
    save(tmp_path, 2, 2)
    assert newest(tmp_path) == 2


def test_every_call_that_can_meet_a_full_disk(tmp_path, monkeypatch):
    """The first, second, third ... of them fails; the error is one sentence and nothing is left behind."""
    save(tmp_path, 1, 1)
    number, fails_at, calls = 1, 0, 0

    def failing(function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*arguments, **options)

        return call

    for fails_at in range(1, 1000):
        calls = 0
        with monkeypatch.context() as patch:
            for module, name in ((os, "mkdir"), (os, "fsync"), (os, "rename"), (io, "open")):
                patch.setattr(module, name, failing(getattr(module, name)))
            said = refusal(functools.partial(save, tmp_path, number + 1, number + 1, keep=1))
        if calls < fails_at:
            assert not said
            break
        assert newest(tmp_path) == number + 1 or said.startswith("cannot write")
        assert not said or "No space left on device. What was there before is whole; make room" in said
        assert newest(tmp_path) in (number, number + 1)
        assert not [name for name in visible(tmp_path) if name.startswith(".") and number == newest(tmp_path)]
        number = newest(tmp_path)
    assert fails_at > 8


def test_a_file_system_that_is_full(tmp_path):
    """A real one of 256 kB, where this process may mount it."""
    library = ctypes.CDLL(None, use_errno=True)
    new_mounts, private = 0x00020000, 1 << 18 | 1 << 14

    def fill() -> None:
        target = os.fsencode(tmp_path)
        if library.unshare(new_mounts) or library.mount(b"none", b"/", None, private, None):
            os._exit(77)
        if library.mount(b"tmpfs", target, b"tmpfs", 0, b"size=256k"):
            os._exit(77)
        save(tmp_path, 1, 1)
        step = 2
        while not (said := refusal(functools.partial(save, tmp_path, step, step, keep=1000))):
            step += 1
        assert "No space left on device" in said
        last = step - 1
        assert newest(tmp_path) == last > 3
        assert visible(tmp_path) == [f"step_{n:08d}" for n in range(1, step)]
        with pytest.raises(UserError, match=r"cannot write .*big.*No space left on device"):
            save_tensors(tmp_path / "big.safetensors", {"a": torch.zeros(100_000)})
        assert "big.safetensors" not in visible(tmp_path)
        shutil.rmtree(tmp_path / "step_00000001")  # room for one more
        save(tmp_path, step, step, keep=1000)
        assert newest(tmp_path) == step

    code = forks.exit_code(forks.fork(fill))
    if code == 77:
        pytest.skip("mounting a file system takes a right that this process lacks")
    assert code == 0


def test_a_folder_that_may_not_be_written_to(tmp_path):
    save(tmp_path / "checkpoints", 1, 1)
    for folder in (tmp_path, tmp_path / "checkpoints"):
        folder.chmod(0o555)

    def write() -> None:
        os.chdir(tmp_path)  # before the right to come here is given up
        if os.geteuid() == 0:
            os.seteuid(65534)
        for writes in (
            lambda: save(Path("checkpoints"), 2, 2),
            lambda: save(Path("new"), 2, 2),
            lambda: atomic_write("result.json", lambda part: part.write_text("x")),
            lambda: RunDir(Path()).lock(),
            lambda: RunDir(Path("run")).lock(),
        ):
            with pytest.raises(
                UserError, match=r"^cannot write .*: Permission denied\. What was there before is whole"
            ):
                writes()
        assert newest(Path("checkpoints")) == 1

    assert forks.exit_code(forks.fork(write)) == 0
    for folder in (tmp_path, tmp_path / "checkpoints"):
        folder.chmod(0o755)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO])
def test_the_command_says_one_sentence(number, capsys):
    """Whatever meets the full disk: the table of numbers, TensorBoard, a picture."""

    def fails() -> int:
        raise OSError(number, os.strerror(number), "runs/a/metrics.csv")

    assert cli._guarded(fails) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fastmkd: runs/a/metrics.csv: {os.strerror(number)}.")
    assert said.count("\n") == 1


def hold(folder: Path, ready: Path, child: bool = False) -> None:
    lock = RunDir(folder).lock()
    if child:  # as a process that reads pictures does, it outlives a killed one
        ready.with_suffix(".child").write_text(str(forks.fork(lambda: time.sleep(60))))
    ready.write_text("")
    time.sleep(60)
    lock.close()


@pytest.mark.parametrize("child", [False, True])
def test_two_runs_cannot_share_a_folder_and_a_killed_one_lets_go(tmp_path, child):
    run, ready = RunDir(tmp_path / "run"), tmp_path / "ready"
    pid = forks.fork(lambda: hold(run.path, ready, child))
    wait_for(ready)
    with pytest.raises(UserError, match=rf"^process {pid} on {socket.gethostname()} trains in .*run; wait for it or"):
        run.lock()
    forks.kill(pid)
    run.lock().close()
    if child:
        os.kill(int(ready.with_suffix(".child").read_text()), 9)


HOSTILE = [
    "", "null", "[]", "3", "{}", "[" * 100_000, '{"format": 1}', '{"format": 1, "step": 1, "files": [], "state": {}}',
    '{"format": 1, "step": "1", "files": {}, "state": {}}', '{"format": 1, "step": -1, "files": {}, "state": {}}',
    '{"format": 1, "step": NaN, "files": {}, "state": {}}', '{"format": 1, "step": true, "files": {}, "state": {}}',
    '{"format": 1, "step": 1, "files": {}, "state": []}', '{"format": 1, "step": 1, "files": {"a": 3}, "state": {}}',
    '{"format": 1, "step": 1, "files": {"../x.safetensors": {"bytes": 1, "sha256": ""}}, "state": {}}',
    '{"format": 1, "step": 1, "files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}, "state": {}}',
    '{"format": 1, "step": 1, "files": {"a.pt": {"bytes": 1, "sha256": ""}}, "state": {}}',
    '{"format": 1, "step": 1, "files": {"a.safetensors": {"bytes": "1", "sha256": ""}}, "state": {}}',
    '{"format": 1, "step": 1, "files": {"a.safetensors": {"bytes": 1}}, "state": {}}',
    '{"format": 1, "step": 1' + "0" * 5000 + ', "files": {}, "state": {}}',
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_lying_state_is_refused(tmp_path, text):
    save(tmp_path, 1, 1)
    (tmp_path / "step_00000001" / "state.json").write_text(text)
    with pytest.raises(UserError, match=r"the checkpoint .* is damaged"):
        load_checkpoint(tmp_path / "step_00000001")


def test_any_changed_byte_is_found_or_changes_nothing(tmp_path):
    save(tmp_path, 1, 1)
    state = tmp_path / "step_00000001" / "state.json"
    whole, refused = state.read_bytes(), 0
    for place in range(0, len(whole), 3):
        state.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = load_checkpoint(state.parent)
        except UserError:
            refused += 1
        else:
            assert (found.step, found.state) == (1, {"number": 1})
            assert torch.equal(found.tensors["method"]["bias"], torch.ones(7))
    assert refused > 0.9 * len(whole) / 3


def test_a_safetensors_file_that_lies_under_a_right_digest(tmp_path):
    import hashlib

    save(tmp_path, 1, 1)
    folder = tmp_path / "step_00000001"
    content = json.loads((folder / "state.json").read_text())
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    for lie in (b"", b"\xff" * 8, b"\xff" * 64, len(header).to_bytes(8, "little") + header, b"\x80\x04}\x94."):
        (folder / "method.safetensors").write_bytes(lie)
        content.pop("sha256", None)  # as in checkpoints of older versions
        content["files"]["method.safetensors"] = {"bytes": len(lie), "sha256": hashlib.sha256(lie).hexdigest()}
        (folder / "state.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"method\.safetensors cannot be read"):
            load_checkpoint(folder)


def test_only_folders_that_a_run_has_written_are_checkpoints(tmp_path):
    for step in (5, 99_999_999, 100_000_000):
        save(tmp_path, step, step, keep=9)
    shutil.copytree(tmp_path / "step_00000005", tmp_path / "step_00000005_copy")
    shutil.copytree(tmp_path / "step_00000005", tmp_path / "step_99999999.bak")
    assert newest(tmp_path) == 100_000_000
    others = ["step_00000005_copy", "step_99999999.bak"]
    later = [
        "step_100000000",
        "step_99999999",
    ]  # of another branch: not counted, not removed
    save(tmp_path, 6, 6, keep=2)
    assert visible(tmp_path) == sorted([*others, *later, "step_00000005", "step_00000006"])
    save(tmp_path, 7, 7, keep=2)
    assert visible(tmp_path) == sorted([*others, *later, "step_00000006", "step_00000007"])


@pytest.mark.long
def test_a_run_killed_again_and_again_ends_with_the_same_bits(recipes):
    """In the real loop, at random times: while it reads, trains, tests, saves or writes its result."""
    options = ["--schedule.epochs=60", "--run.save_every=1"]

    def run(name: str) -> int:
        return forks.fork(lambda: train(load_recipe("student.yaml", [f"--name={name}", *options])))

    assert forks.exit_code(run("whole")) == 0
    draw, kills = random.Random(0), 0
    while True:
        pid = run("killed")
        time.sleep(draw.uniform(0.2, 2.5))
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            break
        forks.kill(pid)
        kills += 1
    print(f"killed {kills} times")  # the count of docs/reliability.md
    assert kills >= 10
    whole, killed = (load_file(f"runs/{name}/model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(value, killed[key]) for key, value in whole.items())
