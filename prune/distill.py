"""What healing trains, and towards what: kept weights alone, towards the dense model's outputs.

    minimise  KL(p_dense ‖ p)  +  h · mean over blocks of ‖x - x_dense‖² / ‖x_dense‖²

per token, with p the probabilities of the next token and x what a block puts out. Weights that
are gone stay 0: their gradients are, so Adam never moves them.

    kept    all weights that are kept, all biases and norms
    lora    W + M ⊙ (B A) instead of W: Lu et al. 2024, "SPP: Sparsity-Preserved Parameter-Efficient
            Fine-Tuning for Large Language Models" (there as a factor of W); merged at the end
    norms   biases and norms only: Zimmer et al. 2023, "PERP: Rethinking the Prune-Retrain Paradigm
            in the Era of LLMs"

Embeddings and the output head stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch.nn.utils import parametrize

from secateur.errors import ModelError

Train = Literal["kept", "lora", "norms"]


class LowRank(torch.nn.Module):
    """W + M ⊙ (B A), the product being 0 at first.

    Args:
        mask: M, ``[out, in]``; None: all ones.
        shape: ``(out, in)``.
        rank: columns of B and rows of A.
    """

    def __init__(self, mask: torch.Tensor | None, shape: torch.Size, rank: int) -> None:
        super().__init__()
        self.mask: torch.Tensor | None
        self.register_buffer("mask", mask, persistent=False)
        bound = 1 / math.sqrt(shape[1])
        self.a = torch.nn.Parameter(torch.empty(rank, shape[1]).uniform_(-bound, bound))
        self.b = torch.nn.Parameter(torch.zeros(shape[0], rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight that the linear computes with."""
        change = self.b @ self.a
        return weight + (change if self.mask is None else change * self.mask)


def choose_trained(
    model: torch.nn.Module,
    blocks: str,
    masks: Mapping[str, torch.Tensor],
    train: Train,
    rank: int = 16,
) -> dict[str, torch.nn.Parameter]:
    """Let the parameters that are trained, and no others, have gradients; by name.

    Args:
        model: the pruned model.
        blocks: where its blocks are.
        masks: keep-masks of pruned weights by the names of the parameters, like these.
        train: which are trained.
        rank: of "lora".

    Raises:
        ModelError: the model keeps pruned weights in other parameters (fused experts).
    """
    model.requires_grad_(False)
    names = dict(model.named_parameters())
    if unknown := sorted(masks.keys() - names.keys()):
        raise ModelError(
            f"the pruned weight {unknown[0]} is no parameter of its own in transformers' model",
            "such models cannot be healed yet",
        )
    for name, parameter in names.items():
        matrix = parameter.ndim == 2
        if matrix and (train == "norms" or not name.startswith(f"{blocks}.")):
            continue
        if matrix and train == "lora":
            owner, _, weight = name.rpartition(".")
            low = LowRank(masks.get(name), parameter.shape, rank)
            parametrize.register_parametrization(model.get_submodule(owner), weight, low)
            continue
        parameter.requires_grad_(True)
        if name in masks:
            parameter.register_hook(_masking(masks[name]))  # type: ignore[no-untyped-call]
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _masking(mask: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda gradient: gradient * mask.to(gradient.device)


def merge_low_rank(model: torch.nn.Module) -> None:
    """Put what "lora" learned into the weights."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")


def token_divergence(logits: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """KL(p_dense ‖ p), mean over tokens.

    Args:
        logits, dense: ``[sequences, tokens, vocabulary]``.
    """
    return torch.nn.functional.kl_div(
        logits.float().log_softmax(-1).flatten(0, 1),
        dense.float().log_softmax(-1).flatten(0, 1),
        log_target=True,
        reduction="batchmean",
    )


def state_error(
    states: Sequence[torch.Tensor], dense: Sequence[torch.Tensor]
) -> torch.Tensor | float:
    """‖x - x_dense‖² / ‖x_dense‖², mean over what the blocks put out, ``[..., hidden]`` each."""
    errors = [
        (own.float() - other.float()).square().sum() / other.float().square().sum()
        for own, other in zip(states, dense, strict=True)
    ]
    return sum(errors) / max(1, len(errors))


def learning_rate(step: int, steps: int, peak: float, warmup: float = 0.05) -> float:
    """Linear up to ``peak`` over the first steps, then down to 0 along a cosine."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
