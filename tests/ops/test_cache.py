"""What the cache of verdicts and choices promises to processes side by side, and where it cannot be written."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from fastmkd.ops import cache

WRITERS, ENTRIES = 4, 20


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTMKD_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "_known", {})
    return tmp_path


def _write(writer: int) -> None:
    for entry in range(ENTRIES):
        cache.remember("some-gpu", f"op{writer}_{entry}/triton", True)


def test_processes_that_write_at_once_lose_nothing() -> None:
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_write, args=(writer,)) for writer in range(WRITERS)]
    for process in writers:
        process.start()
    for process in writers:
        process.join(60)
    assert [process.exitcode for process in writers] == [0] * WRITERS
    assert len(cache._read("some-gpu")["verdicts"]) == WRITERS * ENTRIES


def test_a_file_system_without_locks_is_written_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    cache.remember("some-gpu", "a/triton", True)
    assert cache._read("some-gpu")["verdicts"] == {"a/triton": True}


def test_a_system_without_fcntl_is_written_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "fcntl", None)
    cache.remember("some-gpu", "a/triton", True)
    assert cache._read("some-gpu")["verdicts"] == {"a/triton": True}


def test_nobody_waits_long_for_a_lock_that_is_not_let_go(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PATIENCE", 0.1)
    cache.remember("some-gpu", "a/triton", True)
    (lock,) = fresh_cache.glob("*.lock")
    with lock.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        begin = time.monotonic()
        cache.remember("some-gpu", "b/triton", False)
        assert 0.1 < time.monotonic() - begin < 5
    assert cache._read("some-gpu")["verdicts"] == {"a/triton": True, "b/triton": False}


def test_a_read_only_home_is_no_error(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(path: Path, *args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))  # permissions would not stop root

    monkeypatch.setattr(Path, "mkdir", read_only)
    cache.remember("some-gpu", "a/triton", True)
    assert cache.verdict("some-gpu", "a/triton") is True
    assert not list(fresh_cache.iterdir())
