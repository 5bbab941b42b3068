"""The runs that the commands of a page name are runs that its recipes, or its own commands, make."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(?:bash)?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
RUN = re.compile(r"\bruns/(\w+)")


def names_of_recipes() -> set[str]:
    return {re.search(r"^name: (\w+)", path.read_text(), re.MULTILINE)[1] for path in (ROOT / "recipes").glob("*.yaml")}


def commands(page: str) -> str:
    return "\n".join(block[1] for block in BLOCK.finditer((ROOT / page).read_text()))


@pytest.mark.parametrize("page", ["README.md", "docs/cka.md", "docs/dpk.md", "docs/detection.md"])
def test_runs_are_made_somewhere(page):
    text = commands(page)
    named = set(RUN.findall(text))
    assert named
    assert named <= names_of_recipes() | set(re.findall(r"--name=(\w+)", text))


def test_no_two_recipes_give_one_name_to_other_networks():
    made: dict[str, str] = {}
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        comment = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
        for name in re.findall(r"--name=(\w+)", comment):
            assert made.setdefault(name, path.name) == path.name, name
    assert made["dpk_alone"] == "dpk_cnn_fashion_mnist.yaml"
    assert set(RUN.findall((ROOT / "recipes" / "transfer_digits.yaml").read_text())) <= {*made, *names_of_recipes()}
