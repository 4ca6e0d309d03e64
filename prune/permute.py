"""Channel permutation: an order of a linear's inputs under which N:M patterns cost less.

Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language
Models" (RIA), the section on channel permutation; the idea is from Pool & Yu 2021, "Channel
Permutations for N:M Sparsity".

An N:M pattern keeps the N highest scores of every M consecutive inputs of a row. If the inputs
come from another linear, their order is free: permute that linear's rows and this one's columns
alike, and the model computes the same at the same cost. That holds for gate, up → down (any
order), and for v → o inside a head, where all query heads that share a value head share its order.

The search: deal the channels, sorted by their summed scores, to the groups, there and back. Then
for each of the M places in a group take the channels that stand there out of all groups and put
them back by the assignment that keeps the most, which the Hungarian method finds exactly; repeat
until that gains nothing. A group whose other M - 1 channels are fixed keeps in row r the N - 1
highest of them, and the higher of the next one, t_r, and the new channel's score s_r. So up to
terms that no assignment changes, group and channel are worth

    Σ_r max(t_r, s_r) = ½ Σ_r |t_r - s_r| + …

an L1 distance, of which a whole matrix is cheap.

Differences from the authors' code: it computes those values by sorting every row anew, makes one
round over the places, and may end with less than it started with.

Cost of one round for G groups: M distance matrices of G² · out operations, and M assignments of
G x G, which take about G³ at worst. On two CPU cores ``[576, 1536]`` at 2:4 (G = 384) takes 0.4 s
a round and about five rounds; 14336 inputs (G = 3584) take 6 s for each assignment and 6 ms per
output for each distance matrix. ``group`` bounds both: with a quarter of the groups at once
distances take a quarter of the time and assignments at most a quarter, for nine tenths of the gain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from secateur.prune.masks import per_block

if TYPE_CHECKING:
    import torch

    from secateur.pattern import Pattern

_ROUNDS = 10
# A round that adds less than this share of what is kept is the last.
_LEAST_GAIN = 1e-4


def find_permutation(
    score: torch.Tensor, pattern: Pattern, group: int | None = None
) -> torch.Tensor:
    """Search an order of the inputs under which the pattern keeps more of the score.

    The order depends on nothing but the arguments. With every k-th row of a large score it is
    found k times faster, but then only those rows are sure to keep no less than before.

    Args:
        score: ``[out, in]``, finite, higher = keep.
        pattern: N:M, in blocks or not.
        group: how many channels are assigned at once; None: all.

    Returns:
        ``[in]`` int64: the channel to put at each place. The identity if nothing better was found.

    Raises:
        ValueError: the pattern is not N:M or does not fit, or a score is not finite.
    """
    import torch

    _check(pattern, *score.shape)
    columns = per_block(score.float(), pattern).t().contiguous()
    groups = len(columns) // pattern.m
    parts = 1 if group is None else -(-groups // max(1, group // pattern.m))
    order = _dealt(columns, pattern.m)
    kept = _kept(columns, order, pattern.n)
    for number in range(_ROUNDS):
        before = kept
        places = torch.arange(groups, device=score.device)
        # Other parts every time, so that channels can come from one end to the other.
        for part in range(parts):
            chosen = places[part::parts] if number % 2 == 0 else places.tensor_split(parts)[part]
            for _ in range(pattern.m):
                order[chosen] = _exchanged(columns, order[chosen], pattern.n)
        kept = _kept(columns, order, pattern.n)
        if kept <= before * (1 + _LEAST_GAIN):
            break
    identity = torch.arange(len(columns), device=score.device).view(-1, pattern.m)
    better = kept > _kept(columns, identity, pattern.n)
    return (order if better else identity).flatten()


def find_shared_permutation(
    score: torch.Tensor, heads: int, kv_heads: int, head_dim: int, pattern: Pattern
) -> torch.Tensor:
    """Search an order of each value head's channels, for the columns of ``o_proj``.

    Query heads ``k · heads / kv_heads`` to ``(k + 1) · heads / kv_heads - 1`` read value head k
    and share its order.

    Args:
        score: ``[out, heads · head_dim]``, of ``o_proj``.
        pattern: N:M, in blocks or not.

    Returns:
        ``[kv_heads, head_dim]`` int64; see `value_rows` and `output_columns`.

    Raises:
        ValueError: the pattern is not N:M or does not fit into a head, or the sizes do not fit.
    """
    import torch

    out, width = score.shape
    if width != heads * head_dim or heads % kv_heads:
        raise ValueError(f"{width} columns are not {heads} heads of {head_dim}, for {kv_heads}")
    _check(pattern, out, head_dim)
    by_head = per_block(score.float(), pattern).view(-1, kv_heads, heads // kv_heads, head_dim)
    single = replace(pattern, rows=1)
    orders = [
        find_permutation(by_head[:, head].reshape(-1, head_dim), single) for head in range(kv_heads)
    ]
    return torch.stack(orders)


def value_rows(shared: torch.Tensor) -> torch.Tensor:
    """The order of the rows of ``v_proj``, ``[kv_heads · head_dim]``.

    Args:
        shared: ``[kv_heads, head_dim]``, from `find_shared_permutation`.
    """
    return output_columns(shared, len(shared))


def output_columns(shared: torch.Tensor, heads: int) -> torch.Tensor:
    """The order of the columns of ``o_proj``, ``[heads · head_dim]``.

    Args:
        shared: ``[kv_heads, head_dim]``, from `find_shared_permutation`.
        heads: number of query heads.
    """
    import torch

    kv_heads, head_dim = shared.shape
    starts = torch.arange(heads, device=shared.device)[:, None] * head_dim
    return (shared.repeat_interleave(heads // kv_heads, dim=0) + starts).flatten()


def permuted_tensors(
    tensors: Mapping[str, torch.Tensor],
    producers: Sequence[str],
    consumer: str,
    rows: torch.Tensor,
    columns: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The weights of linears of which one reads what the others put out, in another order.

    What lies between must treat all channels alike: an activation or a product may, a norm with
    weights may not. Under patterns in blocks the new order of the rows decides which rows of the
    producers share a block, so permute before they are pruned.

    Args:
        tensors: holds ``NAME.weight`` ``[out, in]`` and, if there is one, ``NAME.bias`` ``[out]``.
        producers: names of the linears whose rows are permuted, e.g. gate and up, or v; of a fused
            one ``rows`` spans all its rows.
        consumer: name of the linear whose columns are permuted, e.g. down, or o.
        rows, columns: the order of each; for gate, up → down they are the same.

    Returns:
        The tensors that change, by name.

    Raises:
        ValueError: an order is not a permutation of the rows or columns.
    """
    weight = f"{consumer}.weight"
    changed = {weight: _reordered(tensors[weight], 1, columns)}
    for name in (f"{producer}.{kind}" for producer in producers for kind in ("weight", "bias")):
        if name in tensors:
            changed[name] = _reordered(tensors[name], 0, rows)
    return changed


def _check(pattern: Pattern, rows: int, columns: int) -> None:
    if not pattern.is_nm:
        raise ValueError(f"an order of channels makes no difference to '{pattern}'")
    if (why := pattern.obstacle(rows, columns)) is not None:
        raise ValueError(f"'{pattern}' does not fit: {why}")


def _reordered(tensor: torch.Tensor, axis: int, order: torch.Tensor) -> torch.Tensor:
    count = tensor.shape[axis]
    if sorted(order.tolist()) != list(range(count)):
        raise ValueError(f"not an order of {count} channels: {len(order)} indices")
    return tensor.index_select(axis, order.to(tensor.device))


def _dealt(columns: torch.Tensor, places: int) -> torch.Tensor:
    """Channels by ascending sum, dealt to groups there and back: ``[groups, places]``."""
    ranked = columns.sum(dim=1).argsort(stable=True).view(places, -1)
    ranked[1::2] = ranked[1::2].flip(1)
    return ranked.t().contiguous()


def _exchanged(columns: torch.Tensor, order: torch.Tensor, keep: int) -> torch.Tensor:
    """Exchange the channels at the first place between the groups, so as to keep the most.

    Args:
        columns: ``[in, rows]``, the score of each channel.
        order: ``[groups, places]``, channels.
        keep: N.

    Returns:
        ``[groups, places]``: the channels exchanged and moved to the last place.
    """
    import torch
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    first, others = order[:, 0], order[:, 1:]
    # The N-th highest of the M - 1 others is what a new channel has to beat.
    beaten = columns[others].kthvalue(order.shape[1] - keep, dim=1).values
    worth = torch.cdist(beaten, columns[first], p=1)
    _, chosen = linear_sum_assignment(worth.cpu().numpy(), maximize=True)
    moved = first[torch.from_numpy(chosen).to(first.device)]
    return torch.cat([others, moved[:, None]], dim=1)


def _kept(columns: torch.Tensor, order: torch.Tensor, keep: int) -> float:
    """The sum of the ``keep`` highest scores of each row in each group."""
    import torch

    parts = order.chunk(-(-len(order) // 256))  # bounds the copies
    return math.fsum(
        float(columns[part].topk(keep, dim=1).values.sum(dtype=torch.float64)) for part in parts
    )
