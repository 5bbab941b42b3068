"""A pytest plugin that writes what became of each test at once: ``pytest -p fastmkd.bench.outcomes --outcomes FILE``.

pytest writes its own report when it ends, so a run that is stopped leaves none. Here a test has a line when it is
collected and another one when it has passed, failed or was skipped; the last one counts. A test that time did not reach
is therefore on record as one that was not run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

__all__ = ["Outcomes", "pytest_addoption", "pytest_configure"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds ``--outcomes``."""
    parser.addoption("--outcomes", type=Path, metavar="FILE", help="append what became of each test, one a line")


def pytest_configure(config: pytest.Config) -> None:
    """Registers `Outcomes` if they are asked for; of several processes (pytest-xdist) only in the one that leads."""
    if config.getoption("outcomes") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(config.getoption("outcomes")), "fastmkd-outcomes")


class Outcomes:
    """Appends a line for each test that is collected and for each that ends.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        import torch  # here, since every process of pytest-xdist imports this file, and only one has a device to name

        from fastmkd.ops.cache import device_name

        device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self._about = {"device": device, "torch": torch.__version__}
        self._collected: set[str] = set()
        self._file = path.open("a", encoding="utf-8")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """One process: the tests that it is going to run."""
        self._collect(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        """Several processes: each of them collects all tests."""
        self._collect(ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The end of a test, or of its fixtures where they are what failed."""
        if report.when == "call" or report.outcome != "passed":
            self._write(report.nodeid, report.outcome)

    def pytest_unconfigure(self) -> None:
        """The end of the run."""
        self._file.close()

    def _collect(self, tests: Iterable[str]) -> None:
        for test in tests:
            if test not in self._collected:
                self._collected.add(test)
                self._write(test, "collected")

    def _write(self, test: str, outcome: str) -> None:
        self._file.write(json.dumps({**self._about, "test": test, "outcome": outcome}) + "\n")
        self._file.flush()
