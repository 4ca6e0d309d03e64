"""Taylor scores: how much the loss grows when a head or a channel goes.

Ma et al. 2023, "LLM-Pruner: On the Structural Pruning of Large Language Models", section 3.2, eq. 3
to 5. Of one weight w with gradients g of n samples:

    first     |w Σg|
    second    |w² Σg²/n|                    H_ww ≈ Σg²/n, the Fisher information
    mixed     |w Σg - w² Σg²/(2n)|
    vector    |Σ over the unit's rows or columns w Σg|

summed over all rows (q, k, v, gate, up) and columns (o, down) of a KV group or of a channel.

Difference from the authors' code, and from Adapt-Pruner's that is made of it (`compat: reference`
repeats it): of a model with G KV groups, group j is given the scores of the query heads j, j + G,
j + 2G … there, which read other KV heads; here of those that read its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from secateur.architecture import Parts

Order = Literal["first", "second", "mixed", "vector"]


class TaylorSums:
    """Sums over samples of the gradients of one weight, and of their squares."""

    def __init__(self) -> None:
        self.samples = 0
        self._sum: torch.Tensor | None = None
        self._squares: torch.Tensor | None = None

    def update(self, gradient: torch.Tensor) -> None:
        """Add one sample's gradient: ``[out, in]``."""
        gradient = gradient.float()
        self.samples += 1
        if self._sum is None or self._squares is None:
            self._sum, self._squares = gradient.clone(), gradient.square()
        else:
            self._sum += gradient
            self._squares.addcmul_(gradient, gradient)

    def salience(self, weight: torch.Tensor, order: Order) -> torch.Tensor:
        """The score of each weight ``[out, in]``; with its sign for "vector"."""
        assert self._sum is not None
        assert self._squares is not None
        weight = weight.float()
        first = weight * self._sum
        second = weight.square() * self._squares / self.samples
        if order == "vector":
            return first
        return {"first": first, "second": second, "mixed": first - second / 2}[order].abs()


def unit_scores(
    salience: Mapping[str, torch.Tensor],
    parts: Parts,
    rep: int,
    head_dim: int,
    order: Order = "first",
    compat: Literal["exact", "reference"] = "exact",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores of a block's KV groups and of its channels.

    Args:
        salience: of the weights of each linear, by its name within the block.
        parts: which linear is which.
        rep: query heads of a group.
        head_dim: rows of a head.
    """

    def rows(name: str) -> torch.Tensor:
        total = salience[name].sum(dim=1)
        return total.abs() if order == "vector" else total

    def columns(name: str) -> torch.Tensor:
        total = salience[name].sum(dim=0)
        return total.abs() if order == "vector" else total

    queries = (rows(parts.queries) + columns(parts.output)).view(-1, head_dim).sum(dim=1)
    keys = (rows(parts.keys) + rows(parts.values)).view(-1, head_dim).sum(dim=1)
    groups = keys + pooled(queries, rep, compat)
    channels = columns(parts.down)
    for gate in parts.gates:
        channels = channels + rows(gate)
    return groups.cpu(), channels.cpu()


def pooled(queries: torch.Tensor, rep: int, compat: Literal["exact", "reference"]) -> torch.Tensor:
    """Scores of query heads ``[groups · rep]`` summed for each KV group."""
    if compat == "reference":
        return queries.view(rep, -1).sum(dim=0)
    return queries.view(-1, rep).sum(dim=1)
