"""Accuracy against plain references: a loop over windows, and one forward pass per token."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from secateur.bench import AccuracyResult, measure_accuracy
from secateur.bench.accuracy import count_windows, score_window
from secateur.errors import ModelError, UsageError
from secateur.recipe import Accuracy
from tests.conftest import REAL_MODEL


def ids_of(model: Path, text: Path) -> list[int]:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids: list[int] = tokenizer.encode(text.read_text(), add_special_tokens=False).ids
    return ids


@functools.cache
def opened(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path)


def logits_of(path: Path, ids: list[int]) -> torch.Tensor:
    model = opened(path)
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].double()


def settings(text: Path, **changes: int) -> Accuracy:
    return Accuracy(data=str(text), **{"window": 32, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "window", "stride", "windows"),
    [(31, 32, 32, 0), (32, 32, 32, 1), (63, 32, 32, 1), (64, 32, 32, 2), (64, 32, 10, 4)],
)
def test_only_whole_windows_count(tokens: int, window: int, stride: int, windows: int) -> None:
    assert count_windows(tokens, window, stride) == windows
    starts = [s for s in range(0, tokens, stride) if s + window <= tokens]
    assert len(starts) == windows


def test_perplexity_of_the_papers(dense: Path, text: Path) -> None:
    result = measure_accuracy([dense], settings(text))
    ids, total, count = ids_of(dense, text), 0.0, 0
    for start in range(0, len(ids) - 31, 32):
        window = ids[start : start + 32]
        log_p = logits_of(dense, window).log_softmax(-1)
        total -= sum(log_p[i, window[i + 1]].item() for i in range(31))
        count += 31
    assert result.windows == 6
    assert result.predicted_tokens == count == 186
    assert result.models[0].perplexity.value == pytest.approx(math.exp(total / count), rel=1e-6)
    assert result.baseline is None
    assert result.models[0].kl is None


@pytest.mark.parametrize("stride", [1, 8, 31])
def test_overlapping_windows_predict_each_token_once(dense: Path, text: Path, stride: int) -> None:
    """Token by token: the context of token t is its window's text before it, and no more."""
    result = measure_accuracy([dense], settings(text, window=32, stride=stride, windows=3))
    ids, total, predicted = ids_of(dense, text), 0.0, []
    for t in range(1, 32 + 2 * stride):
        start = 0 if t < 32 else -(-(t - 31) // stride) * stride
        log_p = logits_of(dense, ids[start:t])[-1].log_softmax(-1)
        total -= log_p[ids[t]].item()
        predicted.append(t)
    assert result.predicted_tokens == len(predicted) == 31 + 2 * stride
    assert result.models[0].nll.value == pytest.approx(total / len(predicted), rel=1e-6)


def test_kl_and_agreement_against_the_definition(dense: Path, sparse: Path, text: Path) -> None:
    result = measure_accuracy([sparse], settings(text, windows=3), against=dense)
    ids, kl, agree, lost = ids_of(dense, text), [], [], []
    for start in (0, 32, 64):
        window = ids[start : start + 32]
        p = logits_of(dense, window)[:-1].softmax(-1).numpy()
        q = logits_of(sparse, window)[:-1].softmax(-1).numpy()
        kl.append(np.sum(p * np.log(p / q)) / 31)
        agree.append(np.mean(p.argmax(-1) == q.argmax(-1)))
        rows = np.arange(31)
        lost.append(np.mean(np.log(p[rows, window[1:]] / q[rows, window[1:]])))
    model = result.models[0]
    assert model.kl is not None
    assert model.top1_agreement is not None
    assert model.perplexity_ratio is not None
    assert model.kl.value == pytest.approx(np.mean(kl), rel=1e-5)
    assert model.kl.standard_error == pytest.approx(np.std(kl, ddof=1) / math.sqrt(3), rel=1e-4)
    assert model.top1_agreement.value == pytest.approx(np.mean(agree))
    assert 0 < model.top1_agreement.value < 1
    assert model.perplexity_ratio.value == pytest.approx(math.exp(np.mean(lost)), rel=1e-5)
    assert result.baseline is not None
    assert model.perplexity.value / result.baseline.perplexity.value == pytest.approx(
        model.perplexity_ratio.value
    )


def test_a_model_agrees_with_itself_exactly(dense: Path, text: Path) -> None:
    model = measure_accuracy([dense], settings(text), against=dense).models[0]
    assert model.kl is not None
    assert model.top1_agreement is not None
    assert model.perplexity_ratio is not None
    assert (model.kl.value, model.kl.standard_error) == (0.0, 0.0)
    assert model.top1_agreement.value == 1.0
    assert (model.perplexity_ratio.value, model.perplexity_ratio.stddev) == (1.0, 0.0)


def test_scores_do_not_depend_on_the_chunks() -> None:
    torch.manual_seed(0)
    logits, baseline = torch.randn(300, 7), torch.randn(300, 7)
    targets = torch.randint(7, (300,))
    score = score_window(logits, baseline, targets, 5)
    rows = (slice(i, i + 1) for i in range(300))
    parts = [score_window(logits[row], baseline[row], targets[row], 5) for row in rows]
    assert score.nll == pytest.approx(sum(part.nll for part in parts), rel=1e-6)
    assert score.kl == pytest.approx(sum(part.kl or 0 for part in parts), rel=1e-5)
    assert score.agreeing == sum(part.agreeing or 0 for part in parts)


def test_the_result_tells_which_tokens_were_read(dense: Path, text: Path) -> None:
    facts = measure_accuracy([dense], settings(text, windows=2, stride=16)).text
    used = np.array(ids_of(dense, text)[:48], dtype="<i8").tobytes()
    assert facts.sha256 == hashlib.sha256(used).hexdigest()
    assert (facts.tokens, facts.evaluated_tokens) == (201, 48)
    assert facts.name == str(text)


def test_the_result_survives_json(dense: Path, sparse: Path, text: Path) -> None:
    ticks: list[tuple[int, int]] = []
    result = measure_accuracy(
        [sparse, dense],
        settings(text, windows=1),
        against=dense,
        progress=lambda done, total: ticks.append((done, total)),
    )
    plain = result.to_json()
    assert plain["schema"] == "secateur/bench-accuracy/2"
    assert AccuracyResult.model_validate(plain) == result
    assert result.models[0].perplexity.standard_error is None  # one window tells of no spread
    assert ticks == [(0, 1), (1, 1)]


def test_a_text_shorter_than_a_window_is_refused(dense: Path, text: Path) -> None:
    short = text.with_name("short.txt")
    short.write_text("abc")
    with pytest.raises(ModelError, match="has 3 tokens, fewer than one window of 32") as fault:
        measure_accuracy([dense], settings(short))
    assert "smaller --window" in fault.value.fix


def test_what_cannot_be_measured_is_refused(dense: Path, text: Path) -> None:
    with pytest.raises(UsageError, match="stride 33 is longer"):
        measure_accuracy([dense], settings(text, stride=33))
    with pytest.raises(ModelError, match="reads at most 64 tokens at once, 65 are asked"):
        measure_accuracy([dense], settings(text, window=65))
    with pytest.raises(UsageError, match="unknown dtype 'flaot32'") as fault:
        measure_accuracy([dense], settings(text), dtype="flaot32")
    assert "float32" in fault.value.fix
    with pytest.raises(UsageError, match="no device 'tpu'"):
        measure_accuracy([dense], settings(text), device="tpu")
    with pytest.raises(ModelError, match="no model directory"):
        measure_accuracy([dense / "absent"], settings(text))
    with pytest.raises(UsageError, match="no model to measure"):
        measure_accuracy([], settings(text))


def test_models_that_read_the_text_differently_are_refused(
    dense: Path, text: Path, tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    other = shutil.copytree(dense, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="differently"):
        measure_accuracy([other], settings(text), against=dense)
    wide = make_model(tmp_path / "wide", vocab_size=300)
    with pytest.raises(ModelError, match="vocabulary of 300"):
        measure_accuracy([wide], settings(text), against=dense)


def test_nan_is_an_error_not_a_result(dense: Path, text: Path, tmp_path: Path) -> None:
    broken = AutoModelForCausalLM.from_pretrained(dense)
    torch.nn.init.constant_(broken.lm_head.weight, math.nan)
    shutil.copytree(dense, tmp_path / "broken")
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(ModelError, match="no finite probabilities in window 0"):
        measure_accuracy([tmp_path / "broken"], settings(text))


def test_top_k_agreement_by_sets() -> None:
    torch.manual_seed(1)
    logits, baseline = torch.randn(200, 30), torch.randn(200, 30)
    targets = torch.zeros(200, dtype=torch.int64)
    for k in (1, 5, 30, 99):
        score = score_window(logits, baseline, targets, k)
        size = min(k, 30)
        shared = 0
        for rows in zip(logits.tolist(), baseline.tolist(), strict=True):
            best = [set(np.argsort(row)[::-1][:size]) for row in rows]
            shared += len(best[0] & best[1])
        assert score.shared == pytest.approx(shared / size)
    assert score.shared == 200  # all of them
    same = score_window(logits, logits, targets, 5)
    assert same.shared == same.agreeing == 200


def test_a_gguf_file_is_measured_by_the_weights_it_stands_for(
    smollm2: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    chosen = Accuracy(data=str(text), window=32, windows=1)
    result = measure_accuracy([REAL_MODEL], chosen, against=smollm2)
    (row,) = result.models
    assert (row.path, row.bytes) == (str(REAL_MODEL), REAL_MODEL.stat().st_size)
    assert result.baseline is not None
    assert row.nll == result.baseline.nll  # the directory was dequantised from this file
    with pytest.raises(ModelError, match=r"no GGUF file at .*missing\.gguf"):
        measure_accuracy([tmp_path / "missing.gguf"], chosen)
