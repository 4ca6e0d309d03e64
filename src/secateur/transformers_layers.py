"""transformers builds blocks of different sizes once this module is imported.

Its configs know ``per_layer_config``, its models do not: asked for the number of heads, such a
config refuses to answer, as the answer depends on the block. Every decoder layer is made by
``Layer(config, layer_idx)``; here it is given the config of its own block instead.

`import secateur` arranges for this import, see `secateur._transformers_hook`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer

_DONE = "_secateur_sizes"


def _give_own_config(kind: type) -> None:
    """Let a class of decoder layers take its sizes from its own block's config."""
    make: Callable[..., None] = kind.__init__  # type: ignore[misc]
    if "__init__" not in vars(kind) or hasattr(make, _DONE):
        return

    @wraps(make)
    def __init__(self: Any, config: Any = None, *rest: Any, **options: Any) -> None:
        number = options.get("layer_idx", rest[0] if rest else None)
        if not getattr(config, "is_heterogeneous", False) or not isinstance(number, int):
            return make(self, config, *rest, **options)
        make(self, config.per_layer_config[number], *rest, **options)
        for module in self.modules():  # what is set for the whole model later reaches it, too
            if hasattr(module, "config"):
                module.config = config

    setattr(__init__, _DONE, True)
    kind.__init__ = __init__  # type: ignore[misc]


def _subclasses(kind: type) -> list[type]:
    children: list[type] = kind.__subclasses__()
    found = [kind]
    for child in children:
        found += _subclasses(child)
    return found


def _install() -> None:
    before = GradientCheckpointingLayer.__dict__.get("__init_subclass__")  # not of all versions
    if hasattr(getattr(before, "__func__", None), _DONE):
        return

    def __init_subclass__(cls: type, /, **options: Any) -> None:
        if before is None:
            super(GradientCheckpointingLayer, cls).__init_subclass__(**options)
        else:
            before.__func__(cls, **options)
        _give_own_config(cls)

    setattr(__init_subclass__, _DONE, True)
    GradientCheckpointingLayer.__init_subclass__ = classmethod(__init_subclass__)
    for kind in _subclasses(GradientCheckpointingLayer):
        _give_own_config(kind)


_install()
# It warns of every reading of a size at the top, e.g. by its own check of the config: here the
# blocks do get their own.
logging.getLogger("transformers.integrations.heterogeneity.configuration_utils").addFilter(
    lambda record: not record.getMessage().startswith("Reading global config value")
)
