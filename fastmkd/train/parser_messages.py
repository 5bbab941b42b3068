"""What the parser of options and recipes says, as a sentence that names the key, its value and what it takes.

jsonargparse names Python's types and nests one message in another. What is not recognised here is passed on as it is.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .errors import UserError, shorten

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["explain", "parse"]

WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list",
    "tuple": "a list of several, such as [a, b]",
    "dict": "names with values, such as {depth: 3}",
    "NoneType": "null",
}
UNION = re.compile(
    r"(?:- .*? - )?Does not validate against any of the Union .*? Errors: (.*) Given value type: .*? Given value: (.*)"
)
OWNER = re.compile(r"Problem with given class_path '([^']+)': (.*)")
KEY = re.compile(r'Parser key "([^"]+)": (.*)')
NULL = re.compile(r" - Expected a <class 'NoneType'>(\. Got value: \S*)?$")
EXPECTED = re.compile(r"Expected a (.+?)(?:\. Got value: (.*))?")


def parse(parser: ArgumentParser, argv: Sequence[str]) -> Any:
    """Parses the arguments of a command.

    Args:
        parser: of the command.
        argv: after the command's name.

    Raises:
        UserError: what is wrong, see `explain`.

    Example:
        >>> from jsonargparse import ArgumentParser
        >>> parser = ArgumentParser(exit_on_error=False)
        >>> _ = parser.add_argument("--epochs", type=int, help="passes over the pictures")
        >>> parse(parser, ["--epochs=x"])
        Traceback (most recent call last):
        fastmkd.train.errors.UserError: epochs is x; it takes a whole number (passes over the pictures).
        >>> parse(parser, ["--epoks=3"])
        Traceback (most recent call last):
        fastmkd.train.errors.UserError: --epoks is not known; did you mean --epochs?
    """
    try:
        return parser.parse_args(list(argv))
    except argparse.ArgumentError as error:
        raise UserError(explain(str(error), parser)) from None


def explain(message: str, parser: ArgumentParser) -> str:
    """Returns one line that says which key has which value, and what it takes.

    Args:
        message: of an error of the parser.
        parser: knows the keys.

    """
    text = " ".join(message.split())
    patterns: list[tuple[str, Callable[[str, ArgumentParser], str]]] = [
        (r"unrecognized arguments: (.*)", _unrecognized),
        (r"the following arguments are required: (.*)", _required),
        (r"Group '(?:.*)' does not accept option '(?:.*)'|Option '(?:.*)' is not accepted", _not_a_key),
        (r"Parser key .*", _of_a_key),
    ]
    for pattern, say in patterns:
        if (found := re.fullmatch(pattern, text)) is not None:
            return say(found[found.lastindex or 0], parser)
    return text


def _unrecognized(words: str, parser: ArgumentParser) -> str:
    word = words.split()[0]
    if not word.startswith("-"):
        return f"{word} is one word too many; what belongs to an option stands behind it, as --key=value."
    return _unknown(word.lstrip("-").partition("=")[0], [action.dest for action in parser._actions], "--")


def _required(names: str, parser: ArgumentParser) -> str:
    said = []
    for name in names.split(", "):
        action = next((action for action in parser._actions if name in (action.dest, action.metavar)), None)
        option = action.option_strings[0] if action is not None and action.option_strings else name
        said.append(f"{option} ({action.help})" if action is not None and action.help else option)
    return f"the following arguments are required: {', '.join(said)}."


def _not_a_key(text: str, parser: ArgumentParser) -> str:
    return _unknown(".".join(re.findall(r"'([^']+)'", text)), [action.dest for action in parser._actions])


def _unknown(key: str, known: Iterable[str], mark: str = "") -> str:
    """Says that there is no such key, which is like it, and which stand beside it."""
    section, _, last = key.rpartition(".")
    known = [name for name in known if name and not name.endswith(("help", "print_config", "print_shtab"))]
    beside = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section]
    near = [f"{section}.{name}".lstrip(".") for name in difflib.get_close_matches(last, beside, 1)]
    # The key may have been given without its section.
    near = near or [name for name in known if not section and name.rpartition(".")[2] == last]
    parts = [f"did you mean {' or '.join(mark + name for name in near)}?"] if near else []
    if section and beside:
        parts.append(f"{section} has {shorten(beside, 20)}.")
    if not parts:
        parts = [f"known are {shorten((mark + name for name in beside), 20)}."]
    return f"{mark}{key} is not known; {' '.join(parts)}"


def _of_a_key(text: str, parser: ArgumentParser) -> str:
    """Goes into nested messages down to the innermost key."""
    key, rest, prefix, owner, nullable, given = "", text, "", None, False, None
    while True:
        if (found := KEY.fullmatch(rest)) is not None:
            # A message may repeat the key that it is about.
            key, rest = (found[1] if found[1] == key else prefix + found[1]), found[2]
            nullable, given = False, None
        elif (found := UNION.fullmatch(rest)) is not None:
            rest, given = found[1], found[2]
            nullable = NULL.search(rest) is not None
            rest = NULL.sub("", rest).removeprefix("- ")
        elif (found := OWNER.fullmatch(rest)) is not None and _imported(found[1]) is not None:
            owner, rest = _imported(found[1]), found[2]
            prefix = f"{key}." if dataclasses.is_dataclass(owner) else f"{key}.init_args."
        else:
            break
    if (found := re.fullmatch(r"Option '(.+)' is not accepted", rest)) is not None and owner is not None:
        names = [name for name in inspect.signature(owner).parameters if name not in ("student", "teacher")]
        return _unknown(prefix + found[1], [prefix + name for name in names])
    if key == "method" and owner is None:
        return _not_a_method(given or rest)
    if any(
        mark in rest
        for mark in ("dot import path", "not correspond to a subclass", "Not a valid subclass", "load config")
    ):
        value = given or rest.partition("config ")[2].partition(" ")[0].strip("'\"")
        return f"{f'{key} is {value}; it' if value else key} takes keys, as --{key}.KEY=VALUE{', or null' * nullable}."
    expected = [found for part in rest.split(" - ") if (found := EXPECTED.fullmatch(part)) is not None]
    if len(expected) != len(rest.split(" - ")):
        return f"{key}: {rest}"
    kinds = [kind for found in expected for kind in _in_words(found[1])] + ["null"] * nullable
    got = expected[0][2]
    if given is not None and got not in (None, given) and given.startswith(("[", "(", "{")):
        return f"{key} is {given}; {got} in it should be {_either(_in_words(expected[0][1]))}."
    value = got if given is None else given
    takes = _either([f"a list, such as [{value}]" if kind == "a list" else kind for kind in kinds])
    said = next((action.help for action in parser._actions if action.dest == key and action.help), "")
    why = f" ({' '.join(said.split()).rstrip('.')})" if said else ""
    return f"{key} is {value}; it takes {takes}{why}."


def _not_a_method(given: str) -> str:
    from .. import methods

    found = re.search(r"'class_path': '([^']*)'", given)
    names = ", ".join(name for name in methods.__all__ if _is_method(getattr(methods, name)))
    return (
        f"method is {given if found is None else found[1]}; known are {names}. One of your own is given by the import "
        "path of its class, a DistillMethod."
    )


def _is_method(value: Any) -> bool:
    from ..methods import DistillMethod

    return isinstance(value, type) and issubclass(value, DistillMethod) and value is not DistillMethod


def _in_words(kind: str) -> list[str]:
    """What a type takes: ``<class 'int'>``, ``typing.Literal['cpu']``."""
    if (found := re.fullmatch(r"<class '(\w+)'>", kind)) is not None:
        return [WORDS.get(found[1], found[1])]
    if (found := re.fullmatch(r"(?:typing\.)?Literal(\[.*\])", kind)) is not None:
        return [str(value) for value in ast.literal_eval(found[1])]
    return [f"a {kind}".replace("a tuple with", "a list of")]


def _either(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _imported(path: str) -> Any:
    """The class with an import path, if the parser has imported it; a message imports nothing that was refused."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)
