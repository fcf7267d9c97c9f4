"""Compile the kernels for compute capability 9.0 and print their registers and spills; exit 3 if not possible.

python tests/kernels/triton_compiled.py
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kalman_rl.kernels.filter import cuda_kernels as filters
from kalman_rl.kernels.filter.cuda import BLOCK, WARPS
from kalman_rl.kernels.loss import cuda as fused
from kalman_rl.kernels.loss import plan

FLOATS = ("z", "logp", "old", "advantage", "constants", "table", "limits", "whole", "variance", "mean", "maps", "g",
          "out", "gains", "carried", "log_ratio", "log_weight", "coefficient", "gradient", "statistics")  # fmt: skip
INTEGERS = ("first", "count", "starts", "bad")
ROW = {"SPLIT": 0, "FLAGS": False, "BLOCK": BLOCK}
LOSS = {"TRUST": plan.CLIP, "SHARED": True, "BLOCK": BLOCK}
KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "means, table": (filters.means_kernel, ROW | {"HOLES": False, "STORE": False}),
    "means, holes": (filters.means_kernel, ROW | {"HOLES": True, "STORE": True}),
    "adjoint, table": (filters.adjoint_kernel, ROW | {"HOLES": False}),
    "adjoint, holes": (filters.adjoint_kernel, ROW | {"HOLES": True}),
    "fused, table": (fused.fused_kernel, LOSS | {"RATIO": plan.FILTERED, "HOLES": False}),
    "fused, holes": (fused.fused_kernel, LOSS | {"RATIO": plan.FILTERED, "HOLES": True}),
    "fused, token": (fused.fused_kernel, LOSS | {"RATIO": plan.TOKEN, "HOLES": False}),
}


def compiled(kernel: Any, constants: dict[str, Any]) -> bytes:
    """Machine code, with the widest loads that aligned tensors allow."""
    names = kernel.arg_names
    signature = {}
    for name in names:
        pointer = "*fp32" if name in FLOATS else "*i32" if name in INTEGERS else "*u8"
        signature[name] = "constexpr" if name in constants else "i32" if name.isupper() else pointer
    multiples = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(names) if name not in constants}
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, multiples)
    options = {"num_warps": WARPS}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]


def usage(code: bytes, reader: Path) -> tuple[int, int]:
    """Registers a thread, and bytes of local memory, which is where spilled registers go."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(code)
        command = [str(reader), "--dump-resource-usage", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (re.findall(rf"{word}:(\d+)", said) for word in ("REG", "STACK", "LOCAL"))
    return max(map(int, registers)), sum(map(int, stack + local))


def main() -> None:
    reader = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not reader.exists():
        print("no cuobjdump beside Triton, so registers and spills cannot be told")
        sys.exit(3)
    for name, (kernel, constants) in KERNELS.items():
        registers, spilled = usage(compiled(kernel, constants), reader)
        print(f"{name}: {registers} registers, {spilled} bytes spilled", flush=True)


if __name__ == "__main__":
    main()
