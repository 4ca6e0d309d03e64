"""Register secateur's quantizer with transformers, whichever of the two is imported first.

transformers has no entry points for quantizers: the registering module must have been imported
before ``from_pretrained`` sees a packed model, or it would fill the missing weights with random
numbers after a mere warning. Importing transformers costs seconds, so `import secateur` must not
do it; a finder on ``sys.meta_path`` waits for it instead.
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

_REGISTRY = "transformers.quantizers.auto"
_PLUGIN = "secateur.serve.hf"


class _Loader:
    """Runs the registry's own loader, then the plug-in that registers itself there."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self.inner.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        importlib.import_module(_PLUGIN)


class _Finder:
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)  # once is enough, and the search below must not find us again
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


def install() -> None:
    """Register now if transformers' registry is loaded, else as soon as it is; idempotent."""
    if _REGISTRY in sys.modules:
        importlib.import_module(_PLUGIN)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
