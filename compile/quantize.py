"""Integers with group scales, and fp8: rounding to nearest, and GPTQ on the kept weights.

A row's weights in G consecutive columns share one scale s, and a weight w becomes the integer

    q = clamp(round(w / s), -limit, limit)        limit = 127 (int8) or 7 (int4), ties to even

fp8 is limit = 448: q is the nearest number of e4m3fn, which has its own exponent, so that one scale
serves a whole row. That scale is a power of two: e4m3fn rounds no worse for it, and the product of
value and scale is exact in fp32 and bf16.

`gptq` is algorithm 1 of Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers":

    H = G + λI,  UᵀU = H⁻¹ (U upper triangular),  λ = damping mean(diag G)      W: [out, in]
    for each column j, left to right:
        e = (W_j - s q_j) / U_jj
        W_k -= e U_jk for all k > j

Differences from the paper:
- Only kept weights are quantised and changed. A removed one is 0 when its column comes, makes no
  error, and the correction that earlier columns sent it is dropped. H⁻¹ is that of all inputs,
  though a row's free variables are its kept weights only; as the rows' masks differ, an inverse
  for each of them would cost too much. SparseGPT's joint quantisation (Frantar and Alistarh 2023,
  section 3.5) makes the same approximation.
- A dead input (always 0) keeps its weights, rounded to nearest; the authors' code zeroes them.
- Where the factorisation fails, λ is raised, and the result says how often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from secateur.compile.e4m3 import LARGEST, LARGEST_SCALE
from secateur.errors import ModelError
from secateur.gram import inverse_factor

DAMPING = 0.01
# Columns whose corrections are applied to the rest of the matrix at once; holds whole groups.
_BLOCK = 128
# Scales that gptq tries for 4 bits, relative to the smallest that clips nothing: rounding the
# many small weights finer is worth clipping the largest. A third less error on SmolLM2 at 2:4;
# for 8 bits it gains 6 % of next to nothing.
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


@dataclass(frozen=True, slots=True)
class Quantised:
    """A matrix as integers or fp8, and scales.

    Attributes:
        values: int8 or float8_e4m3fn ``[rows, columns]``, 0 where a weight is removed.
        scales: fp16 ``[rows, ceil(columns / group_size)]``, of fp8 fp32; not negative.
        group_size: columns that share a scale; the last group may be shorter. Of fp8: all.
        damping_retries: how often gptq raised λ.
    """

    values: torch.Tensor
    scales: torch.Tensor
    group_size: int
    damping_retries: int = 0

    def dense(self) -> torch.Tensor:
        """fp32 ``[rows, columns]``: each value times its scale, as of `scaled`."""
        return scaled(self.values, self.scales, self.group_size)


def scaled(values: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    """Values ``[rows, columns]`` times the scales of their groups: fp32.

    Exactly of integers, and of fp8 with the scales of `scale_above`; else rounded once.
    """
    wide = scales.float().repeat_interleave(group_size, dim=1)
    return values.float() * wide[:, : values.shape[1]]


def scale_above(largest: torch.Tensor, limit: int) -> torch.Tensor:
    """The smallest s with s · limit ≥ ``largest``: nothing clips.

    Args:
        largest: fp32, not negative.

    Returns:
        Numbers of fp16; for fp8 powers of two of at least 2^-126 in fp32, or 0 for 0.

    Raises:
        ModelError: there is none, as a weight is too large.
    """
    if limit == LARGEST:
        return _power_above(largest)
    scale = (largest / limit).half()
    # The product is exact: 11 bits times 7. The next number up, by its bits.
    low = scale.float() * limit < largest
    scale = torch.where(low, (scale.view(torch.int16) + 1).view(torch.float16), scale)
    if not scale.isfinite().all():
        raise ModelError(
            f"a weight of {float(largest.max()):g} is too large for scales in fp16",
            "use --values bf16, which has the range of fp32",
        )
    return scale


def _power_above(largest: torch.Tensor) -> torch.Tensor:
    """`scale_above` for fp8."""
    exponent = torch.frexp((largest / LARGEST).clamp(min=2.0**-126)).exponent
    scale = torch.ldexp(torch.ones_like(largest), exponent - 1)
    scale = torch.where(scale * LARGEST < largest, 2 * scale, scale).where(largest > 0, 0)
    if not bool((scale <= LARGEST_SCALE).all()):
        raise ModelError(
            f"a weight of {float(largest.max()):g} is too large for fp8",
            "use --values bf16, which has the range of fp32",
        )
    return scale


def rounded(weight: torch.Tensor, scale: torch.Tensor, limit: int) -> torch.Tensor:
    """The integers or fp8 numbers of weights, as fp32; ``scale`` broadcasts, and 0 makes them 0."""
    wide = scale.float()
    found = torch.where(wide > 0, weight / wide, 0)
    if limit == LARGEST:
        return found.clamp_(-limit, limit).to(torch.float8_e4m3fn).float()
    return found.round().clamp_(-limit, limit)


def _stored(limit: int) -> torch.dtype:
    """The type of values."""
    return torch.float8_e4m3fn if limit == LARGEST else torch.int8


def rtn(weight: torch.Tensor, mask: torch.Tensor, limit: int, group_size: int) -> Quantised:
    """Round every kept weight to nearest.

    Args:
        weight: fp32 ``[rows, columns]``.
        mask: bool ``[rows, columns]``, True = kept.
        limit: the largest value; 448: of fp8.
        group_size: columns that share a scale.

    Raises:
        ModelError: a weight is too large.
    """
    rows, columns = weight.shape
    kept = torch.nn.functional.pad(weight.where(mask, 0), (0, -columns % group_size))
    groups = kept.view(rows, -1, group_size)
    scales = scale_above(groups.abs().amax(dim=2), limit)
    values = rounded(groups, scales[:, :, None], limit).to(_stored(limit))
    return Quantised(values.view(rows, -1)[:, :columns].contiguous(), scales, group_size)


def gptq(
    weight: torch.Tensor,
    mask: torch.Tensor,
    gram: torch.Tensor,
    limit: int,
    group_size: int,
    *,
    factor: tuple[torch.Tensor, int] | None = None,
    shrink: Sequence[float] | None = None,
) -> Quantised:
    """Quantise the kept weights, later ones of a row making up for the rounding of earlier ones.

    Args:
        weight, mask, limit, group_size: as of `rtn`; the group size divides 128, or is a row's.
        gram: fp32 ``[columns, columns]``, Σ x xᵀ of the inputs.
        factor: U and the retries of `secateur.gram.inverse_factor`, if they are known already.
        shrink: scales to try, relative to the smallest that clips nothing; a row takes for each
            group the one with the least error, weighted by the diagonal of the Gram matrix. None:
            those that pay for this ``limit``.

    Raises:
        ModelError: a weight is too large, or the inputs are not finite.
    """
    upper, retries = factor or inverse_factor(gram, DAMPING)
    tries = shrink or (_SHRINK if limit < 127 else (1.0,))
    rows, columns = weight.shape
    # Transposed, so that a column lies in one piece.
    left, kept = weight.where(mask, 0).t().contiguous(), mask.t().contiguous()
    importance = gram.diagonal()
    values = torch.zeros(columns, rows, dtype=_stored(limit), device=weight.device)
    scales = []
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = torch.zeros(stop - start, rows, device=weight.device)
        for j in range(start, stop):
            if j % group_size == 0:
                group = slice(j, min(j + group_size, columns))
                own = left[group].where(kept[group], 0)
                scales.append(_best_scale(own, importance[group], limit, tries))
            present = left[j].where(kept[j], 0)
            integers = rounded(present, scales[-1], limit)
            values[j] = integers.to(values.dtype)
            error = (present - integers * scales[-1].float()) / upper[j, j]
            left[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1)
            errors[j - start] = error
        left[stop:] -= upper[start:stop, stop:].t() @ errors
    return Quantised(values.t().contiguous(), torch.stack(scales, dim=1), group_size, retries)


def _best_scale(
    weight: torch.Tensor, importance: torch.Tensor, limit: int, tries: Sequence[float]
) -> torch.Tensor:
    """One fp16 scale a row, for the kept weights ``[group, rows]`` of a group."""
    largest = weight.abs().amax(dim=0)
    best = scale_above(largest, limit)
    least: torch.Tensor | None = None
    for factor in tries if len(tries) > 1 else ():
        scale = scale_above(largest * factor, limit)
        change = weight - rounded(weight, scale, limit) * scale.float()
        error = importance @ change.square_()
        if least is None:
            best, least = scale, error
            continue
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def round_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs in fp8 with a scale for each token, amax / 448, as kernels that multiply fp8 do.

    Args:
        x: ``[tokens, columns]``, of any float type.

    Returns:
        float8_e4m3fn ``[tokens, columns]`` and fp32 ``[tokens, 1]``, 1 for a token of zeros.
    """
    wide = x.float()
    scale = wide.abs().amax(dim=1, keepdim=True) / LARGEST
    scale = torch.where(scale > 0, scale, 1)
    return (wide / scale).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def _round_groups(x: torch.Tensor, size: int) -> torch.Tensor:
    """Inputs ``[tokens, columns]`` in int8 with a scale for each group, amax / 127: fp32."""
    tokens, columns = x.shape
    padded = torch.nn.functional.pad(x, (0, -columns % size)).view(tokens, -1, size)
    scale = padded.abs().amax(dim=2, keepdim=True) / 127
    whole = torch.where(scale > 0, padded / scale, 0).round().clamp_(-127, 127)
    return (whole * scale).view(tokens, -1)[:, :columns]


def activation_error(weight: torch.Tensor, inputs: torch.Tensor, group_size: int | None) -> float:
    """What rounding the inputs to 8 bits adds to the error of the outputs: ‖W(X - X̂)‖ / ‖WX‖.

    Args:
        weight: fp32 ``[out, in]``, quantised or not.
        inputs: fp32 ``[tokens, in]``.
        group_size: each token's inputs are rounded to int8, symmetrically, in groups of
            ``min(group_size, 64)``, as kernels do that multiply integers; None: to fp8, as of
            `round_tokens`.
    """
    if group_size is None:
        values, scale = round_tokens(inputs)
        lost = inputs - values.float() * scale
    else:
        lost = inputs - _round_groups(inputs, min(group_size, 64))
    power = (inputs @ weight.t()).double().square().sum()
    if not power > 0:
        return 0.0
    return float(((lost @ weight.t()).double().square().sum() / power).sqrt())
