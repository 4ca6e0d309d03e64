"""Perplexity, KL divergence and agreement of models on one text, and their answers to tasks.

The text is tokenised once, without special tokens, and cut into windows of `window` tokens that
start every `stride` tokens; an incomplete last window is dropped. Window 0 predicts its tokens
1 … window-1; each later one predicts its last min(stride, window-1) tokens, so that with
stride < window no token is predicted twice. Perplexity is exp(ΣNLL / Σpredicted tokens).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from secateur import recipe
from secateur.bench.recovery import with_tasks
from secateur.bench.results import (
    AccuracyResult,
    Environment,
    Estimate,
    ModelAccuracy,
    TextFacts,
)
from secateur.bench.subjects import (
    check_models,
    directory_of,
    model_bytes,
    open_models,
)
from secateur.bench.tasks import ask, open_tasks
from secateur.calibration import read_text
from secateur.device import choose_device, choose_dtype
from secateur.errors import ModelError, UsageError
from secateur.model import load_tokenizer
from secateur.progress import Tick, no_tick

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_ROWS = 128  # positions whose log-probabilities are in memory at once


@dataclass(frozen=True)
class WindowScore:
    """Sums over the predicted tokens of one window; those from kl on need a baseline.

    Attributes:
        tokens: how many were predicted.
        nll, kl: in nats.
        agreeing: tokens with the same likeliest next token.
        shared: the share of the baseline's k likeliest next tokens that are among the model's.
    """

    tokens: int
    nll: float
    kl: float | None
    agreeing: int | None
    shared: float | None


def measure_accuracy(
    models: Sequence[str | Path],
    settings: recipe.Accuracy | None = None,
    *,
    against: str | Path | None = None,
    dtype: str = "float32",
    device: str = "auto",
    command: str = "",
    quiet: bool = True,
    progress: Tick = no_tick,
) -> AccuracyResult:
    """Score models on one text; all of them, and the baseline, are in memory at once.

    Args:
        models: directories of dense, pruned or packed models, or GGUF files: of these the
            weights that they stand for are measured, dequantised, without llama.cpp.
        settings: text, window, stride, number of windows, tasks; None: the defaults.
        against: the dense model that KL, agreement and ratios refer to.
        dtype: compute type: float32, bfloat16, float16 or auto.
        device: auto, cpu, cuda or cuda:N.
        command: kept in the result.
        quiet: without lm-eval's progress bars.
        progress: called with (windows done, windows in all).

    Raises:
        ModelError: a model cannot be opened or computes NaN, tokenizers or vocabularies differ,
            the text is missing or shorter than one window, or a task is not to be had.
        UsageError: the stride is longer than the window, or a dtype or device is unknown.
        EnvironmentFault: the text, the device or lm-eval is not to be had on this machine.
    """
    settings = settings or recipe.Accuracy()
    window, stride = settings.window, settings.stride or settings.window
    if stride > window:
        raise UsageError(
            f"the stride {stride} is longer than the window {window}: text would be skipped",
            "use a stride of at most the window",
        )
    place = choose_device(device)
    dtype, note = choose_dtype(dtype, place)
    environment = Environment.read(place)
    names = [*([against] if against is not None else []), *models]
    paths = [directory_of(name) for name in names]
    check_models(paths, window)
    ids = _token_ids(paths, read_text(settings.data), settings.data)
    windows = count_windows(len(ids), window, stride)
    if windows == 0:
        raise ModelError(
            f"the text {settings.data!r} has {len(ids)} tokens, fewer than one window of {window}",
            "give a longer text or a smaller --window",
        )
    windows = min(windows, settings.windows or windows)
    tasks = open_tasks(settings.tasks) if settings.tasks else []
    evaluated = ids[: window + (windows - 1) * stride]
    opened = open_models(paths, dtype, place)
    scores: list[list[WindowScore]] = [[] for _ in paths]
    for index in range(windows):
        progress(index, windows)
        span = evaluated[index * stride : index * stride + window].to(place)
        predicted = min(stride if index else window, window - 1)
        baseline: torch.Tensor | None = None
        for path, model, own in zip(paths, opened, scores, strict=True):
            logits = _logits(model, span, predicted)
            if baseline is not None and logits.shape != baseline.shape:
                raise ModelError(
                    f"{path} has a vocabulary of {logits.shape[1]}, {against} of "
                    f"{baseline.shape[1]}",
                    "compare models with the same output vocabulary",
                )
            score = score_window(logits, baseline, span[window - predicted :], settings.top_k)
            if not _finite(score):
                raise ModelError(
                    f"{path} computes no finite probabilities in window {index}",
                    "check the model's weights, or use --dtype float32",
                )
            own.append(score)
            if baseline is None and against is not None:
                baseline = logits
    progress(windows, windows)
    rows = [_summary(name, own, scores[0]) for name, own in zip(names, scores, strict=True)]
    if tasks:
        answers = [
            ask(model, load_tokenizer(path), tasks, limit=settings.limit, quiet=quiet)
            for path, model in zip(paths, opened, strict=True)
        ]
        dense = answers[0] if against is not None else None
        rows = [
            with_tasks(row, tasks, own, None if own is dense else dense)
            for row, own in zip(rows, answers, strict=True)
        ]
    return AccuracyResult(
        command=command,
        environment=environment,
        dtype=dtype,
        notes=(note,) if note else (),
        text=TextFacts(
            name=settings.data,
            tokenizer=str(names[0]),
            tokens=len(ids),
            evaluated_tokens=len(evaluated),
            sha256=_sha256(evaluated),
        ),
        window=window,
        stride=stride,
        windows=windows,
        predicted_tokens=sum(score.tokens for score in scores[0]),
        top_k=settings.top_k,
        baseline=rows[0] if against is not None else None,
        models=tuple(rows[1:] if against is not None else rows),
    )


def count_windows(tokens: int, window: int, stride: int) -> int:
    """How many whole windows fit into a text."""
    return 0 if tokens < window else 1 + (tokens - window) // stride


def score_window(
    logits: torch.Tensor, baseline: torch.Tensor | None, targets: torch.Tensor, top_k: int
) -> WindowScore:
    """Sum NLL, KL(baseline‖model) and agreement over tokens, in fp32, summed in fp64.

    Args:
        logits: (tokens, vocabulary), row i predicting ``targets[i]``.
        baseline: the dense model's logits for the same rows.
        targets: (tokens,) ids that the text has there.
        top_k: how many of the likeliest next tokens are compared.
    """
    import torch

    nll, kl, agreeing, shared = 0.0, 0.0, 0, 0
    top_k = min(top_k, logits.shape[1])
    for start in range(0, len(targets), _ROWS):
        rows = slice(start, start + _ROWS)
        log_q = torch.log_softmax(logits[rows].float(), dim=-1)
        nll -= log_q.gather(1, targets[rows, None]).double().sum().item()
        if baseline is not None:
            log_p = torch.log_softmax(baseline[rows].float(), dim=-1)
            kl += (log_p.exp() * (log_p - log_q)).sum(-1).double().sum().item()
            ours, theirs = log_q.topk(top_k).indices, log_p.topk(top_k).indices
            agreeing += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            shared += int((ours[:, :, None] == theirs[:, None, :]).sum())
    if baseline is None:
        return WindowScore(len(targets), nll, None, None, None)
    return WindowScore(len(targets), nll, kl, agreeing, shared / top_k)


def _logits(model: PreTrainedModel, span: torch.Tensor, predicted: int) -> torch.Tensor:
    """The rows that predict the last ``predicted`` tokens of ``span``: (predicted, vocabulary)."""
    import torch

    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=span[None], use_cache=False).logits[0]
    return logits[len(span) - 1 - predicted : -1]


def _finite(score: WindowScore) -> bool:
    """Neither NaN (every comparison fails) nor so large that its perplexity overflows."""
    return score.nll < 700 * score.tokens and math.isfinite(score.kl or 0.0)


def _token_ids(paths: Sequence[str | Path], text: str, name: str) -> torch.Tensor:
    """The text as one sequence of ids, on which the tokenizers of all models must agree."""
    import torch

    encoded = [
        load_tokenizer(path)(text, add_special_tokens=False, verbose=False)["input_ids"]
        for path in paths
    ]
    for path, ids in zip(paths, encoded, strict=True):
        if ids != encoded[0]:
            raise ModelError(
                f"the tokenizers of {paths[0]} and {path} read the text {name!r} differently",
                "measure models with different tokenizers in separate runs; their perplexities "
                "per token cannot be compared",
            )
    return torch.tensor(encoded[0], dtype=torch.int64)


def _sha256(ids: torch.Tensor) -> str:
    return hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()


def _summary(
    path: str | Path, scores: Sequence[WindowScore], baseline: Sequence[WindowScore]
) -> ModelAccuracy:
    tokens = [score.tokens for score in scores]
    nll = Estimate.of([score.nll for score in scores], tokens)
    kl = [score.kl for score in scores if score.kl is not None]
    agreeing = [score.agreeing for score in scores if score.agreeing is not None]
    shared = [score.shared for score in scores if score.shared is not None]
    lost = [own.nll - dense.nll for own, dense in zip(scores, baseline, strict=True)]
    return ModelAccuracy(
        path=str(path),
        bytes=model_bytes(path),
        nll=nll,
        perplexity=nll.exp(),
        perplexity_ratio=Estimate.of(lost, tokens).exp() if kl else None,
        kl=Estimate.of(kl, tokens) if kl else None,
        top1_agreement=Estimate.of(agreeing, tokens) if agreeing else None,
        topk_agreement=Estimate.of(shared, tokens) if shared else None,
        window_nll=tuple(score.nll for score in scores),
    )
