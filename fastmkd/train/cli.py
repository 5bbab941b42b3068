"""The command ``fastmkd``: finds the subcommand, loads only what it needs, and turns mistakes into one sentence."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["COMMANDS", "main"]

# Command: (module, function, summary). The module is imported when its command runs.
COMMANDS = {
    "train": ("fastmkd.train.commands", "train", "train a recipe, or go on with its run"),
    "finetune": ("fastmkd.train.finetune", "finetune", "train a finished run's student, or other weights, on labels"),
    "probe": ("fastmkd.train.finetune", "probe", "train a linear classifier on the frozen student of a run"),
    "eval": ("fastmkd.train.commands", "evaluate", "test the student of a finished run again"),
    "export": ("fastmkd.train.export", "main", "write the bare student as .safetensors or .onnx"),
    "show": ("fastmkd.train.show", "main", "draw what a method sees: input, saliency, kept patches"),
    "cka": ("fastmkd.train.cka_command", "main", "compare the layers of two networks: heat map, curves, CSV"),
    "cost": ("fastmkd.train.cost_command", "main", "count the multiply-adds of student and teacher"),
    "suggest-keep": ("fastmkd.train.suggest_keep", "main", "find how few patches the teacher needs"),
    "scenes": ("fastmkd.train.scenes_command", "main", "make a small set for detection and segmentation"),
    "demo": ("fastmkd.train.demo", "main", "train teacher and students on digits, end with a table"),
    "bench": ("fastmkd.bench.runner", "main", "run benchmarks"),
    "check": ("fastmkd.ops.check", "main", "test every op against its reference on this device"),
    "env": ("fastmkd.train.commands", "env", "say what is installed, built and active"),
}

# Packages of the extra [train], by the name they are imported under.
EXTRAS = {
    "accelerate", "jsonargparse", "matplotlib", "pycocotools", "rich", "safetensors",
    "segmentation_models_pytorch", "sklearn", "tensorboard", "torchvision", "yaml",
}  # fmt: skip

# What disks and folders may answer to any file that is read or written.
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: after the program's name; None takes those of the process.

    Returns:
        Exit code: 0, 2 for a mistake of the user, 130 for a run that was interrupted (it can be gone on with).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from fastmkd import __version__

        sys.stdout.write(f"fastmkd {__version__}\n")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        return _fail(f"{name!r} is not a command; known are {', '.join(COMMANDS)}.")
    if os.environ.get("FASTMKD_DEBUG") == "1":
        return _call(name, rest)
    return _guarded(lambda: _call(name, rest))


def usage() -> str:
    """Returns the list of commands."""
    lines = [f"  {name:14}{summary}" for name, (_, _, summary) in COMMANDS.items()]
    return "usage: fastmkd COMMAND ...\n\n" + "\n".join(lines) + "\n\nfastmkd COMMAND --help says more.\n"


def _call(name: str, arguments: list[str]) -> int:
    module, function, _ = COMMANDS[name]
    result: Any = getattr(importlib.import_module(module), function)(arguments)
    return result if isinstance(result, int) else 0


def _guarded(call: Callable[[], int]) -> int:
    try:
        return call()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package in EXTRAS:
            return _fail(f'this needs the package {package}: pip install -e ".[train]" in the repository.')
        raise
    except Exception as error:
        from argparse import ArgumentError

        from .errors import UserError
        from .interrupt import RunInterrupted

        if isinstance(error, RunInterrupted):
            sys.stderr.write(f"{error}\n")
            return 130
        # ValueError and TypeError are how the whole library says that an argument is wrong.
        if isinstance(error, UserError | ArgumentError | ValueError | TypeError):
            hint = "" if isinstance(error, UserError | ArgumentError) else " (FASTMKD_DEBUG=1 shows where.)"
            return _fail(f"{error}{hint}")
        if isinstance(error, OSError) and error.errno in DISK:
            where = f"{error.filename}: " if error.filename else ""
            return _fail(
                f"{where}{error.strerror}. What a run had saved is whole: mend this, then give the same command again. "
                "(FASTMKD_DEBUG=1 shows where.)"
            )
        raise


def _fail(sentence: str) -> int:
    sys.stderr.write(f"fastmkd: {' '.join(sentence.split())}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
