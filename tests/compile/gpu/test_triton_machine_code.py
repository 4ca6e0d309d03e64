"""The Triton kernels compiled for sm_80 and sm_90 without a GPU: what the machine code does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("machine_code.py")
# By configuration: 128-bit loads of values and inputs at least, and the tensor core instruction.
# A block of 2:4 int4 has but 8 bytes for a thread, as LDGSTS.64.
CONFIGURATIONS = {
    "80:2:4:bf16": (8, "HMMA.16816.F32.BF16"),
    "80:2:4:int4": (4, "HMMA.16816.F32.BF16"),
    "80:50%:fp16": (8, "HMMA.16816.F32"),
    "80:50%:int8": (4, "HMMA.16816.F32.BF16"),
    "80:2:4:fp8": (4, "HMMA.16816.F32.BF16"),
    "90:2:4:int8:64": (2, "HGMMA.64x16x16.F32.BF16"),
    "90:50%:bf16": (8, "HMMA.16816.F32.BF16"),
}
# What a thread issues for each of its weights; more would be a loss of speed to look into.
MOST = {"2:4": {16: 7.5, 8: 9.5, 4: 9.5}, "50%": {16: 13, 8: 16.5, 4: 17}}
UNPACK = "80:50%:int4:128:unpack"
ONE_TOKEN = {"90:2:4:bf16:128:one_token": 5, "80:2:4:int8:128:one_token": 7.5}
BITS = {"bf16": 16, "fp16": 16, "int8": 8, "int4": 4, "fp8": 8}


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    command = [sys.executable, str(PROGRAM), *CONFIGURATIONS, *ONE_TOKEN, UNPACK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_loads_are_wide_and_nothing_is_spilled(facts: dict[str, Any], name: str) -> None:
    operations = facts[name]["operations"]
    least, product = CONFIGURATIONS[name]
    wide = sum(n for op, n in operations.items() if op.startswith("LDG") and ".128" in op)
    assert wide >= least
    assert operations[product] > 0
    assert not [op for op in operations if op.startswith(("LDL", "STL"))]
    # Never one value or input at a time: the only narrow loads are of scales and starts.
    narrow = sum(n for op, n in operations.items() if op.startswith("LDG.") and ".128" not in op)
    assert narrow <= 4


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_instructions_for_each_weight(facts: dict[str, Any], name: str) -> None:
    _, pattern, values, *_ = name.replace("2:4", "2-4").split(":")
    most = MOST[pattern.replace("-", ":")][BITS[values]]
    assert 3 < facts[name]["instructions_per_weight"] <= most


def test_unpacking_spills_nothing(facts: dict[str, Any]) -> None:
    operations = facts[UNPACK]["operations"]
    assert not [op for op in operations if op.startswith(("LDL", "STL"))]
    assert any(op.startswith("STG") and ".128" in op for op in operations)


@pytest.mark.parametrize("name", ONE_TOKEN)
def test_one_token_needs_neither_tensor_cores_nor_many_instructions(
    facts: dict[str, Any], name: str
) -> None:
    operations = facts[name]["operations"]
    assert facts[name]["instructions_per_weight"] <= ONE_TOKEN[name]
    assert not [op for op in operations if op.startswith(("LDL", "STL", "HMMA", "HGMMA"))]
    assert sum(n for op, n in operations.items() if op.startswith("LDG") and ".128" in op) >= 2
