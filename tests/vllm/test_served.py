"""Packed models behind vLLM's own server, against their dense twins on the same engine."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from secateur.compile import pack_model, write_compressed_tensors, write_dense
from tests.test_deploy import DEPLOY, documents

from .conftest import PYTHON, command, make_pruned, served

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]
LAYER = "model.layers.1.mlp.down_proj"


def test_the_twin_does_not_repeat_itself(expected: list[list[int]]) -> None:
    """Else equal answers would mean little."""
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    assert len({token for tokens in expected for token in tokens}) > 50


def test_greedy_answers_are_those_of_the_dense_twin(
    packed: Path, prompts: list[list[int]], expected: list[list[int]], tmp_path: Path
) -> None:
    """As vLLM compiles the model, which would end at a graph break."""
    with served(packed, tmp_path / "log") as server:
        assert [server.tokens(prompt) for prompt in prompts] == expected
        log = server.log.read_text()
    assert "mlp.gate_up_proj (2): layout bitmask, " in log
    assert "mlp.down_proj (2): layout 2:4, " in log
    assert "self_attn.qkv_proj (2): layout 2:4" in log
    assert "self_attn.o_proj (2): not packed, dense in vLLM" in log


def test_two_processes_answer_the_same(
    packed: Path, prompts: list[list[int]], expected: list[list[int]], tmp_path: Path
) -> None:
    options = ("--enforce-eager", "--tensor-parallel-size", "2")
    with served(packed, tmp_path / "log", *options) as server:
        assert [server.tokens(prompt) for prompt in prompts] == expected


def test_integers_and_the_way_without_kernels(
    pruned: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    """int4 weights of two processes are those of the dense twin that `compile` writes."""
    pack_model(pruned, tmp_path / "int4", values="int4", quantize="rtn", group_size=64)
    write_dense(tmp_path / "int4", tmp_path / "twin")
    eager = "--enforce-eager"
    with served(tmp_path / "twin", tmp_path / "twin.log", eager) as server:
        expected = [server.tokens(prompt) for prompt in prompts]
    with served(
        tmp_path / "int4",
        tmp_path / "int4.log",
        eager,
        "--tensor-parallel-size=2",
        SECATEUR_ACTIVATIONS="fp32",
    ) as server:
        assert [server.tokens(prompt) for prompt in prompts] == expected
    with served(tmp_path / "int4", tmp_path / "off.log", eager, SECATEUR_KERNELS="off") as server:
        assert [server.tokens(prompt) for prompt in prompts] == expected
        assert "dense in vLLM: SECATEUR_KERNELS=off" in server.log.read_text()


@pytest.mark.parametrize("values", [None, "int8"])
def test_an_orphan_answers_as_its_dense_twin(
    values: str | None, prompts: list[list[int]], tmp_path: Path
) -> None:
    """sparse-24-bitmask, which vLLM alone refuses, with float weights and with scaled ones."""
    two_of_four = {name: "2:4" for name in ("q_proj", "v_proj", "gate_proj", "down_proj")}
    pruned = make_pruned(tmp_path / "pruned", two_of_four)
    write_compressed_tensors(pruned, tmp_path / "orphan", values=values)  # type: ignore[arg-type]
    write_dense(tmp_path / "orphan", tmp_path / "twin")
    eager = "--enforce-eager"
    with served(tmp_path / "twin", tmp_path / "twin.log", eager) as server:
        expected = [server.tokens(prompt) for prompt in prompts]
    fp32 = {"SECATEUR_ACTIVATIONS": "fp32"}
    with served(tmp_path / "orphan", tmp_path / "log", eager, **fp32) as server:
        assert [server.tokens(prompt) for prompt in prompts] == expected
        log = server.log.read_text()
    assert "self_attn.qkv_proj (2), model.layers.*.mlp.gate_up_proj (2): layout 2:4" in log
    assert "mlp.down_proj (2): layout 2:4" in log


def run(directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(directory, "--port", "0", "--enforce-eager"),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def test_a_tensor_of_another_shape_is_refused_at_once(packed: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    name = f"{LAYER}.weight_values"
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    ended = run(copy)
    assert ended.returncode == 3
    assert f"tensor {name!r} is damaged: shape" in ended.stderr


def test_a_mask_that_contradicts_its_values_is_refused(packed: Path, tmp_path: Path) -> None:
    """Every header is right: only the process that loads the weights can see it."""
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    name = f"{LAYER}.weight_bitmask"
    tensors[name][3, 5] ^= 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    ended = run(copy)
    assert ended.returncode != 0
    assert f"tensor {name!r} is damaged: " in ended.stdout + ended.stderr


def test_the_arguments_of_the_deployment_files(packed: Path) -> None:
    """vLLM's own parser and engine take what deploy/ gives it, and the image's check passes."""
    (spec,) = documents("production-stack.yaml")[0]["servingEngineSpec"]["modelSpec"]
    stack = spec["vllmConfig"]
    words = [
        *("--tensor-parallel-size", str(stack["tensorParallelSize"])),
        *("--max-model-len", str(stack["maxModelLen"]), "--dtype", stack["dtype"]),
        *stack["extraArgs"],
    ]
    application = documents("ray-serve.yaml")[0]["applications"][0]
    options = application["args"]["llm_configs"][0]["engine_kwargs"]
    check = re.search(r'python3 -c "(.*)"', (DEPLOY / "Dockerfile").read_text())
    assert check is not None
    code = f"""
import argparse
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
found = make_arg_parser(FlexibleArgumentParser()).parse_args({words!r})
assert found.tensor_parallel_size == {stack["tensorParallelSize"]}, found
assert AsyncEngineArgs(model={str(packed)!r}, **{options!r}).tensor_parallel_size == 2
{check[1]}
"""
    ran = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.startswith("vLLM 0.")
