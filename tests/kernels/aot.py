"""Compiles every AOT_CASES entry of fastmkd.kernels for GPUs that this machine does not have.

Run as a child process, with the interpreter off, since Triton decides at import which of the two it is:

    TRITON_INTERPRET=0 python tests/kernels/aot.py REPORT.json [--all]

The report is a list of records: kernel file, case, architecture, registers, shared memory in bytes, and the faults as
sentences; an empty list is a pass. Without ``--all`` one case of a kernel file, with matrix products if it has any, is
compiled and disassembled for every architecture; the others are compiled for one, in turn, and asked what they use.
With it that one case is also asked what it uses on GPUs with little shared memory.
Two cases that are spoilt on purpose, under the kernel name "spoilt", show that faults are found.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ARCHS = (80, 90, 100)
SMALL_ARCHS = (89, 120)  # laid out as for sm_80, in less shared memory
# Bytes that a block may have. That of sm_80 are 163 KiB, but its tiles must fit the smaller ones too.
SHARED_LIMIT = {80: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
TENSOR_CORE = {80: r"\bHMMA", 90: r"\bHGMMA", 100: r"\bUTC\w*MMA"}
STACK_OF_OLD = (
    32  # bytes that Tritons may spill that are older than 3.7: tiles were chosen with the ptxas of newer ones
)
LOCAL_MEMORY = r"\b(STL|LDL)\b"


def kernel_modules():
    """Every module of fastmkd.kernels that lists compile cases."""
    import fastmkd.kernels as package

    modules = (importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__))
    return [module for module in modules if hasattr(module, "AOT_CASES")]


def compile_case(case, arch):
    """Compiles `case` for `arch`; the result is what `inspect` takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    # What a real launch knows about its arguments: pointers, and the named integers, are multiples of 16.
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in case.aligned
    }
    source = ASTSource(case.kernel, signature, dict(case.constexprs), attrs)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(case.options))


def inspect(case, arch, compiled):
    """Returns what the machine code uses, and the faults as sentences."""
    import triton

    usage = _dump(compiled.asm["cubin"], "-res-usage")
    stack = int(re.search(r"STACK:(\d+)", usage)[1])
    if stack <= STACK_OF_OLD and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        stack = 0
    # Disassembly takes as long as compilation; what spills has a stack frame to spill to.
    asked = stack or case.mma or case.requires or case.forbids
    sass = _dump(compiled.asm["cubin"], "-sass") if asked else ""
    shared = compiled.metadata.shared
    checks = [
        (stack > 0, f"uses a stack frame of {stack} bytes"),
        (stack and re.search(LOCAL_MEMORY, sass), "spills registers to local memory"),
        (shared > SHARED_LIMIT[arch], f"wants {shared} bytes of shared memory, the limit is {SHARED_LIMIT[arch]}"),
        (case.mma and not re.search(TENSOR_CORE[arch], sass), "has no tensor-core instruction"),
        *((not re.search(pattern, sass), f"lacks {pattern}") for pattern in case.requires),
        *((re.search(pattern, sass), f"contains {pattern}") for pattern in case.forbids),
    ]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "shared": shared,
        "faults": [sentence for failed, sentence in checks if failed],
    }


def _dump(cubin, flag):
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([cuobjdump, flag, file.name], check=True, capture_output=True, text=True).stdout


def jobs(everything):
    """(kernel file, case, architecture) of what is to be compiled; see above."""
    turn = itertools.cycle(ARCHS)
    for module in kernel_modules():
        name, cases = module.__name__.rpartition(".")[2], module.AOT_CASES
        everywhere = next((case for case in cases if case.mma), cases[0])
        for case in cases:
            if everything or case is everywhere:
                yield from ((name, case, arch) for arch in ARCHS)
            else:
                yield name, uses_only(case), next(turn)
        if everything:
            yield from ((name, uses_only(everywhere), arch) for arch in SMALL_ARCHS)


def uses_only(case):
    """A case that asks what the machine code uses, not what is in it."""
    return dataclasses.replace(case, mma=False, requires=(), forbids=())


def spoilt():
    """The resize with fusion allowed, and 128 values a thread in the selection."""
    from fastmkd.kernels.select_tokens import AOT_CASES as CASES

    yield "spoilt", dataclasses.replace(CASES[0], options={"enable_fp_fusion": True}), 90
    yield "spoilt", dataclasses.replace(CASES[-1], constexprs={"BLOCK": 4096}, options={"num_warps": 1}), 90


def main(report, *options):
    records = []
    # Disassembly is a process of its own: it runs beside the next compilation.
    with ThreadPoolExecutor(1) as pool:
        for kernel, case, arch in (*jobs("--all" in options), *spoilt()):
            label = {"kernel": kernel, "case": case.name, "arch": arch}
            try:
                records.append((label, pool.submit(inspect, case, arch, compile_case(case, arch))))
            except Exception as error:  # a case that fails to compile must not hide the others
                fault = f"does not compile: {type(error).__name__}: {error}"
                records.append((label, pool.submit(dict, faults=[fault])))
        finished = [{**label, **future.result()} for label, future in records]
    Path(report).write_text(json.dumps(finished, indent=1))


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("set TRITON_INTERPRET=0: interpreted kernels cannot be compiled.")
    main(*sys.argv[1:])
