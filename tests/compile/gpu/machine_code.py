"""Compile the Triton kernels ahead of time for GPUs that are not here, and count instructions.

    TRITON_INTERPRET=0 python tests/compile/gpu/machine_code.py 80:2:4:bf16 90:50%:int8

prints as JSON, by configuration, how often each instruction occurs (operation and modifiers), and
the instructions of the loop over blocks for each weight and thread.
Run as a program because triton is imported either interpreted or not.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

STORED = {"bf16": "*bf16", "fp16": "*fp16", "int8": "*u8", "int4": "*u8", "fp8": "*u8"}
BITS = {"bf16": 16, "fp16": 16, "int8": 8, "int4": 4, "fp8": 8}
# As the 16-byte aligned pointers and multiples of 16 of a language model's layers are given.
ALIGNED = [["tt.divisibility", 16]]


def assembly(capability: int, pattern: str, values: str, width: int, kernel: str) -> list[str]:
    """The instructions of a kernel, with a line ``LABEL name`` where a label is."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from secateur.compile.gpu import triton_kernels
    from secateur.compile.gpu.triton_product import STAGES

    rows, columns, warps = shape_of(pattern, width, kernel)
    half = "*fp16" if values == "fp16" else "*bf16"
    types: dict[str, Any] = {"values": STORED[values], "bits": "*u8", "starts": "*i32"}
    types |= {
        "scales": "*fp32" if values == "fp8" else "*fp16",
        "dense": half,
        "x": half,
        "bias": half,
        "y": half,
    }
    types |= dict.fromkeys(("tokens", "rows", "columns", "blocks"), "i32")
    types |= dict.fromkeys(("padded_rows", "padded"), "i32")
    constants = {"BT": 16, "BR": rows, "BK": width, "TWO_FOUR": pattern == "2:4"}
    constants |= {"BITS": BITS[values], "FP8": values == "fp8", "BIAS": False}
    constants |= {"SPAN": columns, "GROUP": width}
    function = getattr(triton_kernels, kernel)
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    names = function.arg_names
    aligned = {
        (i,): ALIGNED
        for i, name in enumerate(names)
        if name in ("rows", "columns", "padded_rows", "padded")
        or str(types.get(name, "")).startswith("*")
    }
    signature = {name: types.get(name, "constexpr") for name in names}
    made = triton.compile(
        ASTSource(function, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": STAGES},
    )
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        told = subprocess.run(
            [tools / "nvdisasm", "-c", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.findall(r"^(\.L_x_\d+):|^\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", told, re.MULTILINE)
    return [f"LABEL {label}" if label else instruction for label, instruction in found]


def shape_of(pattern: str, width: int, kernel: str) -> tuple[int, int, int]:
    """Rows and columns that a program takes at once, and its warps; as `triton_product` has it."""
    from secateur.compile.gpu.triton_product import warps_of

    if kernel == "one_token":
        return 8, 1024, 4
    rows = 4096 // width
    if kernel == "product" and pattern == "2:4":
        rows = max(64, rows)
    return rows, width, warps_of(rows)


def operation(instruction: str) -> str:
    """Its name and modifiers, without the predicate."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def loop(code: list[str]) -> list[str]:
    """The longest piece that a branch jumps back over."""
    labels = {line.split()[1]: i for i, line in enumerate(code) if line.startswith("LABEL")}
    bodies = [
        code[labels[jump[1]] : i + 1]
        for i, line in enumerate(code)
        if (jump := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)) and labels[jump[1]] < i
    ]
    body = max(bodies, key=len, default=[])
    return [line for line in body if not line.startswith("LABEL")]


def main(wanted: list[str]) -> None:
    """Print the facts of each configuration CAPABILITY:PATTERN:VALUES[:WIDTH[:KERNEL]]."""
    facts = {}
    for text in wanted:
        form = re.fullmatch(r"(\d+):(2:4|\d+%):(\w+?)(?::(\d+))?(?::(\w+))?", text)
        assert form is not None, text
        width, kernel = int(form[4] or 128), form[5] or "product"
        code = assembly(int(form[1]), form[2], form[3], width, kernel)
        counts = Counter(operation(line) for line in code if not line.startswith("LABEL"))
        rows, columns, warps = shape_of(form[2], width, kernel)
        each = len(loop(code)) * 32 * warps / (rows * columns)
        facts[text] = {"operations": counts, "instructions_per_weight": round(each, 2)}
    json.dump(facts, sys.stdout)


if __name__ == "__main__":
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    main(sys.argv[1:])
