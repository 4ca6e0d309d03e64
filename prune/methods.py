"""All pruning methods by name."""

from __future__ import annotations

from secateur.errors import UsageError, did_you_mean
from secateur.prune.magnitude import METHOD as _magnitude
from secateur.prune.method import Method
from secateur.prune.wanda import METHOD as _wanda

METHODS: dict[str, Method] = {method.name: method for method in (_magnitude, _wanda)}


def find_method(name: str) -> Method:
    """Look a method up.

    Raises:
        UsageError: there is none of this name.
    """
    if name not in METHODS:
        raise UsageError(f"there is no pruning method {name!r}", did_you_mean(name, METHODS))
    return METHODS[name]
