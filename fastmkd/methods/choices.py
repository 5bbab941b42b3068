"""Parts of a method that a recipe chooses: by a short name, as ``{class_path, init_args}``, or as an object."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

__all__ = ["Choice", "choose"]

T = TypeVar("T")
# What jsonargparse leaves of a class argument: {"class_path": ..., "init_args": {...}}.
Choice = Mapping[str, Any]


def choose(name: str, value: Any, kind: type[T], known: Mapping[str, Callable[[], T]]) -> T:
    """Returns the object that `value` stands for.

    Args:
        name: of the argument, for messages.
        value: a key of `known`, a mapping with ``class_path`` and perhaps ``init_args``, or an instance of `kind`.
        kind: what it must be.
        known: makers by short name.

    Raises:
        ValueError: a name that is not known, or a class path that leads nowhere.
        TypeError: anything that does not give a `kind`.

    Example:
        >>> choose("base", "zero", int, {"zero": int})
        0
        >>> choose("base", {"class_path": "fractions.Fraction", "init_args": {"numerator": 3}}, object, {})
        Fraction(3, 1)
    """
    if isinstance(value, str):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; available are {', '.join(map(repr, known))}.")
        return known[value]()
    if isinstance(value, Mapping) and isinstance(value.get("class_path"), str):
        module, _, attribute = value["class_path"].rpartition(".")
        try:
            maker = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError):
            raise ValueError(f"{name}.class_path is {value['class_path']!r}, which cannot be imported.") from None
        if not (isinstance(maker, type) and issubclass(maker, kind)):  # nothing else is called
            raise TypeError(f"{name}.class_path is {value['class_path']!r}, which is no class of {kind.__name__}.")
        value = maker(**(value.get("init_args") or {}))
    if not isinstance(value, kind):
        raise TypeError(
            f"{name} is a {type(value).__name__}; expected a {kind.__name__}, one of {', '.join(map(repr, known))}, or "
            "a mapping with class_path and init_args."
        )
    return value
