"""What structured methods refuse, and what is refused of their results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import ModelError, UsageError
from secateur.prune import prune_model
from secateur.recipe import Calibration, Prune


@pytest.fixture
def text(text_file: Path) -> Calibration:
    return Calibration(data=str(text_file), samples=4, length=24)


@pytest.fixture
def wide(tmp_path: Path, make_model: Callable[..., Path]) -> Callable[[str], Path]:
    def get(family: str) -> Path:
        return make_model(tmp_path / family, family, num_hidden_layers=3, num_key_value_heads=4)

    return get


def test_biases_that_a_family_cannot_hold_are_refused(
    wide: Callable[[str], Path], text: Calibration, tmp_path: Path
) -> None:
    recipe = Prune.model_validate({"method": "flap+bias", "pattern": "30%"})
    with pytest.raises(ModelError, match="hold no biases"):
        prune_model(str(wide("qwen3")), tmp_path / "out", recipe, text, quiet=True)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"method": "adapt", "pattern": "2:4"}, "the pattern is 2:4"),
        ({"method": "adapt+swaps", "pattern": "20%"}, "cannot follow 'adapt'"),
        ({"method": "adapt+lsq+bias", "pattern": "20%"}, "more than one way"),
        ({"method": "shortgpt+lsq", "pattern": "20%"}, "removes whole blocks"),
        ({"method": "adapt", "pattern": "20%", "settings": {"flap.x": 1}}, "is not 'adapt'"),
        ({"method": "sleb", "pattern": "95%"}, "at the least"),
        ({"method": "adapt", "pattern": "20%", "memory": "4GiB"}, "hold the whole model"),
    ],
)
def test_what_makes_no_sense_is_refused(
    recipe: dict[str, Any],
    said: str,
    wide: Callable[[str], Path],
    text: Calibration,
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError, match=said):
        prune_model(
            str(wide("llama")),
            tmp_path / "out",
            Prune.model_validate(recipe),
            text,
            quiet=True,
        )


def test_families_without_parts_are_refused(
    of_family: Callable[[str], Path], text: Calibration, tmp_path: Path
) -> None:
    recipe = Prune.model_validate({"method": "adapt", "pattern": "20%"})
    with pytest.raises(ModelError, match="no heads and channels of 'gpt2'"):
        prune_model(str(of_family("gpt2")), tmp_path / "out", recipe, text, quiet=True)


def test_masks_are_not_lost_in_silence(
    wide: Callable[[str], Path], text: Calibration, tmp_path: Path
) -> None:
    masked = tmp_path / "masked"
    two_four = Prune.model_validate({"method": "magnitude", "pattern": "2:4"})
    prune_model(str(wide("llama")), masked, two_four, Calibration(data="none"), quiet=True)
    recipe = Prune.model_validate({"method": "adapt", "pattern": "20%"})
    with pytest.raises(UsageError, match="has masks, which do not survive"):
        prune_model(str(masked), tmp_path / "out", recipe, text, quiet=True)


def test_blocks_of_different_sizes_are_not_permuted(
    wide: Callable[[str], Path], text: Calibration, tmp_path: Path
) -> None:
    narrow = tmp_path / "narrow"
    recipe = Prune.model_validate({"method": "flap", "pattern": "30%", "multiple": 4})
    prune_model(str(wide("llama")), narrow, recipe, text, quiet=True)
    assert "per_layer_config" in (narrow / "config.json").read_text()
    permuted = Prune.model_validate({"method": "wanda", "pattern": "2:4", "permute": True})
    with pytest.raises(UsageError, match="different sizes are not permuted"):
        prune_model(str(narrow), tmp_path / "out", permuted, text, quiet=True)
