"""What all tests share: no network, no user cache, GPU tests skipped where there is no GPU, fresh buffers poisoned."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.insert(0, str(Path(__file__).parent))  # importlib mode finds no modules beside the tests (fresh)

import torch


@pytest.hookimpl(trylast=True)  # pytest has a temporary folder then, and has imported no test
def pytest_configure(config: pytest.Config) -> None:
    """The cache is where pytest removes old folders itself, those of a run that was killed too."""
    os.environ["FASTMKD_CACHE"] = str(config._tmp_path_factory.mktemp("cache"))


def pytest_unconfigure() -> None:
    gc.unfreeze()


# With `--dist loadfile` a worker gets whole files, in this order: the longest first, so that none is left for the end.
LONGEST = [
    "kernels/test_interpreter.py",
    "ops/test_generated.py",
    "kernels/test_aot.py",
    "train/test_fsdp.py",
    "native/test_build.py",
    "train/test_detection_recipe.py",
    "train/test_engine.py",
    "bench/test_evidence_chain.py",
    "examples/test_examples.py",
    "nn/test_convert.py",
    "nn/test_reppoints.py",
]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    rank = {folder / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords hold the names of folders too
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """What is here now stays to the end: no garbage collection (each run of the trainer asks for one) looks again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills every buffer that PyTorch hands out uninitialised with NaN (or the largest integer), in C++ too."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
