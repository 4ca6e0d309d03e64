"""Models that several files of tests open."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.compile import pack_model
from tests.compile.conftest import prune_by_hand


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2:4 model, pruned and packed with several value types; tests must not change it."""
    home = tmp_path_factory.mktemp("made")
    pruned = prune_by_hand(home / "pruned", "2:4", kind="qwen2", inner=80)
    for values in ("fp32", "int8", "int4", "fp8"):
        pack_model(
            pruned,
            home / values,
            values=values,  # type: ignore[arg-type]
            group_size=32,
            quantize="rtn",
            quiet=True,
        )
    return home
