"""Rivals: decoders in ONNX files, vLLM's two runs, and the table of all."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner

from secateur.bench import measure_latency
from secateur.bench.onnx_runner import _onnxruntime, open_onnx
from secateur.bench.results import Spread
from secateur.bench.rivals import RivalsResult, unpaired
from secateur.bench.runners import Workload, prompts
from secateur.cli import app
from secateur.errors import EnvironmentFault, ModelError
from secateur.recipe import Latency

VOCABULARY = 11


def make_decoder(path: Path, past: bool = True) -> Path:
    """The next token is the sum of all tokens and of the mask so far, modulo 11; the cache keeps
    the tokens."""
    wide, real = TensorProto.INT64, TensorProto.FLOAT
    cache = ["batch", 1, "past", 1]
    inputs = [
        helper.make_tensor_value_info("input_ids", wide, ["batch", "new"]),
        helper.make_tensor_value_info("attention_mask", wide, ["batch", "all"]),
        helper.make_tensor_value_info("past_key_values.0.key", real, cache),
    ]
    outputs = [
        helper.make_tensor_value_info("logits", real, ["batch", 1, VOCABULARY]),
        helper.make_tensor_value_info("present.0.key", real, cache),
    ]
    constants = {"axes": [1, 3], "rest": [1, 2, 3], "one": [1], "n": [VOCABULARY], "top": [-1]}
    initializers = [
        helper.make_tensor(name, wide, [len(value)], value) for name, value in constants.items()
    ]
    initializers.append(helper.make_tensor("values", real, [2], [0.0, 1.0]))
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["real"], to=real),
        helper.make_node("Unsqueeze", ["real", "axes"], ["new"]),
        helper.make_node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2),
        helper.make_node("ReduceSum", ["present.0.key", "rest"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", ["attention_mask", "one"], ["seen"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["total"], to=wide),
        helper.make_node("Add", ["total", "seen"], ["both"]),
        helper.make_node("Mod", ["both", "n"], ["next"]),
        helper.make_node("OneHot", ["next", "n", "values"], ["flat"]),
        helper.make_node("Unsqueeze", ["flat", "one"], ["logits"]),
    ]
    if not past:
        inputs = inputs[:2]
        nodes[2] = helper.make_node("Identity", ["new"], ["present.0.key"])
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def test_an_onnx_decoder_reads_on_from_its_cache(tmp_path: Path) -> None:
    decoder, _, vocabulary = _onnxruntime(make_decoder(tmp_path / "model.onnx"), 1)
    assert vocabulary == VOCABULARY
    load = Workload(prompt=6, new_tokens=5, batch=3)
    text = prompts(VOCABULARY, load)
    token, cache = decoder.step(text, decoder.empty(3), 0)
    for at in range(5):
        # By the definition: the sum of everything read so far, and of as many ones.
        expected = (text.sum(1) + text.shape[1]) % VOCABULARY
        assert token[:, 0].tolist() == expected.tolist()
        text = np.concatenate([text, token], axis=1)
        token, cache = decoder.step(token, cache, 6 + at)
    assert cache["past_key_values.0.key"][:, 0, :, 0].tolist() == text.tolist()


def test_onnx_files_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make_decoder(tmp_path / "model.onnx")
    quick = Latency.model_validate(
        {"prompt": 4, "new_tokens": 2, "batch": "1,2", "rounds": 2, "min_seconds": 0}
    )
    (model,) = measure_latency([file], quick, threads=1).models
    assert (model.engine, model.bytes) == ("onnxruntime", file.stat().st_size)
    assert [point.batch for point in model.points] == [1, 2]
    with pytest.raises(ModelError, match="no decoder with a KV cache"):
        open_onnx(make_decoder(tmp_path / "whole.onnx", past=False), "onnxruntime", 1)
    (tmp_path / "broken.onnx").write_text("no")
    with pytest.raises(ModelError, match="cannot open"):
        open_onnx(tmp_path / "broken.onnx", "onnxruntime", 1)
    for library, engine in (("onnxruntime", "onnxruntime"), ("openvino", "openvino")):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(EnvironmentFault, match="which is not installed"):
            open_onnx(file, engine, 1)


def test_an_unpaired_ratio_by_hand() -> None:
    # 12/4 = 3; relative errors 2/12 and 1/4 of a sample, over √2 and √2 of the means
    found = unpaired(Spread.of([10, 14]), Spread.of([3, 5]))
    assert found.value == 3
    relative = ((8**0.5 / 12) ** 2 + (2**0.5 / 4) ** 2) ** 0.5
    assert found.stddev == pytest.approx(3 * relative)
    assert found.standard_error == pytest.approx(3 * relative / 2**0.5)


FAKE_VLLM = """#!{python}
import json, sys
given = dict(zip(sys.argv[1:], sys.argv[2:]))
assert sys.argv[1:3] == ["bench", "latency"] and given["--model"].endswith("dense")
new = int(given["--output-len"])
rounds = int(given["--num-iters"])
latencies = [0.5 + 0.1 * (new - 1) + 0.01 * i for i in range(rounds)]
json.dump({{"latencies": latencies}}, open(given["--output-json"], "w"))
"""


def test_a_table_of_rivals(
    dense: Path, sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sequence[str]] = []

    def in_this_process(arguments: Sequence[str]) -> tuple[Any, int]:
        asked.append(arguments)
        done = CliRunner().invoke(app, [*arguments, "--json", "--quiet"], catch_exceptions=False)
        return json.loads(done.stdout), 1000 + len(asked)

    monkeypatch.setattr("secateur.bench.rivals.run_secateur", in_this_process)
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(FAKE_VLLM.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    file = make_decoder(tmp_path / "model.onnx")
    out = tmp_path / "out.json"
    done = CliRunner().invoke(
        app,
        ["bench", "rivals", str(sparse), "--against", str(dense), "--file", str(file), "--prompt",
         "8", "--new-tokens", "4", "--rounds", "2", "--min-seconds", "0", "--threads", "1",
         "--passes", "2", "--output", str(out), "--quiet"],
        catch_exceptions=False,
    )  # fmt: skip
    result = RivalsResult.model_validate_json(out.read_text())
    base, ours, torch_row, llama, ort, openvino, vllm = result.rows
    engines = [row.engine for row in result.rows]
    expected = ["native", "native", "transformers", "llama.cpp", "onnxruntime", "openvino", "vllm"]
    assert engines == expected
    assert [row.path for row in result.rows[:3]] == [str(dense), str(sparse), str(dense)]
    # Two passes, the second in reverse; what is absent is not run again.
    ran = [(arguments[2], arguments[4]) for arguments in asked]
    ones = [(str(dense), "auto"), (str(sparse), "auto"), (str(dense), "transformers")]
    ones += [(str(file), "auto")]
    assert [one for one in ran if one[1] != "openvino"] == [*ones, *ones[::-1]]
    assert sum(one[1] == "openvino" for one in ran) in (1, 2)  # is it installed?
    for row in (base, ours, torch_row, ort):
        assert row.absent is None
        assert row.decode_tokens_per_s is not None
        assert len(row.decode_tokens_per_s.samples) == 4
    assert base.peak_rss_bytes == 1000 + len(asked)  # the greater of its two
    assert base.decode_speedup is None
    assert ours.decode_speedup is not None
    assert ours.decode_tokens_per_s is not None
    assert base.decode_tokens_per_s is not None
    assert ours.decode_speedup.value == pytest.approx(
        ours.decode_tokens_per_s.mean / base.decode_tokens_per_s.mean
    )
    assert llama.absent is not None
    assert "no .gguf file" in llama.absent
    assert (openvino.absent is None) == (openvino.decode_tokens_per_s is not None)
    # Its first runs take .5 and .51 s for 8 tokens, the second .9 and .91 for 4 more.
    assert vllm.prefill_tokens_per_s is not None
    assert vllm.decode_tokens_per_s is not None
    assert vllm.prefill_tokens_per_s.samples == pytest.approx((8 / 0.5, 8 / 0.51) * 2)
    assert vllm.decode_tokens_per_s.samples == pytest.approx((4 / 0.395, 4 / 0.405) * 2)
    assert vllm.peak_rss_bytes is not None
    assert vllm.peak_rss_bytes > 2**20
    assert f"absent: llama.cpp, {dense}: no .gguf file" in done.stdout


def test_vllm_may_be_absent(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.bench.rivals import _run_vllm

    monkeypatch.setenv("PATH", "")
    with pytest.raises(EnvironmentFault, match="no command vllm"):
        _run_vllm(str(dense), Latency(), 1)
