"""Runners: what each engine computes in a run, and which engine a comparison takes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur.bench import measure_latency
from secateur.bench.runners import Workload, choose_engine, open_native, prompts
from secateur.errors import EnvironmentFault, UsageError
from secateur.recipe import Latency
from secateur.serve.native.model import NativeModel
from secateur.serve.native.step import Batch

QUICK = Latency(prompt=20, new_tokens=5, batch=2, rounds=2, min_seconds=0)


def test_a_native_run_is_greedy_decoding(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Batch] = []
    step = NativeModel.step

    def recorded(model: NativeModel, batch: Batch) -> Any:
        steps.append(batch)
        return step(model, batch)

    monkeypatch.setattr(NativeModel, "step", recorded)
    monkeypatch.setattr("secateur.bench.runners._CHUNK", 16)  # 8 tokens of each sequence
    load = Workload(prompt=20, new_tokens=5, batch=2)
    subject = open_native(dense, [load], 1)
    reference_model = AutoModelForCausalLM.from_pretrained(dense)
    for _ in range(2):  # the second run must not see the keys of the first
        steps.clear()
        subject.run(load)
        assert [len(batch.tokens) for batch in steps] == [16, 16, 8, *[2] * 5]
        prompt = torch.from_numpy(prompts(reference_model.config.vocab_size, load)).long()
        read = np.concatenate([batch.tokens.reshape(2, -1) for batch in steps], axis=1)
        reference = reference_model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert np.array_equal(read, reference.numpy())


def test_auto_takes_the_native_engine_where_it_can(dense: Path, tmp_path: Path) -> None:
    assert choose_engine("auto", [dense, "x.gguf"], "cpu", "auto") == ("native", None)
    assert choose_engine("transformers", [dense], "cpu", "auto") == ("transformers", None)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "mamba"}')
    for paths, device, dtype, said in [
        ([dense, other], "cpu", "auto", "mamba"),
        ([dense], "cuda", "auto", "no kernels for cuda"),
        ([dense], "cpu", "float32", "not in float32"),
    ]:
        engine, remark = choose_engine("auto", paths, device, dtype)
        assert engine == "transformers"
        assert said in str(remark)
        with pytest.raises(UsageError, match=said):
            choose_engine("native", paths, device, dtype)
    with pytest.raises(UsageError, match="no engine 'nativ'"):
        choose_engine("nativ", [dense], "cpu", "auto")


def test_both_engines_are_named(dense: Path, sparse: Path) -> None:
    for engine in ("native", "transformers"):
        result = measure_latency([sparse], QUICK, against=dense, engine=engine, threads=1)
        assert [model.engine for model in result.everyone] == [engine] * 2
        assert sum(result.models[0].modules.values()) > 10
    assert "Linear" in result.models[0].modules


def test_llama_cpp_is_asked_for_by_the_file(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.gguf"
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(EnvironmentFault, match=r"llama\.cpp, which is not installed"):
        measure_latency([file], Latency(prompt=8, new_tokens=2), against=dense)
    with pytest.raises(UsageError, match="one sequence"):
        measure_latency([file], QUICK)
