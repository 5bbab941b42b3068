"""What the folder of a run may make fastmkd import. The folder is data, but parsing a recipe imports what it names.

A recipe that a user gives is code of the user's choice. One that comes out of a run's folder may name fastmkd's own
classes, those of packages that the program has imported by itself, and those that the user names in ``FASTMKD_TRUST``.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import os
import sys
from collections.abc import Iterator
from typing import Any

from .errors import UserError

__all__ = ["TRUST", "known_code_only", "refuse_foreign"]

TRUST = "FASTMKD_TRUST"  # packages of the user's own methods, with commas between them
# What jsonargparse may import by itself while it parses; some standard modules do more than that.
PARSERS = frozenset({"argcomplete", "docstring_parser", "typeshed_client", "typing_extensions"})
STANDARD = sys.stdlib_module_names - {"antigravity", "idlelib", "test", "this", "turtle", "turtledemo"}


def _trusted() -> set[str]:
    own = os.environ.get(TRUST, "").split(",")
    return {"fastmkd", *(name.strip() for name in own if name.strip())}


class _Guard(importlib.abc.MetaPathFinder):
    """Finds nothing for jsonargparse in a package that is neither trusted nor in use; others import what they like."""

    def __init__(self) -> None:
        self.known = {name.partition(".")[0] for name in sys.modules} | PARSERS | STANDARD | _trusted()
        self.refused: list[str] = []

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname.partition(".")[0] not in self.known and _importer() == "jsonargparse":
            self.refused.append(fullname)
            raise ModuleNotFoundError(f"{fullname} is not trusted", name=fullname)


def _importer() -> str:
    """The package whose code asks for the module that is being found."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "importlib":
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


@contextlib.contextmanager
def known_code_only() -> Iterator[None]:
    """Keeps jsonargparse from importing packages that nobody trusts: it tries many a text as the path of a class.

    Raises:
        UserError: what was parsed is refused, and it names such a package.

    Example:
        >>> with known_code_only():
        ...     from fractions import Fraction
    """
    guard = _Guard()
    sys.meta_path.insert(0, guard)
    try:
        yield
    except (Exception, SystemExit):
        if guard.refused:
            raise _foreign(guard.refused[0]) from None
        raise
    finally:
        sys.meta_path.remove(guard)


def refuse_foreign(value: Any) -> None:
    """Refuses nested values of which one is a ``class_path`` that leads to a package that nobody trusts.

    Args:
        value: dicts and lists, as JSON has them.

    Raises:
        UserError: names it.

    Example:
        >>> refuse_foreign({"class_path": "fastmkd.MaskedKD", "init_args": {"base": {"class_path": "Manifold"}}})
    """
    parts: list[Any] = []
    if isinstance(value, dict):
        path = value.get("class_path")
        if isinstance(path, str) and "." in path:
            module = path.rpartition(".")[0]
            if module not in sys.modules and module.partition(".")[0] not in _trusted():
                raise _foreign(path)
        parts = list(value.values())
    elif isinstance(value, list | tuple):
        parts = list(value)
    for part in parts:
        refuse_foreign(part)


def _foreign(name: str) -> UserError:
    package = name.partition(".")[0]
    return UserError(
        f"the recipe of a run names {name}, which is no part of fastmkd; opening the run would run its code. Give the "
        f"recipe (YAML) where the command takes one, or set {TRUST}={package} if you trust the run and that package."
    )
