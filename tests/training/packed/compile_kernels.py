"""Compiles the fused kernels for a GPU that need not be there, and prints what they became, a JSON line for each.

Run as `python compile_kernels.py CAPABILITY RANK [RANK ...]`, such as `90 16 128`, without Triton's interpreter.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from raylora.training.packed import kernels
from raylora.training.packed.fused import COLUMNS

INT_TABLES = ("thresholds", "starts", "lengths", "ranks", "owners", "firsts")
FLOAT_TABLES = ("scaling", "weights")


def type_of(argument: str) -> str:
    """Type of a kernel's argument, as Triton writes it."""
    if argument in ("n", "n_layers", "layer"):
        return "i32"
    if argument in INT_TABLES:
        return "*i32"
    if argument in FLOAT_TABLES:
        return "*fp32"
    return "*i64" if argument in ("states", "addresses") else "*bf16"


def compiled(kernel: triton.JITFunction, r: int, capability: int) -> dict[str, object]:
    """Registers, spills and instructions of one kernel."""
    constants = {
        "WHICH": 0, "IS_B": kernel is kernels.add_outer, "DROPOUT": True, "R": r, "T": kernels.TILE, "N": COLUMNS[r],
    }  # fmt: skip
    types = {name: "constexpr" if name in constants else type_of(name) for name in kernel.arg_names}
    # torch aligns tensors, and features are multiples of 16
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(types.items())
        if kind.startswith("*") or name == "n"
    }
    source = ASTSource(kernel, signature=types, constexprs=constants, attrs=aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage, code = (
            subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "--dump-sass")
        )
    return {
        "kernel": kernel.__name__,
        "r": r,
        "unspecialized": [parameter.name for parameter in kernel.params if parameter.do_not_specialize],
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "spills": len(re.findall(r"\bSTL\b", code)),
        "tensor_core_products": len(re.findall(r"\bHG?MMA\b", code)),
    }


if __name__ == "__main__":
    for r in map(int, sys.argv[2:]):
        for kernel in (kernels.project, kernels.add_expanded, kernels.add_outer):
            print(json.dumps(compiled(kernel, r, int(sys.argv[1]))))
