"""The Python blocks of the README and of every page run, from top to bottom, as a reader would paste them."""

from __future__ import annotations

import re
from pathlib import Path

import fresh
import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if BLOCK.search(path.read_text())]


def program(page: str) -> str:
    """The blocks of a page in one file, each line where it stands on the page, so that a traceback points there."""
    lines = [""] * len(page.splitlines())
    for block in BLOCK.finditer(page):
        start = page[: block.start(1)].count("\n")
        code = block[1].splitlines()
        lines[start : start + len(code)] = code
    return "\n".join(lines)


def test_blocks_are_found_where_they_stand():
    assert program("a\n```python\nx = 1\n\nx\n```\n```bash\nls\n```\n") == "\n\nx = 1\n\nx\n\n\n\n"


def test_the_pages_with_code_are_here():
    assert {"README.md", "masked_conv.md"} <= {path.name for path in PAGES}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_page(path, tmp_path):
    script = tmp_path / f"{path.stem}.py"
    script.write_text(program(path.read_text()))
    run = fresh.run(script, folder=tmp_path)
    assert run.returncode == 0, run.stderr
