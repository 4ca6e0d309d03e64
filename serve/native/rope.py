"""Inverse frequencies of rotary position embeddings, as transformers computes them.

Su et al. 2021, "RoFormer"; `yarn` is Peng et al. 2023, "YaRN"; `llama3` is that of Llama 3.1.
`dynamic` (NTK) differs from `default` only beyond the length that a model was trained for, which
the native engine does not go to: a longer text would need other angles for keys that are cached.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Rope:
    """Angles that queries and keys are turned by.

    Attributes:
        frequencies: float32 ``[rotated / 2]``: radians a token.
        factor: of the sines and cosines.
    """

    frequencies: Floats
    factor: float


def _plain(parameters: Mapping[str, Any], width: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    base = float(parameters["rope_theta"])
    frequencies: np.ndarray[Any, np.dtype[np.float64]] = base ** (-np.arange(0, width, 2) / width)
    return frequencies


def _default(parameters: Mapping[str, Any], width: int) -> Rope:
    return Rope(_plain(parameters, width).astype(np.float32), 1.0)


def _linear(parameters: Mapping[str, Any], width: int) -> Rope:
    slower = _plain(parameters, width) / float(parameters["factor"])
    return Rope(slower.astype(np.float32), 1.0)


def _llama3(parameters: Mapping[str, Any], width: int) -> Rope:
    factor = float(parameters["factor"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    frequencies = _plain(parameters, width)
    turns = float(parameters["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return Rope((frequencies * (smooth + (1 - smooth) / factor)).astype(np.float32), 1.0)


def _yarn(parameters: Mapping[str, Any], width: int) -> Rope:
    length = float(parameters["original_max_position_embeddings"])
    factor = parameters.get("factor")
    factor = float(parameters["max_position_embeddings"]) / length if factor is None else factor
    base = float(parameters["rope_theta"])

    def dimension(turns: float) -> float:
        return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = dimension(parameters.get("beta_fast") or 32)
    high = dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = np.clip((np.arange(width // 2) - low) / (high - low or 0.001), 0, 1)
    frequencies = _plain(parameters, width)
    mixed = frequencies * (1 - ramp) + frequencies / factor * ramp
    return Rope(mixed.astype(np.float32), _yarn_factor(parameters, factor))


def _yarn_factor(parameters: Mapping[str, Any], factor: float) -> float:
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1

    over, under = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return scale(over) / scale(under) if over and under else scale(1)


TYPES: dict[str, tuple[Callable[[Mapping[str, Any], int], Rope], tuple[str, ...]]] = {
    "default": (_default, ()),
    "dynamic": (_default, ()),
    "linear": (_linear, ("factor",)),
    "llama3": (_llama3, ("factor", "low_freq_factor", "high_freq_factor")),
    "yarn": (_yarn, ()),
}
"""Name → how a rope is made of its parameters, and which of them it cannot do without."""


def make_rope(parameters: Mapping[str, Any], head_dim: int) -> Rope:
    """The rope that ``rope_parameters`` describe.

    Args:
        parameters: with ``rope_type``, ``rope_theta``, ``max_position_embeddings`` and
            ``original_max_position_embeddings``, and what the type takes.
        head_dim: width of a head; ``partial_rotary_factor`` of it is turned.
    """
    width = int(head_dim * float(parameters.get("partial_rotary_factor") or 1.0))
    return TYPES[parameters["rope_type"]][0](parameters, width)
