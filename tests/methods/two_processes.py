"""Runs a script in two processes that find each other."""

from __future__ import annotations

from pathlib import Path

import fresh

__all__ = ["run_in_two_processes"]


def run_in_two_processes(source: str, folder: Path) -> None:
    """Both must print "agreed"; modules beside the tests can be imported."""
    script = folder / "worker.py"
    script.write_text(source)
    for done in fresh.run_ranks(script, folder=folder):
        assert done.returncode == 0, done.stderr
        assert "agreed" in done.stdout
