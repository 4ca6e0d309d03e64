"""All pruning methods by name, and the chains that are made of them.

A chain is written ``wanda+swaps+lsq``: the first word makes a mask (and maybe new weights), each
further word refines it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from secateur.errors import UsageError, did_you_mean
from secateur.prune.admm import METHOD as _admm
from secateur.prune.alps import METHOD as _alps
from secateur.prune.blockwise import STEP as _blockwise
from secateur.prune.dsnot import REFINEMENT as _dsnot
from secateur.prune.gblm import METHOD as _gblm
from secateur.prune.lsq import REFINEMENT as _lsq
from secateur.prune.magnitude import METHOD as _magnitude
from secateur.prune.method import Method, Problem, Refinement, RegionStep, Solution
from secateur.prune.ria import METHOD as _ria
from secateur.prune.sparsegpt import METHOD as _sparsegpt
from secateur.prune.swaps import REFINEMENT as _swaps
from secateur.prune.wanda import METHOD as _wanda
from secateur.prune.wandapp import METHOD as _wandapp
from secateur.recipe import validate

Step = Method | Refinement | RegionStep

METHODS: dict[str, Method] = {
    method.name: method
    for method in (_magnitude, _wanda, _ria, _gblm, _wandapp, _sparsegpt, _admm, _alps)
}
REFINEMENTS: dict[str, Refinement | RegionStep] = {
    step.name: step for step in (_dsnot, _swaps, _lsq, _blockwise)
}


def find_method(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """Look a method or a chain up.

    Args:
        name: ``wanda``, ``sparsegpt+lsq``, ``wanda+swaps+lsq`` …
        settings: values by ``word.field``, e.g. ``{"dsnot.cycles": 50}``; text is read as the
            field's type.

    Raises:
        UsageError: a word or setting that is not known, or a word in the wrong place.
    """
    first, *later = name.split("+")
    if first not in METHODS:
        if first in REFINEMENTS:
            raise UsageError(
                f"{first!r} refines what another method made and cannot come first in {name!r}",
                f"e.g. wanda+{name}",
            )
        raise UsageError(f"there is no pruning method {first!r}", did_you_mean(first, METHODS))
    for word in later:
        if word in METHODS:
            raise UsageError(
                f"{word!r} makes a mask of its own and can only come first in {name!r}",
                f"refinements are: {', '.join(sorted(REFINEMENTS))}",
            )
        if word not in REFINEMENTS:
            raise UsageError(f"there is no refinement {word!r}", did_you_mean(word, REFINEMENTS))
    for word in later[:-1]:
        if isinstance(REFINEMENTS[word], RegionStep):
            raise UsageError(
                f"{word!r} works on whole regions and can only come last in {name!r}",
                f"move it to the end: {'+'.join([first, *(w for w in later if w != word), word])}",
            )
    values = _by_word([first, *later], settings or {})
    method = METHODS[first]
    method = replace(method, settings=_settings(method, values))
    steps = [
        replace(REFINEMENTS[word], settings=_settings(REFINEMENTS[word], values)) for word in later
    ]
    refinements = tuple(step for step in steps if isinstance(step, Refinement))
    regional = next((step for step in steps if isinstance(step, RegionStep)), None)
    if not steps:
        return method
    everyone: list[Step] = [method, *steps]
    spaces = [method.workspace, *(step.workspace for step in refinements)]
    return Method(
        name=name,
        summary="; ".join(step.summary for step in everyone),
        source="; ".join(step.source for step in everyone),
        needs=method.needs.union(*(step.needs for step in steps)),
        function=_solve_chain,
        settings=(method, refinements),
        workspace=(max(space[0] for space in spaces), max(space[1] for space in spaces)),
        regional=regional,
    )


def gradient_norm(method: Method) -> Literal["l1", "l2"] | None:
    """Which norm of the gradients ("l1" or "l2") a method or chain reads, if it does."""
    if "gradients" not in method.needs:
        return None
    first = method.settings[0] if isinstance(method.settings, tuple) else method
    norm: Literal["l1", "l2"] = first.settings.norm
    return norm


def _solve_chain(problem: Problem, steps: tuple[Method, tuple[Refinement, ...]]) -> Solution:
    method, refinements = steps
    solution = method.solve(problem)
    facts = {f"{method.name}.{key}": value for key, value in solution.facts.items()}
    for step in refinements:
        solution = step.refine(problem, solution)
        facts |= {f"{step.name}.{key}": value for key, value in solution.facts.items()}
    return Solution(solution.mask, solution.weight, facts)


def _by_word(words: list[str], settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings ``word.field`` as ``{word: {field: value}}``."""
    values: dict[str, dict[str, Any]] = {word: {} for word in words}
    for key, value in settings.items():
        word, _, field = key.partition(".")
        if word not in values:
            steps: dict[str, Step] = {**METHODS, **REFINEMENTS}
            known = [
                f"{word}.{field}"
                for word in words
                for field in type(steps[word].settings).model_fields
            ]
            raise UsageError(
                f"the setting {key!r} belongs to no step of the method {'+'.join(words)!r}",
                did_you_mean(key, known),
            )
        values[word][field] = value
    return values


def _settings(step: Step, values: dict[str, dict[str, Any]]) -> Any:
    return validate(type(step.settings), values[step.name], f"settings of {step.name}")
