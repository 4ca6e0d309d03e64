"""Which kernel computes a packed linear on a GPU, by its number of tokens: one rule, no state.

    plan = choose(Weight(4096, 14336, pattern, "bf16"), Machine((8, 0), {}))
    plan.at(7)     # "triton"
    str(plan)      # "Triton up to 64 tokens, torch's CUTLASS above (built-in crossover)"

The back ends:

- triton: our kernels (`triton_product`); read the packed form, compute densely. For few tokens.
- cutlass: torch's ``_sparse_semi_structured_mm`` on sparse tensor cores. bf16 and fp16 with 2:4.
- cusparselt: torch's ``_cslt_sparse_mm``, likewise.
- unpack: the dense weight is made anew for each call by a Triton kernel, and cuBLAS multiplies.
- dense: a dense copy that stays, and cuBLAS.

Integer values are never given to the sparse tensor cores: these multiply int8 with int8 and know no
scales along a row, while ours have one for every 32, 64 or 128 columns. No packed value type is
fp8, hence nothing here calls ``torch._scaled_mm``.

The built-in crossovers are counted, not measured: not yet measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from secateur.pattern import Pattern
from secateur.recipe import ValueType

BackEnd = Literal["triton", "cutlass", "cusparselt", "unpack", "dense"]
NAMES: dict[BackEnd, str] = {
    "triton": "Triton",
    "cutlass": "torch's CUTLASS",
    "cusparselt": "cuSPARSELt",
    "unpack": "cuBLAS on the weight unpacked for each call",
    "dense": "cuBLAS on a dense copy",
}
Source = Literal["built-in", "measured", "given"]

CROSSOVER: dict[BackEnd, int] = {"cutlass": 64, "cusparselt": 64, "unpack": 128}
"""Up to how many tokens Triton computes, by what computes above: one tile of tokens, and two.

Up to 64 tokens Triton makes each dense tile once. Unpacking costs that and some 4 bytes a weight
of memory traffic, which a second tile of tokens still undercuts.
"""
_MULTIPLES: dict[BackEnd, tuple[int, int]] = {"cutlass": (32, 64), "cusparselt": (16, 16)}
_LARGEST_SHARE = 0.9  # of the dense bytes
_VALUE_BYTES: dict[ValueType, float] = {"bf16": 2.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True, slots=True)
class Weight:
    """What the rule wants to know of a packed linear.

    Attributes:
        kept: share of its weights that is kept.
        values: as stored.
        dtype: of its inputs: bf16, fp16 or another name.
    """

    rows: int
    columns: int
    pattern: Pattern
    kept: float
    values: ValueType
    dtype: str

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
            text = (
                f"{NAMES[self.small]} up to {self.up_to} tokens, {text} above "
                f"({self.source} crossover)"
            )
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
    reasons = {end: refusal(end, weight, machine) for end in _MULTIPLES}
    usable = [end for end in _preferred(machine) if reasons[end] is None]
    large: BackEnd = usable[0] if usable else "unpack"
    why = None if usable else "; ".join(dict.fromkeys(str(reasons[end]) for end in reasons))
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


def refusal(end: BackEnd, weight: Weight, machine: Machine) -> str | None:
    """Why a semi-structured back end cannot compute this weight on this machine."""
    if weight.pattern.rows != 1 or (weight.pattern.n, weight.pattern.m) != (2, 4):
        return f"sparse tensor cores take 2:4, not {weight.pattern}"
    if weight.values not in ("bf16", "fp16"):
        return f"sparse tensor cores know no group scales, which {weight.values} values have"
    if end in machine.absent:
        return f"no {NAMES[end]}: {machine.absent[end]}"
    high, wide = _MULTIPLES[end]
    if end == "cusparselt" and (weight.rows % high or weight.columns % wide):
        return f"{weight.rows}x{weight.columns} is no multiple of {high}x{wide}"
    return None


def _preferred(machine: Machine) -> tuple[BackEnd, ...]:
    """The semi-structured back ends, the first choice first.

    CUTLASS shares its values with Triton and needs 1/8 byte a weight beside them; cuSPARSELt keeps
    a copy of its own, 9/8 bytes a weight. torch builds its CUTLASS for capability 8.x only.
    """
    return ("cutlass", "cusparselt") if machine.capability[0] == 8 else ("cusparselt", "cutlass")
