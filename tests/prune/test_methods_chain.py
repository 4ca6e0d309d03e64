"""Chains: words in their places, settings to their words."""

from __future__ import annotations

from typing import Any

import pytest

from secateur.errors import UsageError
from secateur.prune.method import Method, Refinement
from secateur.prune.methods import METHODS, REFINEMENTS, find_method, gradient_norm


def test_a_chain_is_a_method() -> None:
    chain = find_method("wanda+swaps+lsq")
    assert chain.name == "wanda+swaps+lsq"
    assert chain.needs == {"norms", "gram"}
    assert chain.needs_text
    assert not find_method("magnitude").needs_text
    assert find_method("magnitude+dsnot").needs == {"norms", "moments", "gram"}


@pytest.mark.parametrize(
    ("name", "what", "fix"),
    [
        ("wnda", "no pruning method 'wnda'", "did you mean 'wanda'"),
        ("", "no pruning method ''", "choose one of"),
        ("wanda+", "no refinement ''", "choose one of"),
        ("wanda+swap", "no refinement 'swap'", "did you mean 'swaps'"),
        ("lsq+wanda", "cannot come first", "e.g. wanda+lsq"),
        ("wanda+sparsegpt", "can only come first", "refinements are: blockwise, dsnot, lsq, swaps"),
        ("wanda+blockwise+lsq", "can only come last", "the end: wanda+lsq+blockwise"),
        ("wanda+blockwise+blockwise", "can only come last", "the end: wanda+blockwise"),
        ("blockwise", "cannot come first", "e.g. wanda+blockwise"),
    ],
)
def test_a_wrong_word_is_named(name: str, what: str, fix: str) -> None:
    with pytest.raises(UsageError, match=what) as fault:
        find_method(name)
    assert fix in fault.value.fix


@pytest.mark.parametrize(
    ("settings", "what", "fix"),
    [
        ({"dsnot.cyles": 5}, "unknown key 'cyles'", "did you mean 'cycles'"),
        ({"dsno.cycles": 5}, "belongs to no step", "did you mean 'dsnot.cycles'"),
        ({"lsq.iterations": 5}, "belongs to no step", "wanda.variant"),
        ({"dsnot.cycles": "many"}, "cycles = 'many'", ""),
        ({"dsnot.cycles": 0}, "cycles = 0", ""),
        ({"cycles": 3}, "belongs to no step", "dsnot.cycles"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], what: str, fix: str) -> None:
    with pytest.raises(UsageError, match=what) as fault:
        find_method("wanda+dsnot", settings)
    assert fix in fault.value.fix


def test_settings_reach_their_step_and_no_other_run() -> None:
    chain = find_method("wanda+dsnot", {"dsnot.cycles": "7", "wanda.variant": "true"})
    method, (dsnot,) = chain.settings
    assert method.settings.variant is True
    assert dsnot.settings.cycles == 7
    assert REFINEMENTS["dsnot"].settings.cycles == 50


def test_the_norm_of_the_gradients_is_known_before_they_are_collected() -> None:
    assert gradient_norm(find_method("gblm+lsq", {"gblm.norm": "l1"})) == "l1"
    assert gradient_norm(find_method("gblm")) == "l2"
    assert gradient_norm(find_method("wanda+lsq")) is None


def test_every_setting_is_described() -> None:
    steps: list[Method | Refinement] = [*METHODS.values(), *REFINEMENTS.values()]
    for step in steps:
        assert step.summary
        assert step.source
        for name, field in type(step.settings).model_fields.items():
            assert field.description, f"{step.name}.{name}"
