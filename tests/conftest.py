"""What all tests share: no network, no user cache, GPU tests skipped where there is no GPU, fresh buffers poisoned."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

os.environ["FASTMKD_CACHE"] = tempfile.mkdtemp(prefix="fastmkd-test-cache-")  # before fastmkd is imported anywhere
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import torch


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["FASTMKD_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills every buffer that PyTorch hands out uninitialised with NaN (or the largest integer), in C++ too."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
