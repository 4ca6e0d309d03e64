"""Plug secateur into transformers, whichever of the two is imported first.

transformers has no entry points: the module that registers the quantizer must have been imported
before ``from_pretrained`` sees a packed model, or it would fill the missing weights with random
numbers after a mere warning; and that which builds blocks of different sizes before a model with
them. Importing transformers costs seconds, so `import secateur` must not do it; a finder on
``sys.meta_path`` waits for it instead.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# What is imported as soon as which module of transformers is.
_PLUGINS = {
    "transformers.quantizers.auto": "secateur.serve.hf",
    "transformers.modeling_layers": "secateur.transformers_layers",
}


class _Loader:
    """Runs a module's own loader, then the plug-in that registers itself there."""

    def __init__(self, inner: Any, plugin: str) -> None:
        self.inner = inner
        self.plugin = plugin

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self.inner.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        importlib.import_module(self.plugin)


class _Finder:
    def __init__(self, awaited: str) -> None:
        self.awaited = awaited

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.awaited:
            return None
        sys.meta_path.remove(self)  # once is enough, and the search below must not find us again
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, _PLUGINS[name])  # type: ignore[assignment]
        return spec


def install() -> None:
    """Plug in now where transformers' module is loaded, else as soon as it is; idempotent."""
    waiting = {finder.awaited for finder in sys.meta_path if isinstance(finder, _Finder)}
    for awaited, plugin in _PLUGINS.items():
        if awaited in sys.modules:
            importlib.import_module(plugin)
        elif awaited not in waiting:
            sys.meta_path.insert(0, _Finder(awaited))
