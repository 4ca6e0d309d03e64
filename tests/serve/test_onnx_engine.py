"""The engine onnx, over HTTP and alone, against transformers; its cache of folded models."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from secateur.bench import measure_latency
from secateur.compile import write_onnx
from secateur.errors import EnvironmentFault, ModelError, UsageError
from secateur.model import load_causal_lm, load_tokenizer
from secateur.recipe import Latency
from secateur.serve import NativeOptions, load
from secateur.serve.engine import Engine, GenerationRequest
from secateur.serve.onnx.session import OnnxModel, parse_providers
from secateur.serve.sampling import SamplingParameters
from tests.serve.conftest import make_llama, start_server

GREEDY = SamplingParameters(temperature=0.0)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of which two of every four weights are zero."""
    folder = make_llama(tmp_path_factory.mktemp("onnx-engine") / "zeros")
    model = load_causal_lm(folder, torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            groups = module.weight.data.view(-1, 4)
            smallest = groups.abs().topk(2, largest=False).indices
            groups.scatter_(1, smallest, 0.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def directory(dense: Path, cache: Path) -> Path:
    write_onnx(dense, dense.parent / "model")
    return dense.parent / "model"


@pytest.fixture(scope="module")
def cache(dense: Path) -> Path:
    return dense.parent / "cache"


@pytest.fixture(autouse=True)
def own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(cache))


def generate(engine: Engine, *prompts: list[int], **options: Any) -> list[list[Any]]:
    """The events of requests that run at the same time."""

    async def scenario() -> list[list[Any]]:
        requests = [GenerationRequest(tuple(one), GREEDY, **options) for one in prompts]
        running = [engine.submit(request) for request in requests]

        async def read(one: Any) -> list[Any]:
            return [event async for event in one]

        return await asyncio.gather(*map(read, running))

    return asyncio.run(scenario())


def test_greedy_tokens_are_those_of_transformers(dense: Path, directory: Path) -> None:
    model = load_causal_lm(dense, torch.float32)
    prompts = [[5, 6, 7], list(range(10, 40))]
    engine = load(directory, threads=1)  # auto
    assert engine.name == "onnx"
    try:
        answers = generate(engine, *prompts, max_tokens=64, ignore_eos=True)
    finally:
        engine.close()
    for prompt, events in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        want = model.generate(
            ids, do_sample=False, min_new_tokens=64, max_new_tokens=64, eos_token_id=None
        )
        assert [event.token_id for event in events] == want[0, len(prompt) :].tolist()


def test_prompt_logprobs_are_those_of_transformers(dense: Path, directory: Path) -> None:
    prompt = np.random.default_rng(0).integers(3, 300, 300).tolist()  # more than one piece
    engine = load(directory, engine="onnx", threads=1)
    try:
        (events,) = generate(engine, prompt, max_tokens=1, prompt_logprobs=1)
    finally:
        engine.close()
    with torch.inference_mode():
        logits = load_causal_lm(dense, torch.float32)(input_ids=torch.tensor([prompt])).logits[0]
    table = logits.log_softmax(-1)
    scored = events[0].prompt_logprobs
    assert scored[0] is None
    assert len(scored) == 300
    for place in range(1, 300):
        assert scored[place].logprob == pytest.approx(
            float(table[place - 1, prompt[place]]), abs=1e-4
        )


def test_serving_over_http(dense: Path, directory: Path, cache: Path) -> None:
    server = start_server(directory, "--engine", "onnx", SECATEUR_CACHE=str(cache))
    try:
        body = {"model": "model", "prompt": "the quick", "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    finally:
        assert server.stop() == 0
    tokenizer = load_tokenizer(dense)
    ids = tokenizer("the quick", return_tensors="pt").input_ids
    model = load_causal_lm(dense, torch.float32)
    want = model.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]
    assert answer["choices"][0]["text"] == tokenizer.decode(want, skip_special_tokens=True)


def test_the_folded_model_is_kept_and_renewed(
    directory: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "kept"))
    ids = np.arange(3, 9)[None]
    plain = OnnxModel.open(directory, 1, keep=False)
    assert plain.graph == directory / "model.onnx"
    first, second = (OnnxModel.open(directory, 1) for _ in range(2))
    assert first.graph == second.graph != plain.graph
    want = plain.step(ids, ())[0]
    for model in (first, second):
        assert np.array_equal(model.step(ids, ())[0], want)
    os.utime(directory / "model.onnx")
    renewed = OnnxModel.open(directory, 1)
    assert renewed.graph != second.graph
    assert not second.graph.exists()


def test_an_unwritable_cache_is_no_obstacle(
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "file"))
    model = OnnxModel.open(directory, 1)
    assert model.graph == directory / "model.onnx"
    assert "is not kept" in capsys.readouterr().err


def test_latency_beside_the_native_engine(dense: Path, directory: Path) -> None:
    settings = Latency(prompt=8, new_tokens=2, rounds=2, min_seconds=0)
    result = measure_latency([directory], settings, against=dense, threads=1)
    assert result.baseline is not None
    assert (result.baseline.engine, result.models[0].engine) == ("native", "onnxruntime")
    assert result.models[0].points[0].decode_speedup is not None
    size = sum(file.stat().st_size for file in directory.glob("model.onnx*"))
    assert result.models[0].bytes == size
    parameters = load_causal_lm(dense, torch.float32).num_parameters()
    assert result.models[0].memory_bytes > 4 * parameters


def test_providers_have_names_and_options() -> None:
    cpu = ("CPUExecutionProvider", {})
    assert parse_providers([]) == [cpu]
    found = parse_providers(["CPU:arena_extend_strategy=kSameAsRequested"])
    assert found == [("CPUExecutionProvider", {"arena_extend_strategy": "kSameAsRequested"})]
    with pytest.raises(UsageError, match="there is no provider 'cdua'"):
        parse_providers(["cdua"])
    with pytest.raises(UsageError, match="'device_id' has no value"):
        parse_providers(["cpu:device_id"])
    with pytest.raises(EnvironmentFault, match="has no MIGraphXExecutionProvider"):
        parse_providers(["migraphx"])


def test_what_is_refused(dense: Path, directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--provider is for ONNX Runtime, not for engine native"):
        load(dense, engine="native", providers=["cpu"])
    with pytest.raises(UsageError, match="only the native engine has this"):
        load(directory, options=NativeOptions(max_length=8))
    with pytest.raises(ModelError, match=r"there is no ONNX file|has no model.onnx"):
        load(dense, engine="onnx")
