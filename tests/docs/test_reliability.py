"""docs/reliability.md says what the tests do: its counts are the code's, and its commands select tests that exist."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from fastmkd.ops import OPS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reliability.md").read_text()
COMMANDS = re.findall(r"`(pytest [^`]+)`", PAGE)
Selected = set[tuple[str, str]]


def constants(path: str, name: str) -> str:
    """The source of what a module gives a name."""
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return ast.unparse(node.value)
    raise AssertionError(f"{path} has no {name}")


def functions_of(file: str) -> dict[str, str]:
    """The test functions of a file, and what decorates them and the file."""
    module = ast.parse((ROOT / file).read_text())
    marks = [ast.unparse(node.value) for node in module.body if ast.unparse(node).startswith("pytestmark")]
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return {f.name: " ".join([*marks, *map(ast.unparse, f.decorator_list)]) for f in functions}


def selected(command: str) -> Selected:
    """The tests that a command runs, as (file, function); a word of ``-k`` that selects none is an error."""
    words = shlex.split(command)[1:]
    options = {words[i]: words[i + 1] for i in range(len(words) - 1) if words[i] in ("-k", "-m")}
    files = [word for word in words if word.endswith(".py")]
    assert len(words) == len(files) + 2 * len(options), f"{command} has more than files, -k and -m"
    assert options.get("-m", "long") in ("long", "not long"), command
    every = {(file, name): marks for file in files for name, marks in functions_of(file).items()}
    chosen: Selected = set()
    for word in options.get("-k", "test_").split(" or "):
        found = {test for test in every if word.lower() in test[1]}
        assert found, f"{command}: no test is named {word}"
        chosen |= found
    if options.get("-m") == "long":
        chosen = {test for test in chosen if "mark.long" in every[test]}
        assert chosen, f"{command}: none of them is marked long"
    return chosen


@pytest.mark.parametrize("command", COMMANDS)
def test_command_selects_tests(command: str) -> None:
    assert selected(command)


def test_words_that_select_nothing_are_found() -> None:
    for wrong in ("tests/train/test_crash.py -k 'two_runs or no_such'", "tests/ops/test_fuzz.py -k is_seen -m long"):
        with pytest.raises(AssertionError, match=r"no test is named no_such|marked long"):
            selected(f"pytest {wrong}")
    with pytest.raises(FileNotFoundError):
        selected("pytest tests/train/test_gone.py")


def test_every_long_test_of_the_files_has_a_row() -> None:
    """What a file proves in minutes is on the page, too, where reliability is all that it is about."""
    shown = set().union(*map(selected, COMMANDS))
    for file in sorted({file for file, _ in shown} - {"tests/train/test_engine.py"}):
        long = {name for name, marks in functions_of(file).items() if "mark.long" in marks}
        assert {(file, name) for name in long} <= shown, file


def test_make_and_cmake_know_their_targets() -> None:
    targets = re.findall(r"`make ([\w-]+)", PAGE) + re.findall(r"--target (\w+)", PAGE)
    assert {"sanitize", "index_fuzz"} <= set(targets)
    rules = (ROOT / "Makefile").read_text() + re.sub(
        r"add_executable\((\w+)", r"\n\1: ", (ROOT / "CMakeLists.txt").read_text()
    )
    for target in targets:
        assert re.search(rf"^{target}:", rules, re.MULTILINE), target


def said(pattern: str) -> tuple[str, ...]:
    found = re.search(pattern, PAGE)
    assert found, f"the page says nothing like {pattern!r}"
    return found.groups()


def test_counts_of_ops_and_of_their_inputs() -> None:
    fuzz = (ROOT / "tests/ops/test_fuzz.py").read_text()
    quick, long = re.findall(r"fuzz_apart\(name, (\d+), tmp_path\)", fuzz)
    ops, said_quick, said_long = said(r"inputs of all (\d+) ops .* \| (\d+) an op \|.* tries ([\d,]+) an op")
    assert (int(ops), said_quick, said_long.replace(",", "")) == (len(OPS), quick, long)


def test_counts_of_cases_between_processes() -> None:
    names = {
        name.removeprefix("case_")
        for path in (ROOT / "tests/distributed").glob("*_cases.py")
        for name in re.findall(r"^def (case_\w+)", path.read_text(), re.MULTILINE)
    }
    processes = "tests/distributed/processes.py"
    left_out = set().union(*(ast.literal_eval(constants(processes, name)) for name in ("NOT_SPLIT", "MOVED")))
    quick = ast.literal_eval(constants(processes, "QUICK"))
    assert left_out < names
    assert set(quick) <= names - left_out
    assert said(r"\| (\d+) cases, and once more") == (str(len(names)),)
    assert said(r"\| (\d+) cases; `-m long` takes all (\d+) of") == (str(len(quick)), str(len(names - left_out)))
    close = constants("tests/distributed/test_ranks.py", "CLOSE")
    for dtype, rtol in zip(("64", "32"), said(r"equal to ([\d.e-]+), float32 tensors to ([\d.e-]+)"), strict=True):
        assert re.search(rf"float{dtype}: {{'rtol': ([\d.e-]+)", close)[1].replace("-0", "-") == rtol.replace("-0", "-")


def test_lengths_of_the_soaks() -> None:
    steps = re.findall(r"= soak\((\d+), (\d+)\)", (ROOT / "tests/methods/test_soak.py").read_text())
    assert said(r"each time \| ([\d,]+) \| from step ([\d,]+) on")[0].replace(",", "") == steps[-1][0]
    assert said(r"from step ([\d,]+) on")[0].replace(",", "") == steps[-1][1]
    whole = (ROOT / "tests/train/test_soak_run.py").read_text()
    found = said(r"\| (\d+) runs and one of (\d+) epochs; `-m long` takes (\d+) and (\d+) \|")
    assert re.findall(r"runs=(\d+), epochs=(\d+)", whole) == [found[:2], found[2:]]
