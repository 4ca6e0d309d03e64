"""Which kernel computes a packed linear on a GPU, by its number of tokens: one rule, no state.

    plan = choose(Weight(4096, 14336, pattern, "bf16"), Machine((8, 0), {}))
    plan.at(7)     # "triton"
    str(plan)      # "Triton up to 64 tokens, torch's CUTLASS above (built-in crossover)"

The back ends:

- triton: our kernels (`triton_product`); read the packed form, compute densely. For few tokens.
- own: secateur's library of CUTLASS's sparse GEMMs (`own`), if `doctor --build-cutlass` has made
  it. bf16 and fp16 with 2:4, on sparse tensor cores.
- cutlass: torch's ``_sparse_semi_structured_mm``, likewise.
- cusparselt: torch's ``_cslt_sparse_mm``, likewise.
- own-fp8, cusparselt-fp8: the same two for fp8 values, with inputs rounded to fp8.
- scaled-mm: fp8 values are unpacked for each call, and ``torch._scaled_mm`` multiplies, with inputs
  rounded to fp8. Of any mask.
- unpack: the dense weight is made anew for each call by a Triton kernel, and cuBLAS multiplies.
- dense: a dense copy that stays, and cuBLAS.

Integer values are never given to the sparse tensor cores: these multiply int8 with int8 and know no
scales along a row, while ours have one for every 32, 64 or 128 columns. fp8 values have one for a
row, which stands before the whole sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from secateur.pattern import Pattern
from secateur.recipe import ValueType

BackEnd = Literal[
    "triton",
    "own",
    "cutlass",
    "cusparselt",
    "own-fp8",
    "cusparselt-fp8",
    "scaled-mm",
    "unpack",
    "dense",
]
NAMES: dict[BackEnd, str] = {
    "triton": "Triton",
    "own": "secateur's CUTLASS",
    "cutlass": "torch's CUTLASS",
    "cusparselt": "cuSPARSELt",
    "own-fp8": "secateur's CUTLASS with inputs in fp8",
    "cusparselt-fp8": "cuSPARSELt with inputs in fp8",
    "scaled-mm": "torch._scaled_mm on the weight unpacked for each call, with inputs in fp8",
    "unpack": "cuBLAS on the weight unpacked for each call",
    "dense": "cuBLAS on a dense copy",
}
Source = Literal["built-in", "measured", "given"]

CROSSOVER: dict[BackEnd, int] = {
    "own": 1,
    **dict.fromkeys(("own-fp8", "cusparselt-fp8"), 16),
    **dict.fromkeys(("cutlass", "cusparselt", "scaled-mm", "unpack"), 64),
}
"""Up to how many tokens Triton computes, by what computes above.

As measured on an H100 (docs/gpu.md). Inputs are not rounded to fp8 for the few tokens of decoding,
though that would be faster from two tokens on.
"""
_MULTIPLES: dict[BackEnd, tuple[int, int]] = {
    "cusparselt": (16, 16),
    "cusparselt-fp8": (32, 32),
    "scaled-mm": (16, 16),
}
_LARGEST_SHARE = 0.9  # of the dense bytes
_VALUE_BYTES: dict[ValueType, float] = {"bf16": 2, "fp16": 2, "int8": 1, "int4": 0.5, "fp8": 1}


@dataclass(frozen=True, slots=True)
class Weight:
    """What the rule wants to know of a packed linear.

    Attributes:
        kept: share of its weights that is kept.
        values: as stored.
        dtype: of its inputs: bf16, fp16 or another name.
        round_inputs: whether inputs may be rounded to fp8, for fp8 values.
    """

    rows: int
    columns: int
    pattern: Pattern
    kept: float
    values: ValueType
    dtype: str
    round_inputs: bool = True

    def __str__(self) -> str:
        return f"{self.pattern} {self.values} {self.rows}x{self.columns}"


@dataclass(frozen=True, slots=True)
class Machine:
    """What the rule wants to know of a GPU.

    Attributes:
        capability: its compute capability, e.g. (9, 0).
        absent: why a back end cannot be used there, by back end; those not named can.
    """

    capability: tuple[int, int]
    absent: Mapping[BackEnd, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """Which back end computes with how many tokens.

    Attributes:
        small: up to ``up_to`` tokens.
        large: above.
        up_to: the crossover; 0: ``large`` computes always.
        source: where the crossover is from.
        why: why the sparse tensor cores, or any of our kernels, are not used; None if they are.
    """

    small: BackEnd
    large: BackEnd
    up_to: int = 0
    source: Source = "built-in"
    why: str | None = None

    def at(self, tokens: int) -> BackEnd:
        """The back end for so many tokens."""
        return self.small if tokens <= self.up_to else self.large

    def __str__(self) -> str:
        text = NAMES[self.large]
        if self.up_to:
            most = f"{self.up_to} token{'s' if self.up_to > 1 else ''}"
            text = f"{NAMES[self.small]} up to {most}, {text} above ({self.source} crossover)"
        return f"{text}: {self.why}" if self.why else text


def choose(
    weight: Weight, machine: Machine, crossover: int | None = None, source: Source = "given"
) -> Plan:
    """The rule.

    Args:
        crossover: up to how many tokens Triton computes; None: as built in.
        source: where it is from.
    """
    if (why := obstacle(weight, machine)) is not None:
        return Plan("dense", "dense", why=why)
    reasons = {end: refusal(end, weight, machine) for end in candidates(weight, machine)}
    usable = [end for end, reason in reasons.items() if reason is None]
    large: BackEnd = usable[0] if usable else "unpack"
    why = None if usable else "; ".join(dict.fromkeys(map(str, reasons.values())))
    if crossover is None:
        crossover, source = CROSSOVER[large], "built-in"
    return Plan("triton", large, crossover, source, why)


def obstacle(weight: Weight, machine: Machine) -> str | None:
    """Why only a dense copy will do."""
    if weight.pattern.is_dense:
        return "no weight was removed"
    if weight.dtype not in ("bf16", "fp16") or weight.values not in _VALUE_BYTES:
        return f"the kernels take bf16 and fp16, not {weight.dtype}"
    if machine.capability < (8, 0):
        major, minor = machine.capability
        return f"the kernels need compute capability 8.0, and this GPU has {major}.{minor}"
    if "triton" in machine.absent:
        return machine.absent["triton"]
    share = (weight.kept * _VALUE_BYTES[weight.values] + 1 / 8) / 2
    if share > _LARGEST_SHARE:
        return f"the packed form takes {100 * share:.0f} % of the dense bytes"
    return None


def candidates(weight: Weight, machine: Machine) -> tuple[BackEnd, ...]:
    """What may compute with many tokens by values like these, the first choice first.

    Our library, which somebody took the trouble to build, and torch's CUTLASS share their values
    with Triton and need 1/8 byte a weight beside them; cuSPARSELt keeps a copy of its own, 9/8
    bytes (of fp8 5/8). torch builds its CUTLASS for capability 8.x only.
    """
    if weight.values == "fp8":
        return "own-fp8", "cusparselt-fp8", "scaled-mm"
    if machine.capability[0] == 8:
        return "own", "cutlass", "cusparselt"
    return "own", "cusparselt", "cutlass"


def refusal(end: BackEnd, weight: Weight, machine: Machine) -> str | None:
    """Why one of `candidates` cannot compute this weight on this machine."""
    if weight.values == "fp8" and not weight.round_inputs:
        return "inputs are not to be rounded to fp8, and tensor cores multiply fp8 with fp8"
    two_four = weight.pattern.rows == 1 and (weight.pattern.n, weight.pattern.m) == (2, 4)
    if end != "scaled-mm" and not two_four:
        return f"sparse tensor cores take 2:4, not {weight.pattern}"
    if weight.values in ("int8", "int4"):
        return f"sparse tensor cores know no group scales, which {weight.values} values have"
    if end in machine.absent:
        return f"no {NAMES[end]}: {machine.absent[end]}"
    if end == "scaled-mm" and weight.dtype != "bf16":
        return f"torch._scaled_mm with scales of rows gives bf16, not {weight.dtype}"
    high, wide = _MULTIPLES.get(end, (1, 1))
    if weight.rows % high or weight.columns % wide:
        return f"{weight.rows}x{weight.columns} is no multiple of {high}x{wide}"
    return None
