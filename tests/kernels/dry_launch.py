"""Launches every Triton kernel on a GPU that this machine does not have, as far as its first intermediate code.

Run as a child process, with the interpreter off, since Triton decides at import which of the two it is; what is patched
here ends with the process:

    TRITON_INTERPRET=0 python tests/kernels/dry_launch.py REPORT.json [--all]

A real launch makes an integer that equals 1 a constant, and knows of the others and of pointers whether 16 divides
them. Neither the interpreter nor a compilation for given types does that, so a kernel may pass both and fail on a GPU.
Here Triton's own launch code binds and specialises the arguments, for every sample of the registry; only the driver is
replaced, and the compilation ends with the first form of the kernel (TTIR). Without ``--all`` the dtypes, among them
TF32, take turns at the samples. Since samples make few integers 1, every integer of every kernel is also set to 1 on
its own, and all of a kernel together.

The report has "launches", the kernels that each sample of an op launched; "ones", the integers tried of each kernel;
"faults", sentences about what failed; and "spoilt", the faults of a kernel that cannot be launched with 1.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch

TARGET = ("cuda", 90, 32)


def full_name(kernel):
    """Such as "select_tokens._resize_kernel"."""
    return f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"


class DryRun:
    """Stands for the GPU: Triton asks it what a driver knows, and hands it kernels to compile."""

    def __init__(self):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler.compiler import make_backend
        from triton.runtime.jit import JITFunction

        self.target = GPUTarget(*TARGET)
        self.backend = make_backend(self.target)
        self.now, self.launches, self.faults, self.seen = "", defaultdict(list), [], set()
        driver = SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: self.target,
            get_active_torch_device=lambda: torch.device("cpu"),
        )
        triton.runtime.driver.set_active(driver)

        def compile_dry(kernel, key, signature, device, constexprs, options, attrs, warmup):
            self.launches[self.now].append(full_name(kernel))
            if (kernel, key) not in self.seen:
                self.seen.add((kernel, key))
                self.lower(kernel, signature, constexprs, attrs, options)
            # A launch without a kernel ends here.

        JITFunction._do_compile = compile_dry

    def lower(self, kernel, signature, constexprs, attrs, options):
        """Translates a kernel to TTIR; a failure is noted."""
        from triton._C.libtriton import ir
        from triton.compiler import ASTSource

        source = ASTSource(kernel, signature, constexprs, attrs)
        context = ir.context()
        ir.load_dialects(context)
        self.backend.load_dialects(context)
        functions, modules = self.backend.get_codegen_implementation(options), self.backend.get_module_map()
        try:
            source.make_ir(self.target, options, functions, modules, context)
        except Exception as error:  # one kernel that fails must not hide the others
            self.fault(kernel, error)

    def fault(self, subject, error):
        name = getattr(subject, "__name__", subject)
        self.faults.append(f"{name}, {self.now}: {type(error).__name__}: {str(error).strip()}")


def jobs(everything):
    """(op, sample, dtype, precision of fp32 products) of what is to be launched; see above."""
    from fastmkd.ops import OPS

    for op in OPS.values():
        if "triton" not in op.backends:
            continue
        dtypes = op.backends["triton"].dtypes
        ways = [(dtype, "ieee") for dtype in dtypes]
        ways += [(torch.float32, "tf32")] if torch.float32 in dtypes else []
        for number, (dtype, precision) in enumerate(ways):
            for turn, sample in enumerate(op.samples("cpu", dtype)):
                if not sample.huge and (everything or turn % len(ways) == number):
                    yield op, sample, dtype, precision


def launch_samples(dry, everything):
    """Samples of every op that has Triton launchers."""
    for op, sample, dtype, precision in jobs(everything):
        torch.backends.cuda.matmul.fp32_precision = precision
        dry.now = f"{op.name} {sample.name} {'tf32' if precision == 'tf32' else str(dtype)[6:]}"
        try:
            op.backends["triton"].run(*sample.args)
        except Exception as error:
            dry.fault("launcher", error)


def set_to_one(dry):
    """Every integer of every kernel as the constant 1; the result lists them by kernel."""
    from aot import kernel_modules

    tried = {}
    for module in kernel_modules():
        by_kernel = {}
        for case in module.AOT_CASES:
            by_kernel.setdefault(case.kernel, []).append(case)
        for kernel, cases in by_kernel.items():
            # The case with the fewest integers that are constants already.
            case = max(cases, key=lambda case: list(case.signature.values()).count("i32"))
            free = {parameter.name for parameter in kernel.params if not parameter.do_not_specialize}
            ints = [name for name, kind in case.signature.items() if kind == "i32" and name in free]
            tried[full_name(kernel)] = ints
            for ones in [*([name] for name in ints), ints] if ints else []:
                dry.now = " = ".join((*ones, "1"))
                types = {name: case.signature.get(name, "constexpr") for name in kernel.arg_names}
                types.update(dict.fromkeys(ones, "constexpr"))
                constants = {**case.constexprs, **dict.fromkeys(ones, 1)}
                dry.lower(kernel, types, constants, {}, dry.backend.parse_options(dict(case.options)))
    return tried


def launch_spoilt(dry):
    """A kernel that takes any size but 1: the fault this file is for."""
    from spoilt_kernel import spoilt_kernel

    for size in (2, 1):
        dry.now = f"size {size}"
        spoilt_kernel[(1,)](torch.zeros(1, dtype=torch.int64), size)


def main(report, *options):
    dry = DryRun()
    launch_samples(dry, "--all" in options)
    found = {"launches": dict(dry.launches), "ones": set_to_one(dry), "faults": dry.faults}
    dry.faults = found["spoilt"] = []
    launch_spoilt(dry)
    Path(report).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("set TRITON_INTERPRET=0: interpreted kernels cannot be compiled.")
    main(*sys.argv[1:])
