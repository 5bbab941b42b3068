"""``fastmkd export RUN``: the bare student, as safetensors with its own keys or as ONNX."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .build import trained_student
from .checkpoint import atomic_write, save_tensors
from .errors import UserError
from .parser_messages import parse
from .rundir import RunDir

__all__ = ["export_onnx", "export_safetensors", "main"]


def export_safetensors(model: nn.Module, description: dict[str, Any], path: str | Path) -> None:
    """Writes weights that ``timm.create_model(name, **kwargs)`` loads; the file's header says name, kwargs and data.

    A name such as detector.retinanet stands for ``fastmkd.nn.detectors.build_detector("retinanet", **kwargs)``.

    Args:
        model: the student.
        description: the run's ``recipe.json``.
        path: the file.
    """
    metadata = {
        "format": "pt",
        "model": description["student"]["name"],
        "kwargs": json.dumps(description["student"]["kwargs"]),
        "data": json.dumps(description["data"]),
    }
    save_tensors(path, model.state_dict(), metadata)


def export_onnx(model: nn.Module, description: dict[str, Any], path: str | Path) -> None:
    """Writes an ONNX file that takes normalised images ``(batch, C, H, W)`` of any batch size and gives logits.

    Args:
        model: the student.
        description: the run's ``recipe.json``.
        path: the file.

    Raises:
        UserError: the packages onnx and onnxscript are not installed, or the student is a detector.
    """
    if description["data"].get("task") == "detection":
        raise UserError(
            "a detector is not exported to ONNX: how many boxes it finds depends on the pixels, and its pictures come "
            "in a list. Write .safetensors, and fastmkd.nn.detectors.build_detector makes the network that loads it."
        )
    absent = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if absent:
        raise UserError(f"exporting to ONNX needs {' and '.join(absent)}: pip install onnx onnxscript.")
    data = description["data"]
    # Two images, because torch.export takes a size of 1 for a constant.
    images = torch.zeros(2, data["channels"], data["image_size"], data["image_size"])
    program = torch.onnx.export(
        model,
        (images,),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    atomic_write(path, lambda part: program.save(str(part), external_data=False))


def main(argv: Sequence[str]) -> int:
    """Writes the student of a finished run to a file; the suffix chooses the format.

    Args:
        argv: after the command's name.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="fastmkd export", exit_on_error=False, allow_abbrev=False, description=__doc__)
    parser.add_argument("run", type=str, help="folder of a finished run")
    parser.add_argument(
        "--out", type=str, help="file to write, such as student.safetensors or student.onnx", required=True
    )
    arguments = parse(parser, argv)
    model, description = trained_student(RunDir(Path(arguments.run)))
    writers = {".safetensors": export_safetensors, ".onnx": export_onnx}
    suffix = Path(arguments.out).suffix
    if suffix not in writers:
        raise UserError(f"--out is {arguments.out}; expected a name that ends in .safetensors or .onnx.")
    writers[suffix](model, description, arguments.out)
    sys.stdout.write(f"wrote {arguments.out}\n")
    return 0
