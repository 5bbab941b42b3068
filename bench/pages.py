"""Pages that are made from records: written, or compared with what the records say."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from .environment import REPOSITORY, results_folder

__all__ = ["add_page", "keep_page", "page_command", "parse_page"]


def page_command(
    module: str,
    about: str,
    name: str,
    render: Callable[[str, Path], str],
    argv: Sequence[str] | None,
    draw: Callable[[Path, Path], None] = lambda page, results: None,
) -> int:
    """Command line of ``python -m fastmkd.bench.MODULE``, which makes one page of a folder of records.

    Args:
        module: its name.
        about: its docstring, the first line of which the help shows.
        name: of the page, from the repository's root.
        render: the old page and the folder -> the new page.
        argv: arguments; those of the process if None.
        draw: what else to make once the page is written; gets its path and the folder.

    Returns:
        Exit status: with ``--check``, 1 when the page is not what the records say.
    """
    parser = argparse.ArgumentParser(prog=f"python -m fastmkd.bench.{module}", description=about.splitlines()[0])
    parser.add_argument("--results", type=Path, default=results_folder())
    add_page(parser, name)
    arguments = parse_page(parser, None if argv is None else list(argv))
    status = keep_page(arguments, parser.prog, lambda old: render(old, arguments.results))
    if not arguments.check:
        draw(arguments.page, arguments.results)
    return status


def add_page(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds the options ``--page`` and ``--check``.

    Args:
        parser: of the command that makes the page.
        name: of the page, from the repository's root.
    """
    parser.add_argument("--page", type=Path, default=REPOSITORY / name)
    parser.add_argument("--check", action="store_true", help="write nothing; say whether the page is up to date")


def parse_page(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parses a command's arguments; ends the program where there is no page, or where it would lose tables.

    Args:
        parser: with ``--results`` and the options of `add_page`.
        argv: arguments; those of the process if None.
    """
    arguments = parser.parse_args(argv)
    if arguments.results != parser.get_default("results") and arguments.page == parser.get_default("page"):
        parser.error(
            f"--results is {arguments.results}, but {arguments.page} holds what other records say; pass --page, "
            "a copy of it, too."
        )
    if not arguments.page.is_file():
        parser.error(f"there is no page {arguments.page}; run this in a checkout of the repository, or pass --page.")
    return arguments


def keep_page(arguments: argparse.Namespace, command: str, render: Callable[[str], str]) -> int:
    """Writes a page anew, or with ``--check`` says whether it is what the records say.

    Args:
        arguments: with the options of `add_page`.
        command: that makes the page, for the message.
        render: the old page -> the new one.

    Returns:
        Exit status: with ``--check``, 1 when the page differs.
    """
    old = arguments.page.read_text()
    new = render(old)
    if arguments.check:
        print("up to date" if new == old else f"{arguments.page} differs from its records; run {command}")
        return int(new != old)
    arguments.page.write_text(new)
    return 0
