"""Processes of their own that need not import PyTorch: each is forked from one that has imported it and done no more.

A new Python process spends seconds on that import; a fork of this one starts at once, and knows nothing of the tests.
What reads its environment while it is imported, or while a library is loaded, needs a `subprocess` instead.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

__all__ = ["run", "run_ranks", "start"]

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch._dynamo", "torchvision", "timm", "accelerate", "sklearn.datasets", "fastmkd.train.engine"]
)


def start(
    program: str | Path, *arguments: str | Path, folder: Path, output: str | Path = os.devnull, **environment: str
) -> BaseProcess:
    """Starts ``python PROGRAM ARGUMENTS`` in a folder, or ``python -m`` if the program is no file.

    Args:
        program: path of a script, or name of a module.
        arguments: its arguments.
        folder: where it runs.
        output: what it prints goes to this file with the ending ``.out``, errors to ``.err``.
        environment: on top of that of the tests.
    """
    words = [str(word) for word in (program, *arguments)]
    process = CONTEXT.Process(
        target=_become, args=(words, str(folder), {**os.environ, "OMP_NUM_THREADS": "1", **environment}, str(output))
    )
    process.start()
    return process


def run(
    program: str | Path, *arguments: str | Path, folder: Path, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end; arguments as of `start`."""
    (done,) = _run([{}], program, arguments, folder, timeout, environment)
    return done


def run_ranks(
    program: str | Path, *arguments: str | Path, folder: Path, count: int = 2, timeout: float = 300, **environment: str
) -> list[subprocess.CompletedProcess[str]]:
    """Runs a program as `count` processes of one group, as torchrun would; arguments as of `start`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    group["LOCAL_WORLD_SIZE"] = group["WORLD_SIZE"]
    ranks = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return _run(ranks, program, arguments, folder, timeout, environment)


def _run(
    each: list[dict[str, str]],
    program: str | Path,
    arguments: tuple[str | Path, ...],
    folder: Path,
    timeout: float,
    environment: dict[str, str],
) -> list[subprocess.CompletedProcess[str]]:
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as outputs:
        files = [Path(outputs, str(number)) for number in range(len(each))]
        processes = [
            start(program, *arguments, folder=folder, output=file, **{**environment, **own})
            for file, own in zip(files, each, strict=True)
        ]
        try:
            for process in processes:
                process.join(max(0, deadline - time.monotonic()))
        finally:
            late = [process for process in processes if process.is_alive()]
            for process in late:
                process.kill()
                process.join()
        said = [[file.with_suffix(end).read_text() for end in (".out", ".err")] for file in files]
    if late:
        raise subprocess.TimeoutExpired([program, *arguments], timeout, *map("\n".join, zip(*said, strict=True)))
    return [
        subprocess.CompletedProcess([program, *arguments], process.exitcode or 0, *texts)
        for process, texts in zip(processes, said, strict=True)
    ]


def _become(words: list[str], folder: str, environment: dict[str, str], output: str) -> None:
    """Makes the forked process what it was asked to be."""
    import torch

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, end in ((1, ".out"), (2, ".err")):
        path = output if output == os.devnull else output + end
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    sys.argv = words
    if Path(words[0]).is_file():
        runpy.run_path(words[0], run_name="__main__")
    else:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
