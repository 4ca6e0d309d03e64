"""The ready files of deploy/ name options that there are; those of vLLM's parser: tests/vllm."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer.main
import yaml
from packaging.specifiers import SpecifierSet

from secateur.cli import app
from secateur.serve.vllm import SUPPORTED

DEPLOY = Path(__file__).parents[1] / "deploy"


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def test_the_native_engine_on_kubernetes() -> None:
    deployment, service = documents("kubernetes-cpu.yaml")
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    name, *words = container["args"]
    command = typer.main.get_command(app).commands[name]
    context = command.make_context(name, words, resilient_parsing=False)
    given = context.params
    assert not context.args  # those that it does not know, which it would leave to vLLM
    assert given["port"] == container["ports"][0]["containerPort"]
    assert given["port"] == service["spec"]["ports"][0]["targetPort"]
    assert given["drain_seconds"] < pod["spec"]["terminationGracePeriodSeconds"]
    assert str(given["threads"]) == container["resources"]["requests"]["cpu"]
    assert str(given["directory"]).startswith(container["volumeMounts"][0]["mountPath"])
    assert service["spec"]["selector"] == pod["metadata"]["labels"]
    variables = {parameter.envvar for parameter in command.params if parameter.envvar}
    assert {entry["name"] for entry in container["env"]} <= variables


def test_the_image_has_a_vllm_that_the_plug_in_takes() -> None:
    (version,) = re.findall(r"^ARG VLLM=\S+:v(\S+)", (DEPLOY / "Dockerfile").read_text(), re.M)
    assert version in SpecifierSet(SUPPORTED)
    (spec,) = documents("production-stack.yaml")[0]["servingEngineSpec"]["modelSpec"]
    assert spec["tag"] == version
    assert spec["vllmConfig"]["tensorParallelSize"] == spec["requestGPU"]
